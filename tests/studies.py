"""A study of two entries whose runs are made up."""

import functools

from tests import tiny
from yocou_jax.evaluation.compare import Comparison, RunFailed, Spec
from yocou_jax.files import to_json
from yocou_jax.manifest import describe, write
from yocou_jax.study import AXES, Claim, Entry, Study

BASE = tiny.config("full*1", run={"steps": 20}, optimizer={"learning_rate": 0.1})
STUDY = Study(
    "Does <b> beat a?",
    {"a": Entry(), "b": Entry({"model.window": 3})},
    claims=(Claim("b", "a", "Table 3", expected=(0.0, 0.5), paper="1.5 and 2.5"),),
    seeds=3,
    learning_rates=(0.3, 0.1, 0.2),
)
# What a run would reach, by entry and learning rate.
LOSSES = {"a": {0.1: 2.0, 0.2: 1.5, 0.3: 1.7}, "b": {0.1: 1.2, 0.2: 1.9, 0.3: None}}
REVISION = "0123456789abcdef" * 2 + "01234567"


@functools.cache
def about() -> dict:
    return describe({}, corpus="c", tokenizer="t") | {"git": REVISION}


def pretend(spec: Spec, **facts) -> None:
    """Writes the files of a run that has ended. facts: of its manifest."""
    if (loss := LOSSES[spec.entry][spec.rate]) is None:
        raise RunFailed("the gradient was not finite")
    loss += 0.01 * spec.seed if spec.entry == "a" else 0.02 * spec.seed
    write(spec.workdir, about() | {"config": spec.config.to_dict()} | facts)
    tokens = AXES["tokens"].amount(spec.config) / 200
    rows = [{"step": n, "tokens": tokens * n, "bpb": loss + 1 / n} for n in range(1, 201)]
    rows[-1]["val_bpb"] = loss
    (spec.workdir / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))
    flops = AXES["flops"].amount(spec.config)
    summary = {"val_bpb": loss, "wall_s": 60.0, "train_flops": flops}
    (spec.workdir / "summary.json").write_text(to_json(summary))
    spec.clock.write_text("60.0\n")


def never(spec: Spec, task: str, options) -> None:
    raise AssertionError(f"The study has no task {task}.")


def train(comparison: Comparison, **changes) -> list[str]:
    """Makes all runs that are left. Returns their names."""
    made = []

    def one(spec):
        made.append(spec.name)
        pretend(spec)

    comparison.train(**({"train": one, "evaluate": never} | changes))
    return made
