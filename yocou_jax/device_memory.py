"""Memory that is used up is one sentence: what was asked, what there is, and what helps."""

import contextlib
import os
from collections.abc import Iterator, Sequence

import jax

from yocou_jax import hardware
from yocou_jax.config import Config
from yocou_jax.errors import UserError
from yocou_jax.foreign import asked_bytes, out_of_memory

GIB = 2**30
MOST_REMAT = "full"


def memory_of(device) -> float | None:
    """Bytes that programs can use on a jax.Device, if known. Of a CPU: those of the machine."""
    if device.platform == "cpu":
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return float(limit) if limit else hardware.peaks(device.device_kind).memory


def training_hints(config: Config, devices: int, batch_ways: int) -> list[str]:
    """Which settings help if a training step is too large, the one that costs the least time first.
    batch_ways: number of parts into which the mesh splits the rows of a batch."""
    hints = [] if config.compute.remat == MOST_REMAT else [f"compute.remat={MOST_REMAT}"]
    if config.data.batch_size > batch_ways * config.optimizer.accumulation_steps:
        hints.append("a larger optimizer.accumulation_steps")
    if devices > 1:
        hints += ["a larger mesh.fsdp (state)", "a larger mesh.context (activations)"]
    return [*hints, "a shorter data.sequence_length", "a smaller model"]


@contextlib.contextmanager
def memory_errors(what: str, hints: Sequence[str]) -> Iterator[None]:
    """Raises UserError if the memory of a device or of the host is used up inside. what: the
    subject of the sentence. hints: what would help, the best first; the first three are said."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        host = isinstance(error, MemoryError)
        asked, there = asked_bytes(error), None if host else memory_of(jax.local_devices()[0])
        facts = [] if there is None else [f"{there / GIB:.3g} GiB"]
        if asked is not None:
            facts.append(f"no room for {asked / GIB:.3g} GiB")
        size = f" ({', '.join(facts)})" if facts else ""
        raise UserError(
            f"{what} does not fit into the memory of {'this machine' if host else 'the device'}"
            f"{size}. It would help, in this order: {', '.join(hints[:3])}."
        ) from error
