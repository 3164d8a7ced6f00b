"""Prefill and decode beside LlamaForCausalLM of transformers: float32, on the same CPU cores."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from benchmarks import inference as profile
from benchmarks.peers import turns, weights
from benchmarks.peers.process import Peer
from yocou_jax import accounting, inference
from yocou_jax.config import ModelConfig
from yocou_jax.errors import UserError
from yocou_jax.model import Compute, abstract_params

LOGITS_TOLERANCE = 1e-5
PROMPT = 24  # tokens of the two prompts whose logits are compared
PACKAGES = ("torch", "numpy", "transformers")


def make(peer: Peer, config: ModelConfig, compute: Compute, longest: int) -> float:
    """Makes the model "llama" on the other side, with our parameters. Returns how far its logits
    are from ours, relative to the largest, after a prompt and after one decode step."""
    sizes = weights.llama_sizes(config, longest)
    params = profile.random_like(nn.unbox(abstract_params(config)), std=config.d_model**-0.5)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.npz"
        np.savez(file, **weights.llama_arrays(params, config))
        peer.ask("make", name="llama", module="llama", sizes=sizes, weights=str(file))
    text = np.random.default_rng(0).integers(0, config.vocab_size, (2, PROMPT + 1))
    text = text.astype(np.int32)
    prompt, then = text[:, :-1], text[:, -1]
    model = inference.prepare(params, config, compute)
    memory, first = inference.prefill(model, prompt, new_tokens=1)
    _, second = inference.decode_step(model, memory, then)
    theirs = peer.ask(
        "use", name="llama", method="logits", tokens=prompt.tolist(), then=then.tolist()
    )
    return turns.close([first, second], theirs, "logits", LOGITS_TOLERANCE)


def plan(config: ModelConfig, sizes: profile.Sizes, compute: Compute) -> list[profile.Cell]:
    """Prefill of one prompt and decode of `sizes.batch` rows, at each length."""
    found = []
    for length in sizes.lengths:
        chunk = min(length, sizes.chunk_tokens)
        for kind, rows, piece in (("prefill", 1, chunk), ("decode", sizes.batch, sizes.steps)):
            found.append(profile.Cell(kind, "transformer", config, length, rows, piece, compute))
    return found


def pair(peer: Peer, cell: profile.Cell) -> tuple[turns.Timed, turns.Timed]:
    """The cell on both sides. Each side warms up before each time that it takes."""
    piece = {"prefill": "warm", "decode": "steps"}[cell.kind]
    arguments = {"batch": cell.batch, "length": cell.length, piece: cell.piece}
    return (
        lambda: profile.RUN[cell.kind](cell),
        lambda: peer.ask("use", name="llama", method=cell.kind, **arguments),
    )


def _row(cell: profile.Cell, taken: list[tuple[float, float]]) -> dict[str, Any]:
    times = turns.summary(taken)
    return {
        "kind": cell.kind,
        "length": cell.length,
        "batch": cell.batch,
        **times,
        "tokens_per_s": cell.tokens / times["ours_s"],
        "theirs_tokens_per_s": cell.tokens / times["theirs_s"],
    }


def measure(
    config: ModelConfig,
    sizes: profile.Sizes,
    compute: Compute,
    rounds: int,
    budget_s: float,
    python: str,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times the transformer of these sizes in turn with Llama.

    rounds: how many pairs of times each cell gets. After budget_s no round begins, but there is one
    in any case. python: that of an environment with transformers. say gets a line for each round.

    Raises UserError if there is no transformers, or if Llama is not such a model.
    """
    if jax.default_backend() != "cpu" or compute.dtype != np.float32:
        raise UserError(
            "--peer compares float32 on a CPU only: set JAX_PLATFORMS=cpu and "
            "--config.compute.dtype=float32."
        )
    load, start = turns.load(), time.perf_counter()
    config = accounting.sibling(config, "transformer")
    cells = plan(config, sizes, compute)
    with Peer(python, PACKAGES, turns.cores()) as peer:
        difference = make(peer, config, compute, max(sizes.lengths))
        for cell, error in profile.compile_ahead(cells).items():
            raise RuntimeError(f"{cell.kind} at {cell.length} cannot be compiled: {error}")
        pairs = {cell: pair(peer, cell) for cell in cells}
        times, product, product_times = {cell: [] for cell in cells}, turns.products(peer), []
        for number in range(rounds):
            if number and time.perf_counter() > start + budget_s:
                break
            product_times.append(turns.take(product, number))
            for cell, sides in pairs.items():
                times[cell].append(turns.take(sides, number))
            say(f"{number + 1} of {rounds} pairs, {time.perf_counter() - start:.0f} s")
        return turns.report_head("LlamaForCausalLM", peer, load, product_times) | {
            "program": str(config.program),
            "logits_difference": difference,
            "rows": [_row(cell, taken) for cell, taken in times.items()],
        }
