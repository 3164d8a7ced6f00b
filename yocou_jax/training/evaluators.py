"""What looks at the model every so many steps of a run, and at its end.

An evaluator is made from the run when its data has been read. `measure` comes before the checkpoint
of its step, and its metrics enter the row of that step; `show` comes after the checkpoint, and what
goes wrong in it ends nothing.
"""

import math
import typing

import jax
import numpy as np

from yocou_jax.inference import Sampling, generate, prepare
from yocou_jax.training import metrics

if typing.TYPE_CHECKING:
    from yocou_jax.training.loop import Run


class Evaluator:
    """every: after how many steps it is due; at the end of a run all are."""

    name: str
    every: int

    def measure(self, params, step: int) -> dict[str, float]:
        """Metrics by name. Every process calls it."""
        return {}

    def show(self, params, step: int) -> None:
        """What is to be seen besides metrics. Every process calls it."""


class Validation(Evaluator):
    """Loss (nats per token) and bits per byte on the fixed validation set."""

    name = "validation"

    def __init__(self, run: "Run"):
        self.run, self.every = run, run.config.run.eval_every
        # No more sequences at once than a microbatch has: what fits there fits here.
        size = run.config.data.batch_size // run.config.optimizer.accumulation_steps
        self.batches = list(run.data.validation.batches(run.sharding, size))

    def measure(self, params, step: int) -> dict[str, float]:
        sums = [self.run.setup.evaluate(params, batch) for batch in self.batches]
        nll = float(np.sum([jax.device_get(s.nll) for s in sums], dtype=np.float64))
        validation = self.run.data.validation
        return {
            metrics.VAL_LOSS: nll / validation.num_tokens,
            metrics.VAL_BPB: nll / math.log(2) / validation.num_bytes,
        }


class Sample(Evaluator):
    """A text that goes on from run.sample_prompt, drawn by the step: a resume repeats it."""

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
            run.writer.text("sample", text, step)
