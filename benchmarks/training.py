"""How fast a config trains, compiles, and attends to a window."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.timing import seconds
from pallas_kernels import api
from yocou_jax import accounting
from yocou_jax.config import Config
from yocou_jax.data.pipeline import Batch, load_data
from yocou_jax.device_memory import memory_errors, training_hints
from yocou_jax.sharding import batch_sharding
from yocou_jax.training.step import set_up

LOOPS = (1, 3, 8)
WINDOW_LENGTHS = (4096, 8192)
PRODUCT = 2048  # rows and columns of the matrix product that a training step is compared with


def compared(fields: ConfigDict) -> dict[str, Config]:
    """The config, and a transformer of the same sizes and the same number of layers."""
    config = Config.from_dict(fields)
    transformer = accounting.sibling(config.model, "transformer")
    return {
        "transformer": dataclasses.replace(config, model=transformer),
        config.model.architecture: config,
    }


class Trainer:
    """A model with its state and data, and the two ways to train it that are compared."""

    def __init__(self, config: Config, steps: int):
        self.setup, self.steps = set_up(config), steps
        with jax.set_mesh(self.setup.mesh):
            self.state = self.setup.init()
        self.batches = load_data(config.data).train(batch_sharding(self.setup.mesh))
        self.batch = next(self.batches)
        self.tokens = config.data.batch_size * config.data.sequence_length
        self.flops = self.tokens * accounting.train_flops_per_token(
            config.model, config.data.sequence_length
        )

    def device_only(self):
        """Steps on one batch, again and again: the computation alone."""
        with jax.set_mesh(self.setup.mesh):
            for _ in range(self.steps):
                self.state, _ = self.setup.step(self.state, self.batch)
        return self.state

    def as_in_training(self):
        """Steps on new batches, and reads the metrics of the step before, as the host loop does."""
        before = None
        with jax.set_mesh(self.setup.mesh):
            for _ in range(self.steps):
                self.state, out = self.setup.step(self.state, next(self.batches))
                if before is not None:
                    jax.device_get(before)
                before = out
        return self.state


def measure_training(fields: ConfigDict, rounds: int, steps: int) -> dict[str, Any]:
    """Times the config, a transformer of its sizes, and a large matrix product, in turn."""
    n = PRODUCT
    x = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(jnp.dot)
    seconds(product, x, x)
    hints = training_hints(Config.from_dict(fields), jax.device_count(), 1)
    with memory_errors("A training step", hints):
        trainers = {name: Trainer(config, steps) for name, config in compared(fields).items()}
        for trainer in trainers.values():
            seconds(trainer.device_only)  # compiles
    device, training, matmul = {n: [] for n in trainers}, {n: [] for n in trainers}, []
    for _ in range(rounds):
        matmul.append(seconds(product, x, x))
        for name, trainer in trainers.items():
            device[name].append(seconds(trainer.device_only) / steps)
            training[name].append(seconds(trainer.as_in_training) / steps)
    result = {"matmul_gflops": 2 * n**3 / statistics.median(matmul) / 1e9}
    for name, trainer in trainers.items():
        trainer.batches.close()
        step = statistics.median(training[name])
        shares = [1 - d / t for d, t in zip(device[name], training[name], strict=True)]
        result[name] = {
            "step_s": step,
            "tokens_per_s": trainer.tokens / step,
            "gflops": trainer.flops / step / 1e9,
            "outside_device_fraction": statistics.median(shares),
        }
    return result


def headline(name: str, architecture: str, trained: dict[str, Any]) -> str:
    """The one sentence about a result of `measure_training`: how fast the config trains, and what
    share of a matrix product this is."""
    row, product = trained[architecture], trained["matmul_gflops"]
    return (
        f"{name} trains at {row['tokens_per_s']:,.0f} tokens/s, {row['gflops']:,.0f} GFLOP/s: "
        f"{row['gflops'] / product:.0%} of a {PRODUCT} x {PRODUCT} matrix product on this machine "
        f"({product:,.0f} GFLOP/s)."
    )


def measure_compilation(fields: ConfigDict, rounds: int) -> dict[str, float]:
    """Seconds to lower and compile the train step, by loop count; the median of the rounds."""
    taken = {str(n): [] for n in LOOPS}
    for _ in range(rounds):
        for loops in LOOPS:
            changed = fields.copy_and_resolve_references()
            changed.model.update(architecture="yoco_u", num_loops=loops)
            setup = set_up(Config.from_dict(changed))
            length, size = fields.data.sequence_length, fields.data.batch_size
            tokens = jax.ShapeDtypeStruct((size, length), jnp.int32)
            batch = Batch(tokens, tokens, None, None, None)
            start = time.perf_counter()
            with jax.set_mesh(setup.mesh):
                setup.step.lower(setup.abstract_state, batch).compile()
            taken[str(loops)].append(time.perf_counter() - start)
    return {loops: statistics.median(values) for loops, values in taken.items()}


def measure_window(rounds: int) -> dict[str, dict[str, float]]:
    """Forward and backward of window attention (W = 512, 4 heads of 64) against dense."""
    results = {}
    for n in WINDOW_LENGTHS:
        q, k, v = jax.random.normal(jax.random.key(0), (3, 1, n, 4, 64))
        compiled = {}
        for name in ("xla", "reference"):

            def loss(q, k, v, name=name):
                y = api.window_attention(q, k, v, window=512, implementation=name)
                return jnp.sum(y * y)

            compiled[name] = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
        times = {name: [] for name in compiled}
        for _ in range(rounds):
            for name, function in compiled.items():
                times[name].append(seconds(function, q, k, v))
        medians = {name: statistics.median(t) for name, t in times.items()}
        memory = {n: f.memory_analysis().temp_size_in_bytes for n, f in compiled.items()}
        results[str(n)] = {
            "window_ms": medians["xla"] * 1e3,
            "dense_ms": medians["reference"] * 1e3,
            "speedup": medians["reference"] / medians["xla"],
            "window_mib": memory["xla"] / accounting.MIB,
            "dense_mib": memory["reference"] / accounting.MIB,
            "memory_ratio": memory["reference"] / memory["xla"],
        }
    return results


def measure(fields: ConfigDict, rounds: int, steps: int) -> dict[str, Any]:
    """All measurements. rounds: how often each is repeated; steps: training steps of each."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "training": measure_training(fields, rounds, steps),
        "compile_s": measure_compilation(fields, rounds),
        "window_attention": measure_window(rounds),
    }
