"""The same training run with two implementations of attention, and how much their losses differ.

Two correct implementations sum in another order, so their losses differ too. How much that is, a
third run shows, the control: xla again, with other block sizes.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pallas_kernels import Call, api, block_sizes, interpret, target_device
from pallas_kernels.attention.blocks import Blocks, xla_blocks
from yocou_jax.config import Config
from yocou_jax.data.pipeline import load_data
from yocou_jax.errors import UserError
from yocou_jax.model import resolve_compute
from yocou_jax.sharding import batch_sharding
from yocou_jax.training import metrics
from yocou_jax.training.step import set_up

TIMES = 5.0  # a run may differ by this multiple of the control's difference
FLOOR = 1e-5  # nats per token that it may always differ by: some 40 roundings of a float32 loss


def losses(
    fields: ConfigDict, implementation: str, steps: int, say: Callable[[str], None]
) -> np.ndarray:
    """The training loss of each step [steps], nats per token."""
    fields = fields.copy_and_resolve_references()
    with fields.unlocked():
        fields.compute.attention, fields.run.steps = implementation, steps
        fields.optimizer.warmup_steps = min(fields.optimizer.warmup_steps, steps // 2)
    config = Config.from_dict(fields)
    setup, found = set_up(config), []
    data = load_data(config.data).train(batch_sharding(setup.mesh))
    with jax.set_mesh(setup.mesh), data as batches:
        state = setup.init()
        for step in range(1, steps + 1):
            state, out = setup.step(state, next(batches))
            found.append(out[metrics.LOSS])
            if step % 20 == 0:
                say(f"{implementation}, step {step}: {found[-1]:.4f}")
    return np.asarray(jax.device_get(found), np.float64)


def smaller_blocks(
    batch: int, heads: int, N: int, S: int, window: int | None, sees_all: bool
) -> Blocks:
    """Blocks of half the size for xla, which then sums in another order."""
    blocks = xla_blocks(batch, heads, N, S, window, sees_all)
    q = max(1, blocks.q // 2)
    return Blocks(q, max(1, blocks.kv // 2) if window is None else min(S, q + window - 1))


def compare(run: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How much the losses [steps] of two runs differ, in nats per token: the largest difference of
    any step, the difference of the means over the last tenth of the steps, and the difference of
    the first step."""
    tail = max(1, len(run) // 10)
    return {
        "largest": float(np.abs(run - other).max()),
        "final": float(abs(run[-tail:].mean() - other[-tail:].mean())),
        "first": float(abs(run[0] - other[0])),
    }


def tolerance(control: dict[str, float]) -> float:
    return max(FLOOR, TIMES * control["largest"])


def within(found: dict[str, float], control: dict[str, float]) -> bool:
    """Whether the differences are within the tolerance; False for NaN."""
    return max(found["largest"], found["final"]) <= tolerance(control)


def why_not(implementation: str, config: Config) -> str | None:
    """Why the implementation cannot run the model's attention on this machine; None if it can."""
    m, B, N = config.model, config.data.batch_size, config.data.sequence_length
    facts = {
        "q_shape": (B, N, m.num_heads, m.head_dim),
        "k_shape": (B, N, m.num_kv_heads, m.head_dim),
        "dtype": resolve_compute(config.compute).dtype,
        "segments": config.data.packing,
    }
    for operation, window in (("window_attention", m.window), ("cross_attention", None)):
        call = Call(operation, target_device(), **facts, window=window)
        if reason := api.unsupported_reason(implementation, call):
            return reason
    return None


def check(implementation: str, config: Config) -> bool:
    """Whether the implementation must be interpreted on this machine.

    Raises:
      UserError: it cannot run the model's attention here, not even in an interpreter.
    """
    interpreted = why_not(implementation, config) is not None
    with interpret() if interpreted else contextlib.nullcontext():
        if reason := why_not(implementation, config):
            raise UserError(f"--implementation={implementation} cannot run here: {reason}")
    if interpreted and implementation == "pallas_gpu":
        raise UserError(
            "--implementation=pallas_gpu needs its GPU: Mosaic GPU's interpreter uses callbacks, "
            "and flax's nn.scan treats what follows them as a dependency of the parameters."
        )
    return interpreted


def measure(
    fields: ConfigDict,
    name: str,
    steps: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The run with xla, with the implementation named, and with xla in other blocks, compared.

    Raises:
      UserError: the implementation cannot run here.
    """
    interpreted, as_is = check(name, Config.from_dict(fields)), contextlib.nullcontext()
    seconds, runs = {}, {}
    for label, implementation, context in (
        ("xla", "xla", as_is),
        ("control", "xla", block_sizes(xla_blocks=smaller_blocks)),
        (name, name, interpret() if interpreted else as_is),
    ):
        start = time.perf_counter()
        with context:
            runs[label] = losses(fields, implementation, steps, say)
        seconds[label] = time.perf_counter() - start
    found, control = compare(runs[name], runs["xla"]), compare(runs["control"], runs["xla"])
    return {
        "implementation": name,
        "interpreted": interpreted,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "steps": steps,
        "difference": found,
        "control": control,
        "tolerance": tolerance(control),
        "passed": within(found, control),
        "seconds": seconds,
        "losses": {label: run.tolist() for label, run in runs.items()},
    }
