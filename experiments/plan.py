"""Plans a training run for devices that this machine does not have, before one pays for them.

    python -m experiments.plan --config=configs/yocou_1b.py --topology=v5e:16x16 \
        --config.mesh.data=4 --config.mesh.fsdp=16 --config.mesh.context=4 \
        --config.optimizer.accumulation_steps=2
    python -m experiments.plan --config=configs/yocou_1b.py --topology=v5p:4x4x4 --search

It compiles the real training step for the topology (a device and a shape: v5e:16x16, v5p:4x4x4,
v6e:8x8, tpu7x:2x2x2, h200:8). That needs requirements-aot.txt and Python 3.12, and takes minutes
for a large model. It prints for each device: memory, what moves to other devices, and the time that
a step takes at least. Memory and bytes are those of the compiled program. The time is an estimate:
published peaks of arithmetic and links, both reached, at the same time. Nothing runs.

--search tries meshes, those with little communication first. On each, it looks for the least remat
and the fewest microbatches with which the step fits, and it ranks all by the estimate. These
settings of the config are replaced; all others stay. Any setting can be given as a flag
(--config.data.sequence_length=1048576).
Exit code 1: the step does not fit into the memory of a device.
"""

import sys

from absl import flags

from benchmarks import plan as planning
from benchmarks.report import Grid, console, table
from experiments import cli
from yocou_jax import hardware
from yocou_jax.config import Config
from yocou_jax.errors import UserError
from yocou_jax.files import to_json

CONFIG = cli.config_file("configs/yocou_1b.py", "What to train.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Device and shape, as v5e:16x16.", required=True)
SEARCH = flags.DEFINE_bool("search", False, "Try several meshes, remat and microbatches.")
TRIES = flags.DEFINE_integer("tries", 6, "How many --search compiles.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")

GIB = 2**30


def _gib(size: float | None) -> str:
    return "not known" if size is None else f"{size / GIB:.3g} GiB"


def _seconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.3g} s"


def _mesh(found: dict) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "data=1"


def _facts(found: dict) -> list[list[str]]:
    sizes = found["bytes"]
    rows = [
        ["devices", f"{found['devices']} x {found['device_kind']}"],
        ["mesh", _mesh(found)],
        ["program", found["program"]],
        [
            "batch",
            f"{found['batch_size']} x {found['sequence_length']} tokens, in "
            f"{found['accumulation_steps']} microbatches; remat {found['remat']}, {found['dtype']}",
        ],
        ["not split, because it does not divide", "; ".join(found["whole"]) or "nothing"],
        ["parameters", _gib(sizes["parameters"])],
        ["optimizer", _gib(sizes["optimizer"])],
    ]
    if "error" in found:
        return [*rows, ["does not fit", found["error"]]]
    room = None if sizes["memory"] is None else sizes["memory"] - sizes["peak"]
    least = found["at_least"]
    return [
        *rows,
        ["gradients, activations and the rest", _gib(sizes["temporary"])],
        ["peak", f"{_gib(sizes['peak'])} of {_gib(sizes['memory'])}; {_gib(room)} are left"],
        ["FLOPs of a step", f"{found['flops']:.4g}"],
        ["sent in a step", _gib(sizes["sent"])],
        ["arithmetic (estimate)", f"at least {_seconds(least['arithmetic'])}"],
        ["links (estimate)", f"at least {_seconds(least['links'])}"],
        [
            "step (estimate)",
            f"at least {_seconds(least['step'])}"
            + (f", MFU at most {least['mfu']:.0%}" if least["mfu"] is not None else ""),
        ],
        ["compiled in", f"{found['compile_seconds']:.0f} s"],
    ]


def _show(found: dict) -> None:
    out = console(120)
    out.print(table(Grid(f"Plan for {found['topology']}, per device", ["", ""], _facts(found))))
    if moved := found.get("collectives"):
        rows = [[m["kind"], m["axes"], f"{m['runs']:,}", _gib(m["sent"])] for m in moved]
        out.print(table(Grid("What moves in a step", ["kind", "over", "runs", "sent"], rows, 2)))


def _search(config: Config, devices: list) -> list[dict]:
    """The cheapest plan that fits on each mesh, and those that do not fit, the best first. If the
    option that needs the least memory does not fit on a mesh, no other one is tried there."""
    memory = hardware.peaks(devices[0].device_kind).memory
    tried: list[dict] = []
    for *others, least in planning.meshes(config, len(devices), memory):
        for option in (least, *others):
            if len(tried) == TRIES.value:
                break
            try:
                tried.append(planning.plan(option, TOPOLOGY.value, devices))
            except (UserError, ValueError) as error:
                print(f"{option.mesh} was left out: {error}", file=sys.stderr)
                break
            if not JSON.value:
                print(_line(tried[-1]), flush=True)
            if ("error" in tried[-1]) == (option is least):
                break
    if not tried:
        raise UserError(
            f"No mesh of {len(devices)} devices fits data.batch_size={config.data.batch_size}, the "
            "model and the memory of a device."
        )
    return sorted(tried, key=lambda x: ("error" in x, x.get("at_least", {}).get("step") or 0))


def _line(found: dict) -> str:
    step = found.get("at_least", {}).get("step")
    words = "does not fit" if "error" in found else f"at least {_seconds(step)}"
    parts = found["accumulation_steps"]
    return f"{_mesh(found)}, remat {found['remat']}, {parts} microbatches: {words}"


def main(_):
    config = Config.from_dict(CONFIG.value)
    devices = planning.devices_of(TOPOLOGY.value)
    if SEARCH.value:
        found = _search(config, devices)
        if JSON.value:
            print(to_json({"plans": found}))
            return 0 if "error" not in found[0] else 1
        best = found[0]
    else:
        best = planning.plan(config, TOPOLOGY.value, devices)
        if JSON.value:
            print(to_json(best))
            return 1 if "error" in best else 0
    _show(best)
    return 1 if "error" in best else 0


if __name__ == "__main__":
    cli.run(main)
