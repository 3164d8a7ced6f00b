"""Does the loss fall with every loop that a model is trained with, by less each time?

    python -m experiments.compare --config=configs/studies/loops.py

The source is Figure 6 of the paper: 1.3B parameters, loop counts 1, 2, 3 and 5. Here it is the
model of configs/studies/language.py.

Match: all entries have the same parameters and tokens. With more loops, a token costs more FLOPs.

Cost: 20 runs of 1 to 4 minutes on 2 idle CPU cores, 40 to 50 minutes in all. This is an estimate,
as in configs/studies/language.py.

Expected, written before the first run. The loss falls from 1 to 2 loops by 0.005 to 0.02 bits/byte,
from 2 to 3 by 0 to 0.01, and from 3 to 5 by less than three seeds can show.
"""

from configs.studies import language
from yocou_jax.study import Claim, Entry, Study


def get_config():
    c = language.get_config()
    c.model.num_loops = 3
    return c


STUDY = Study(
    question="Does the loss fall with every loop, by less each time?",
    entries={
        "loops_3": Entry(),
        **{f"loops_{count}": Entry({"model.num_loops": count}) for count in (1, 2, 5)},
    },
    learning_rates=(0.005, 0.01, 0.02),
    claims=(
        Claim("loops_2", "loops_1", "Figure 6", expected=(0.005, 0.02)),
        Claim("loops_3", "loops_2", "Figure 6", expected=(0.0, 0.01)),
        Claim("loops_5", "loops_3", "Figure 6", expected=(-0.005, 0.01)),
    ),
)
