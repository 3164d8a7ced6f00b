"""Runs a task on a trained model, and writes its report."""

import dataclasses
import importlib.util
import logging
from pathlib import Path

import jax
from jax.sharding import Mesh

from yocou_jax import manifest, pretrained
from yocou_jax.device_memory import memory_errors
from yocou_jax.errors import UserError
from yocou_jax.evaluation.options import Options, trained_counts
from yocou_jax.evaluation.tasks import TASKS
from yocou_jax.evaluation.text import LENGTH
from yocou_jax.files import to_json, write_atomically
from yocou_jax.model import resolve_compute
from yocou_jax.training.banner import kernels
from yocou_jax.training.events import Events

log = logging.getLogger(__name__)


def evaluate(
    task: str, options: Options, mesh: Mesh, step: int | None = None, command: str = ""
) -> dict:
    """The report of a task, as JSON values. It has the model, versions and device too.

    step: of the checkpoint, by default the newest undamaged one. command: how the user has asked.
    Nothing on disk is changed, so a run may still be training in the folder. Call it in a single
    process. Raises UserError for a task that does not exist or an option that it does not read, and
    the errors of `pretrained.load` and of the task.
    """
    if task not in TASKS:
        raise UserError(f"--task={task} is not one of {', '.join(TASKS)}.")
    _check_options(task, options)
    loaded = pretrained.load(options.folder, mesh, step)
    hints = ("shorter --lengths", "more devices with --tensor=", "a smaller model")
    with memory_errors(f"The task {task}", hints), jax.set_mesh(mesh):
        found = TASKS[task].run(loaded, mesh, options)
        shape, packing = (1, found.get("length", LENGTH)), found.get("packing", False)
        attention = kernels(loaded.config, loaded.compute, shape, packing)
        dtype = resolve_compute(loaded.compute).dtype.name
    config = {group: dataclasses.asdict(getattr(loaded, group)) for group in ("config", "compute")}
    config["model"] = config.pop("config")
    about = manifest.describe(
        config,
        tokenizer=loaded.tokenizer.fingerprint,
        task=task,
        command=command,
        folder=str(options.folder),
        program=str(loaded.config.program),
        step=loaded.step,
        trained_loops=trained_counts(loaded.config),
        dtype=dtype,
        attention=attention,
    )
    return about | found


def _check_options(task: str, options: Options) -> None:
    """Raises UserError for an option that would have no effect."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "folder" or value == field.default:
            continue
        readers = [name for name, other in TASKS.items() if field.name in other.reads]
        if task not in readers:
            raise UserError(
                f"The task {task} does not read --{field.name}. It is read by {', '.join(readers)}."
            )
        if field.name in TASKS[task].one and len(value) > 1:
            given = f"--{field.name}={','.join(map(str, value))}"
            raise UserError(f"{given} has {len(value)} values, but the task {task} takes one.")


def write(report: dict, folder: Path) -> list[Path]:
    """Writes evaluation/TASK.json and TASK.png in the folder. In a workdir, also TensorBoard events
    in evaluation/. Returns the paths of the files of evaluation/."""
    task, out = report["task"], folder / "evaluation"
    try:
        out.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{out} is not a folder, so the results cannot be written.") from error
    paths = [out / f"{task}.json"]
    write_atomically(paths[0], to_json(report, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("There is no figure: it needs matplotlib (pip install matplotlib).")
    elif (figure := TASKS[task].draw(report)) is not None:
        from yocou_jax import plots

        paths.append(out / f"{task}.png")
        plots.save(figure, paths[1])
    if (folder / manifest.FILE).exists():
        _tell_tensorboard(report, out, paths[1:])
    return paths


def _tell_tensorboard(report: dict, folder: Path, figures: list[Path]) -> None:
    """Not in the workdir itself: TensorBoard reads on only in the newest file of a folder, and
    would see nothing new of the run."""
    events, name = Events(folder), f"evaluation/{report['task']}"
    events.scalars(report["step"], {f"{name}/{key}": x for key, x in report["scalars"].items()})
    for figure in figures:
        events.picture(name, figure.read_bytes(), report["step"])
    events.close()
