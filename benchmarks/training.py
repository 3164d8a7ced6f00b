"""Measures how fast the small config trains on the machine at hand, in one run.

    python -m experiments.benchmark_training [--json]

Prints tokens/s and GFLOP/s (model FLOPs of `accounting`, no recomputation) of the config and of its
transformer sibling beside a large matrix product, the share of a step spent outside the device
computation, compile time against the loop count, and window attention against dense. What is
compared is interleaved, and medians are printed, because shared machines are noisy.
"""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from pallas_kernels import api
from yocou_jax import accounting
from yocou_jax.config import Config
from yocou_jax.data.pipeline import Batch, load_data
from yocou_jax.sharding import batch_sharding
from yocou_jax.train import set_up

CONFIG = cli.config_file("configs/yocou_small.py", "What to train.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Times that every measurement is repeated.", lower_bound=1
)
STEPS = flags.DEFINE_integer("steps", 4, "Training steps in one measurement.", lower_bound=1)
LOOPS = (1, 3, 8)
WINDOW_LENGTHS = (4096, 8192)


def _seconds(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _with_architecture(name: str, num_loops: int | None = None) -> Config:
    fields = CONFIG.value.copy_and_resolve_references()
    with fields.unlocked():
        fields.model.architecture, fields.model.num_loops = name, num_loops
    return Config.from_dict(fields)


class Trainer:
    """A model with its state and data, to be stepped in the two ways that are compared."""

    def __init__(self, config: Config):
        self.setup = set_up(config)
        self.state = self.setup.init()
        self.batches = load_data(config.data).train(batch_sharding(self.setup.mesh))
        self.batch = next(self.batches)
        self.tokens = config.data.batch_size * config.data.sequence_length
        self.flops = self.tokens * accounting.train_flops_per_token(
            config.model, config.data.sequence_length
        )

    def device_only(self):
        """One batch again and again: nothing but the computation."""
        for _ in range(STEPS.value):
            self.state, _ = self.setup.step(self.state, self.batch)
        return self.state

    def as_in_training(self):
        """A new batch for each step, and the metrics of the step before read: the host loop."""
        before = None
        for _ in range(STEPS.value):
            self.state, out = self.setup.step(self.state, next(self.batches))
            if before is not None:
                jax.device_get(before)
            before = out
        return self.state


def measure_training() -> dict:
    n = 2048
    x = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(jnp.dot)
    _seconds(lambda: product(x, x))
    names = dict.fromkeys((str(CONFIG.value.model.architecture), "transformer"))
    trainers = {name: Trainer(_with_architecture(name)) for name in names}
    device, training, matmul = {n: [] for n in names}, {n: [] for n in names}, []
    for trainer in trainers.values():
        _seconds(trainer.device_only)  # compiles
    for _ in range(ROUNDS.value):
        matmul.append(_seconds(lambda: product(x, x)))
        for name, trainer in trainers.items():
            device[name].append(_seconds(trainer.device_only) / STEPS.value)
            training[name].append(_seconds(trainer.as_in_training) / STEPS.value)
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


def measure_compilation() -> dict[str, float]:
    """Seconds to lower and compile the train step, by loop count; the median of the rounds."""
    seconds = {str(n): [] for n in LOOPS}
    for _ in range(ROUNDS.value):
        for loops in LOOPS:
            setup = set_up(_with_architecture("yoco_u", loops))
            length, size = CONFIG.value.data.sequence_length, CONFIG.value.data.batch_size
            tokens = jax.ShapeDtypeStruct((size, length), jnp.int32)
            batch = Batch(tokens, tokens, None, None, None)
            start = time.perf_counter()
            with jax.set_mesh(setup.mesh):
                setup.step.lower(setup.abstract_state, batch).compile()
            seconds[str(loops)].append(time.perf_counter() - start)
    return {loops: statistics.median(values) for loops, values in seconds.items()}


def measure_window() -> dict[str, dict[str, float]]:
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
        for _ in range(ROUNDS.value):
            for name, function in compiled.items():
                times[name].append(_seconds(functools.partial(function, q, k, v)))
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


def main(_):
    if jax.default_backend() == "cpu":
        cli.keep_freed_memory()
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "training": measure_training(),
        "compile_s": measure_compilation(),
        "window_attention": measure_window(),
    }
    if JSON.value:
        print(json.dumps(result))
        return
    console, training = Console(), result["training"]
    console.print(
        f"{result['device']}, jax {result['jax']}; "
        f"2048 x 2048 matrix product: {training['matmul_gflops']:.0f} GFLOP/s"
    )
    rows = {k: v for k, v in training.items() if isinstance(v, dict)}
    console.print(_table("training", rows))
    console.print(_table("compile time of the step, s, by loops", {"yoco_u": result["compile_s"]}))
    console.print(_table("window attention, W = 512", result["window_attention"]))


def _table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    table = Table("", title=title, title_justify="left")
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{value:,.4g}" for value in values.values()))
    return table


if __name__ == "__main__":
    cli.run(main)
