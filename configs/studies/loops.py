"""Does the loss fall with every loop that a model is trained with, by less each time?

    python -m experiments.compare --config=configs/studies/loops.py

The source is Figure 6 of the paper: 1.3B parameters, loop counts 1, 2, 3 and 5. Here it is the
model of configs/studies/language.py. loops_random draws its count from these four at each update.
Every model is then measured with 1 to 8 loops (the depth curve), whatever it was trained with.

Match: all entries have the same parameters and tokens. With more loops, a token costs more FLOPs,
and the initial output matrices are smaller (1 / sqrt(2 depth), loops counted). loops_3 and loops_1
have the settings and seeds of yoco_u and yoco in configs/studies/language.py, so their losses are
the same ones (those of loops_1 up to 0.0005), and no new evidence.

Cost: 33 runs of 1 to 4 minutes of one CPU core, 91 minutes in all.

Expected, written before the first run. The loss falls from 1 to 2 loops by 0.005 to 0.02 bits/byte,
from 2 to 3 by 0 to 0.01, and from 3 to 5 by less than three seeds can show. A model is best with
the count that it was trained with. With random counts the curve is flatter: a little worse than
loops_3 with 3 loops, and far better with 1 loop and with 8. (The claims about loops_3 with 2, 3 and
4 loops were written later than the others, and before the runs that count: those are on another
text. In a model of `make train`, 2 and 4 loops cost 0.055 and 0.031 nats: LOG.md.)
"""

from configs.studies import language
from yocou_jax.study import NOT_IN_PAPER, Claim, Entry, Study


def get_config():
    c = language.get_config()
    c.model.num_loops = 3
    return c


def nats(loops: int) -> str:
    """The path of the loss with this number of loops."""
    return f"evaluation.loops.scalars.nats_{loops}"


def trained(entry: str, loops: int, other: int, expected: tuple[float, float]) -> Claim:
    """That a model is better with the loops that it was trained with than with another number."""
    paths = {"metric": nats(loops), "against": nats(other)}
    return Claim(entry, entry, NOT_IN_PAPER, expected, **paths)


CURVE = "a lower loss (a curve without numbers)"

STUDY = Study(
    question="Does the loss fall with every loop, by less each time?",
    entries={
        "loops_3": Entry(),
        **{f"loops_{count}": Entry({"model.num_loops": count}) for count in (1, 2, 5)},
        "loops_random": Entry({"model.num_loops": "1,2,3,5"}),
    },
    learning_rates=(0.005, 0.01, 0.02, 0.04),
    evaluations={"loops": ("--loops=1,2,3,4,5,6,7,8",)},
    claims=(
        Claim("loops_2", "loops_1", "Figure 6", (0.005, 0.02), paper=CURVE),
        Claim("loops_3", "loops_2", "Figure 6", (0.0, 0.01), paper=CURVE),
        Claim("loops_5", "loops_3", "Figure 6", (-0.005, 0.01), paper=CURVE),
        Claim("loops_3", "loops_random", NOT_IN_PAPER, expected=(0.0, 0.03)),
        # In nats per token.
        trained("loops_3", 3, 2, (0.02, 0.1)),
        trained("loops_3", 3, 4, (0.0, 0.06)),
        Claim("loops_random", "loops_3", NOT_IN_PAPER, (0.05, 2.0), 0.02, metric=nats(1)),
        Claim("loops_random", "loops_3", NOT_IN_PAPER, (0.0, 1.0), 0.02, metric=nats(8)),
    ),
    notes="loops_3 and loops_1 are the models of yoco_u and yoco in `language`, with the same text "
    "and seeds (loops_1 and yoco agree up to rounding), so they are no new evidence. "
    "The 3 runs at the rate 0.04 name a revision whose study has three rates: 0.04 was asked for "
    "by hand, and how is not recorded (LOG.md).",
)
