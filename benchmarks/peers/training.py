"""Training beside the same model in PyTorch: `torch.compile`, float32, on the same CPU cores."""

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.peers import turns, weights
from benchmarks.peers.process import Peer
from benchmarks.training import compared
from yocou_jax import accounting
from yocou_jax.config import Config
from yocou_jax.data.pipeline import Batch
from yocou_jax.errors import UserError
from yocou_jax.sharding import batch_sharding
from yocou_jax.training import metrics
from yocou_jax.training.step import set_up

# Both sides train with it, because PyTorch's own optimizers have no other one that is fused.
ADAMW = {"name": "adamw", "learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0}
WARM_STEPS = 4  # their losses are compared too
LOSS_TOLERANCE = 1e-5  # before the first update
UPDATED_TOLERANCE = 1e-3  # after updates: AdamW's first ones are near the sign of the gradient


def batch(config: Config, seed: int) -> Batch:
    """Random tokens and their targets, both [B, N]. `torch_twin.Model.batch` draws the same
    ones."""
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    text = np.random.default_rng(seed).integers(0, config.model.vocab_size, shape)
    text = text.astype(np.int32)
    return Batch(text[:, :-1], text[:, 1:], None, None, None)


class Ours:
    """Our model with its state. `step` is what `torch_twin.Model.step` is on the other side."""

    def __init__(self, config: Config):
        self.config, self.setup = config, set_up(config)
        if self.setup.compute.dtype != np.float32:
            raise UserError("--peer compares float32 only: set --config.compute.dtype=float32.")
        with jax.set_mesh(self.setup.mesh):
            self.state = self.setup.init()

    def batch(self, seed: int) -> Batch:
        return jax.device_put(batch(self.config, seed), batch_sharding(self.setup.mesh))

    def loss(self, seed: int) -> float:
        with jax.set_mesh(self.setup.mesh):
            sums = self.setup.evaluate(self.state.params, self.batch(seed))
        return float(sums.nll / sums.weight)

    def step(self, seed: int) -> dict[str, float]:
        """One update from the batch of this seed: its seconds, and the loss before it."""
        drawn = jax.block_until_ready(self.batch(seed))
        start = time.perf_counter()
        with jax.set_mesh(self.setup.mesh):
            self.state, out = self.setup.step(self.state, drawn)
        jax.block_until_ready((self.state, out))
        return {"seconds": time.perf_counter() - start, "loss": float(out[metrics.LOSS])}


class Pair:
    """One program on both sides, with the same parameters, batches, clipping and AdamW.

    Raises RuntimeError if the losses of the two sides differ, before or after the first updates.
    """

    def __init__(self, peer: Peer, name: str, config: Config, compile: bool = True):
        self.peer, self.name, self.seed = peer, name, 0
        sizes = weights.twin_sizes(config, compile)
        self.ours = Ours(config)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "weights.npz"
            np.savez(file, **weights.twin_arrays(self.ours.state.params, config.model))
            peer.ask("make", name=name, module="torch_twin", sizes=sizes, weights=str(file))
        losses = self.ours.loss(0), self._theirs("loss", 0)
        self.difference = turns.close(*losses, "losses", LOSS_TOLERANCE)
        for _ in range(WARM_STEPS):
            steps = self.ours.step(self.seed), self._theirs("step", self.seed)
            turns.close(*(s["loss"] for s in steps), "losses after updates", UPDATED_TOLERANCE)
            self.seed += 1

    def _theirs(self, method: str, seed: int):
        return self.peer.ask("use", name=self.name, method=method, seed=seed)

    def take(self, number: int) -> tuple[float, float]:
        """Seconds of a step of each side, from the same batch."""
        self.seed += 1
        return turns.take(
            (
                lambda: self.ours.step(self.seed)["seconds"],
                lambda: self._theirs("step", self.seed)["seconds"],
            ),
            number,
        )


def _row(pair: Pair, times: dict[str, Any]) -> dict[str, Any]:
    model, data = pair.ours.config.model, pair.ours.config.data
    tokens = data.batch_size * data.sequence_length
    flops = tokens * accounting.train_flops_per_token(model, data.sequence_length)
    return {
        "architecture": pair.name,
        "program": str(model.program),
        **times,
        "tokens_per_s": tokens / times["ours_s"],
        "gflops": flops / times["ours_s"] / 1e9,
        "theirs_gflops": flops / times["theirs_s"] / 1e9,
        "loss_difference": pair.difference,
    }


def with_adamw(fields: ConfigDict) -> ConfigDict:
    """The config with the optimizer that both sides use."""
    changed = fields.copy_and_resolve_references()
    changed.optimizer.update(ADAMW)
    return changed


def measure(fields: ConfigDict, rounds: int, python: str) -> dict[str, Any]:
    """Times steps of the config, and of a transformer of its sizes, in turn with torch_twin.

    rounds: number of pairs of steps. python: that of an environment with PyTorch.

    Raises UserError if there is no PyTorch, or if it has no such model.
    """
    if jax.default_backend() != "cpu":
        raise UserError("--peer compares the speed on a CPU only: set JAX_PLATFORMS=cpu.")
    load, configs = turns.load(), compared(with_adamw(fields))
    for config in configs.values():
        weights.twin_sizes(config)  # before anything is compiled
    with Peer(python, ("torch", "numpy"), turns.cores()) as peer:
        product = turns.products(peer)
        pairs = {name: Pair(peer, name, config) for name, config in configs.items()}
        times, product_times = {name: [] for name in pairs}, []
        for number in range(rounds):
            product_times.append(turns.take(product, number))
            for name, pair in pairs.items():
                times[name].append(pair.take(number))
        return turns.report_head("torch.compile", peer, load, product_times) | {
            "optimizer": ADAMW,
            "rows": [_row(pairs[name], turns.summary(taken)) for name, taken in times.items()],
        }
