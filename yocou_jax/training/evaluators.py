"""Evaluators measure or show something at regular steps of a run, and at its end.

An evaluator is made from the run, after the run has read its data. `measure` is called before the
checkpoint of its step, and its metrics are written to the row of that step. `show` is called after
the checkpoint, and an error in it does not end the run.
"""

import math
import typing
from collections.abc import Iterator

import jax
import numpy as np

from yocou_jax.analysis import inside
from yocou_jax.data.pipeline import Batch
from yocou_jax.inference import Sampling, generate, prepare
from yocou_jax.training import metrics

if typing.TYPE_CHECKING:
    from yocou_jax.training.loop import Run


class Evaluator:
    """every: the run calls it after the steps every, 2 every, ..., and after its last step."""

    name: str
    every: int

    def measure(self, params, step: int) -> dict[str, float]:
        """Returns metrics by name. Every process calls it."""
        return {}

    def show(self, params, step: int) -> None:
        """Shows what is not a metric. Every process calls it."""


def _validation_batches(run: "Run") -> Iterator[Batch]:
    """They have as many sequences as a microbatch: if training fits into memory, they do too."""
    size = run.config.data.batch_size // run.config.optimizer.accumulation_steps
    return run.data.validation.batches(run.sharding, size)


class Validation(Evaluator):
    """Loss (nats per token) and bits per byte on the fixed validation set. If the run draws its
    loop counts, also with each count."""

    name = "validation"

    def __init__(self, run: "Run"):
        self.run, self.every = run, run.config.run.eval_every
        self.batches = list(_validation_batches(run))

    def measure(self, params, step: int) -> dict[str, float]:
        model = self.run.config.model
        if model.loop_draw is None:
            return self._losses(params, None)
        found = {count: self._losses(params, count) for count in model.loop_draw.counts}
        (own,) = model.program.loop_counts
        return found[own] | {
            metrics.at_loops(name, count): value
            for count, losses in found.items()
            for name, value in losses.items()
        }

    def _losses(self, params, num_loops: int | None) -> dict[str, float]:
        sums = [self.run.setup.evaluate(params, batch, num_loops) for batch in self.batches]
        nll = float(np.sum([jax.device_get(s.nll) for s in sums], dtype=np.float64))
        validation = self.run.data.validation
        return {
            metrics.VAL_LOSS: nll / validation.num_tokens,
            metrics.VAL_BPB: nll / math.log(2) / validation.num_bytes,
        }


class Analysis(Evaluator):
    """What happens inside the model (`yocou_jax.analysis.inside`), on the first validation batch;
    nothing without run.analysis."""

    name = "analysis"

    def __init__(self, run: "Run"):
        self.run, self.every = run, run.config.run.eval_every
        self.batch = next(_validation_batches(run)) if run.config.run.analysis else None

    def measure(self, params, step: int) -> dict[str, float]:
        if self.batch is None:
            return {}
        found = inside(params, self.run.config.model, self.run.setup.compute, self.batch)
        return {f"{metrics.INSIDE}/{name}": value for name, value in found.scalars().items()}


class Sample(Evaluator):
    """A text that continues run.sample_prompt. Its seed is the step, so a resumed run shows the
    texts of an uninterrupted one."""

    name = "sample"

    def __init__(self, run: "Run"):
        self.run, self.every = run, run.config.run.sample_every

    def show(self, params, step: int) -> None:
        run, tokenizer = self.run, self.run.data.tokenizer
        prompt = [tokenizer.eot_id, *tokenizer.encode(run.config.run.sample_prompt)]
        out = generate(
            prepare(params, run.config.model, run.setup.compute),
            [prompt],
            max_new_tokens=run.config.run.sample_tokens,
            sampling=Sampling(temperature=0.8),
            seeds=step,
            stop_tokens=[tokenizer.eot_id],
        )
        text = tokenizer.decode([*prompt, *out.tokens[0, : out.lengths[0]]])
        run.reporter.sample(text, f"step {step}: a sample")
        if run.writer:
            run.writer.events.text("sample", text, step)
