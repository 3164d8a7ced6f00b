"""Does each loop follow one more hop, and how far back does a looped window see?

    python -m experiments.compare --config=configs/studies/hops.py

p-hop induction (`Hops` in yocou_jax/data/synthetic.py) is not in the paper. Others have measured it
on looped models: one layer that runs six times learns 16 hops, which one layer that runs once does
not (Saunshi et al. 2025). Here a window layer runs 1 to 4 times, and a cross layer follows it. The
texts have 1, 2, 3 and 4 hops, as many of each; every position that has an answer is trained. The
window is as long as a text, so it limits nothing.

window_8, window_16 and window_32 have two loops and learn texts of two hops only. The last earlier
copy of a letter is 8 tokens back on average, so a window of 8 tokens misses it often. With two
loops, the self-decoder reaches back by twice as much; the figure of each run (evaluation/hops.png)
has the accuracy by distance, and a line where this reach ends.

Match: all entries have the same parameters, and all of a claim the same tokens. The accuracy is
that of new texts. A claim is that one entry has a lower accuracy than another. Muon at 0.01, as in
configs/studies/language.py; no other rate was tried.

Cost: 21 runs of 1 to 2 minutes on 2 idle CPU cores, about 30 minutes in all. This is an estimate
before any whole run: 3.0e13 FLOPs at 30 GFLOP/s, and 40 seconds to start, to validate and to
evaluate each run.

Expected, written before the first run. Two sizing runs (LOG.md) had 100%, 99%, 75% and 70% right
answers to 1, 2, 3 and 4 hops with four loops, and 100%, 95%, 67% and 64% with two loops. (The best
guess has 50%, 51%, 35% and 35%.) So each loop adds something, but three and four hops are not
learned to the end with so few tokens. From 1 to 2 loops the accuracy rises by 5 to 30 points at two
hops, from 2 to 3 loops by 2 to 15 points at three hops, and from 3 to 4 loops by -2 to 10 points at
four hops. A window of 16 tokens is better than one of 8 by 5 to 30 points, and one of 32 than one
of 16 by 1 to 15 points.
"""

from configs import base
from yocou_jax.study import Claim, Entry, Study

LENGTH = 128


def get_config():
    c = base.get_config()
    c.model.update(
        architecture="window*1@4 | cross*1",
        vocab_size=258,
        d_model=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        d_ff=192,
        window=LENGTH,
    )
    c.optimizer.update(
        name="muon",
        learning_rate=0.01,
        schedule="wsd",
        decay_fraction=0.5,
        final_fraction=0.02,
        warmup_steps=20,
    )
    c.data.update(
        source=chains(1, 2, 3, 4), tokenizer="bytes", batch_size=32, sequence_length=LENGTH
    )
    c.run.update(steps=350, eval_every=100, sample_every=1000, sample_tokens=16)
    return c


def chains(*hops: int) -> str:
    """The data source of texts with so many hops, as many of each."""
    return " + ".join(f"{1 / len(hops)}*hops(p={p},length={LENGTH})" for p in hops)


def accuracy(hops: int) -> str:
    """The path of the share of right answers in texts with so many hops."""
    return f"evaluation.hops.scalars.accuracy_p{hops}_length{LENGTH}"


def window(width: int) -> Entry:
    """Two loops that see so many tokens back, on two hops only."""
    fields = {"data.source": chains(2), "run.steps": 140}
    return Entry(fields | {"model.num_loops": 2, "model.window": width}, match=("parameters",))


STUDY = Study(
    question="Does each loop follow one more hop, and how far back does a looped window see?",
    entries={
        "loops_4": Entry(),
        **{f"loops_{n}": Entry({"model.num_loops": n}) for n in (1, 2, 3)},
        **{f"window_{width}": window(width) for width in (8, 16, 32)},
    },
    evaluations={"hops": (f"--lengths={LENGTH}",)},
    claims=(
        Claim("loops_1", "loops_2", "not in the paper", (0.05, 0.3), 0.02, metric=accuracy(2)),
        Claim("loops_2", "loops_3", "not in the paper", (0.02, 0.15), 0.02, metric=accuracy(3)),
        Claim("loops_3", "loops_4", "not in the paper", (-0.02, 0.1), 0.02, metric=accuracy(4)),
        Claim("window_8", "window_16", "not in the paper", (0.05, 0.3), 0.02, metric=accuracy(2)),
        Claim("window_16", "window_32", "not in the paper", (0.01, 0.15), 0.02, metric=accuracy(2)),
    ),
)
