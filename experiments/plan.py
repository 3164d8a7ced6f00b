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

--inference plans prefill, a chunk at a time, and one step of decode instead.
Exit code 1: a program does not fit into the memory of a device.
"""

import sys

from absl import flags

from benchmarks import plan as planning
from benchmarks import plan_report
from benchmarks.plan_inference import plan_inference
from benchmarks.plan_report import in_seconds, mesh_of
from benchmarks.plan_search import search
from benchmarks.report import Grid, console, table
from experiments import cli
from yocou_jax.config import Config
from yocou_jax.errors import UserError

CONFIG = cli.config_file("configs/yocou_1b.py", "What to train.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Device and shape, as v5e:16x16.", required=True)
SEARCH = flags.DEFINE_bool("search", False, "Try several meshes, remat and microbatches.")
TRIES = flags.DEFINE_integer("tries", 6, "How many --search compiles.", lower_bound=1)
INFERENCE = flags.DEFINE_bool(
    "inference", False, "Plan prefill and decode of data.batch_size rows of data.sequence_length."
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


def _say(option: Config, found: dict | Exception) -> None:
    if isinstance(found, Exception):
        print(f"{option.mesh} was left out: {found}", file=sys.stderr)
    elif not JSON.value:
        print(_line(found), flush=True)


def _line(found: dict) -> str:
    step = found.get("at_least", {}).get("step")
    words = "does not fit" if "error" in found else f"at least {in_seconds(step)}"
    parts = found["accumulation_steps"]
    return f"{mesh_of(found)}, remat {found['remat']}, {parts} microbatches: {words}"


def _show(grids: list[Grid]) -> None:
    out = console(120)
    for grid in grids:
        out.print(table(grid))


def main(_):
    if INFERENCE.value and SEARCH.value:
        raise UserError("--search tries meshes for training: leave out --inference.")
    if INFERENCE.value:
        CONFIG.value.optimizer.accumulation_steps = 1  # it would have to divide the batch
    config = Config.from_dict(CONFIG.value)
    devices = planning.devices_of(TOPOLOGY.value)
    if INFERENCE.value:
        shown = found = plan_inference(config, TOPOLOGY.value, devices)
        grids = plan_report.inference(found)
        fits = all("error" not in row for row in found["programs"].values())
    else:
        plans = None
        if SEARCH.value:
            plans = search(config, TOPOLOGY.value, devices, TRIES.value, _say)
        found = plans[0] if plans else planning.plan(config, TOPOLOGY.value, devices)
        shown = {"plans": plans} if plans else found
        grids, fits = plan_report.training(found), "error" not in found
    if JSON.value:
        cli.print_json(shown)
    else:
        _show(grids)
    return 0 if fits else 1


if __name__ == "__main__":
    cli.run(main)
