"""Which mesh, remat and microbatches suit a training run, on devices that are not here."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.plan import plan
from yocou_jax import accounting, hardware
from yocou_jax.config import Config, MeshConfig
from yocou_jax.errors import UserError

# remat and microbatches, the cheapest first: each next one needs less memory.
OPTIONS = (("none", 1), ("attention", 1), ("attention", 4), ("full", 1), ("full", 4), ("full", 16))


def meshes(config: Config, devices: int, memory: float | None) -> Iterator[list[Config]]:
    """For each mesh that makes sense for a model on so many devices: the config on it with OPTIONS.
    Meshes with little communication come first: fsdp alone, with copies of the state (data), then
    with context, tensor or expert.

    The state, 12 bytes for each parameter (it and two moments), must fit into 0.9 of the memory.
    Copies make its shards larger: those of few rows are slow to gather (docs/scale.md).
    """
    model, rows = config.model, config.data.batch_size
    state = 12 * accounting.parameters(model).total
    # A group of more devices than a token has experts needs an all-to-all (model/moe.py).
    experts = [n for n in (1, 4, 8, 16) if (model.num_experts or 1) % n == 0]
    found = []
    for data, tensor, context, expert in itertools.product(
        (1, 4, 16), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64), experts
    ):
        fsdp, rest = divmod(devices, data * tensor * context * expert)
        whole = not rest and fsdp and rows % (data * fsdp * expert) == 0
        whole_halves = context == 1 or config.data.sequence_length % (2 * context) == 0
        fits = model.num_heads % tensor == 0 and whole_halves
        if whole and fits and not (memory and data * state / devices > 0.9 * memory):
            sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
            sizes |= {"context": context, "expert": expert}
            cost = tensor - 1 + (context - 1) / 8 + (expert - 1) / 8 + (data - 1) / 64
            found.append((cost, sizes))
    for _, sizes in sorted(found, key=lambda pair: pair[0]):
        ways = rows // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
        yield [
            dataclasses.replace(
                config,
                mesh=MeshConfig(**sizes),
                compute=dataclasses.replace(config.compute, remat=remat),
                optimizer=dataclasses.replace(config.optimizer, accumulation_steps=steps),
            )
            for remat, steps in OPTIONS
            if ways % steps == 0
        ]


def search(
    config: Config, topology: str, devices: list, tries: int, say: Callable[[Config, Any], None]
) -> list[dict[str, Any]]:
    """The cheapest plan that fits on each mesh, and those that do not fit, the best first.

    The time of a step does not count what remat computes again. So of equal times, the one that
    comes first in OPTIONS is better, and then the one that sends less. If the option that needs the
    least memory does not fit on a mesh, no other one is tried there. tries: how many steps are
    compiled. say: called with each config, and its plan or the error that left it out.

    Raises UserError if no mesh fits.
    """
    memory = hardware.peaks(devices[0].device_kind).memory
    kept: list[tuple[tuple, dict[str, Any]]] = []
    for *others, least in meshes(config, len(devices), memory):
        fits = None  # the plan of `least`
        for option in (least, *others):
            if not tries:
                break
            try:
                found = plan(option, topology, devices)
            except (UserError, ValueError) as error:
                say(option, error)
                break
            tries -= 1
            say(option, found)
            order = OPTIONS.index((option.compute.remat, option.optimizer.accumulation_steps))
            bounds = found.get("at_least", {})
            rank = "error" in found, bounds.get("step") or 0, order, bounds.get("links") or 0
            if option is least:
                fits = None if "error" in found else (rank, found)
                if fits is None:
                    kept.append((rank, found))
                    break
            elif "error" not in found:
                fits = rank, found
                break
            else:
                kept.append((rank, found))
        kept += [] if fits is None else [fits]
    if not kept:
        raise UserError(
            f"No mesh of {len(devices)} devices fits data.batch_size={config.data.batch_size}, the "
            "model and the memory of a device."
        )
    return [found for _, found in sorted(kept, key=lambda pair: pair[0])]
