"""Trains several programs under a stated match, with several seeds, and compares them.

    python -m experiments.compare --config=configs/studies/language.py [--dry_run]
    python -m experiments.compare --config=configs/studies/language.py --only=yoco_u,yoco --seeds=5

The study is a file with `get_config()`, the settings of its reference, and STUDY
(yocou_jax/study.py). The accounting finds the sizes of the other entries, and an entry that cannot
match is an error. If a study has several learning rates, seed 0 of each entry runs at them, and the
seeds that count at the best of them. Each run is a process of `experiments.train`, one after the
other, in a workdir of its own. A run that fails does not end the others (exit code 1).

The command can be killed at any time. The same command again resumes the run that was not finished,
skips those that were, and makes those that failed again. After each run, these are written anew:
the results (--out, by default results/DEVICE/studies/ and the name of the workdir), a figure next
to them and in TensorBoard, and the page report.html in the workdir, which needs no other file.
Flags change the settings of all entries (--config.run.steps=1000); then give another --workdir.
"""

import dataclasses
import runpy
import shlex
import signal
import sys
from pathlib import Path

from absl import flags

from benchmarks.report import Grid, console, output_file, plain_name, table
from experiments import child, cli
from yocou_jax import plots  # noqa: F401  it needs matplotlib: fail now, and not after hours
from yocou_jax.config import Config
from yocou_jax.errors import UserError, shown
from yocou_jax.evaluation import report as tables
from yocou_jax.evaluation.compare import Comparison, Spec, overrides
from yocou_jax.evaluation.findings import report
from yocou_jax.files import expand_path
from yocou_jax.study import Study, check_changes
from yocou_jax.training.events import Events
from yocou_jax.training.preemption import EXIT_PREEMPTED

CONFIG = cli.config_file(None, "The study, a file such as configs/studies/language.py.")
ONLY = flags.DEFINE_list("only", [], "Names of entries to train. Default: all.")
SEEDS = flags.DEFINE_integer("seeds", None, "How many. Default: those of the study.", lower_bound=1)
RATES = flags.DEFINE_list("learning_rates", None, "To try. Default: those of the study.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan only.")
WORKDIR = flags.DEFINE_string("workdir", None, "For all runs. Default: runs/compare/<study>.")
OUT = flags.DEFINE_string("out", None, "File for the results (.json). The figure is next to it.")
flags.mark_flag_as_required("config")


class Runner:
    """Runs the commands of a study, and writes its results after each of them.

    file: what --config says. text: its docstring. settings: makes its settings, without flags.
    """

    def __init__(self, file: str, text: str, settings, comparison: Comparison):
        self.file, self.text, self.settings, self.comparison = file, text, settings, comparison
        self.out = output_file("out", OUT.value, ("json",))
        self.events: Events | None = None

    def command(self, spec: Spec) -> list[str]:
        changes = overrides(self.settings(), spec.config)
        return ["experiments.train", f"--config={self.file}", *changes, f"--workdir={spec.workdir}"]

    def train(self, spec: Spec) -> None:
        child.run(self.command(spec), spec)

    def evaluate(self, spec: Spec, task: str, options: tuple[str, ...]) -> None:
        words = [f"--workdir={spec.workdir}", f"--task={task}", *options]
        child.run(["experiments.evaluate", *words], spec)

    def changed(self) -> list[str]:
        """The flags that make other settings than those of the file."""
        given = ("--config.", "--seeds", "--learning_rates")
        return [word for word in sys.argv[1:] if word.startswith(given)]

    def ended(self, spec: Spec) -> None:
        print(f"{spec.name}: {self.comparison.outcome(spec)}", flush=True)
        self.write()

    def write(self) -> dict:
        """Writes the results, if there are any, and returns them."""
        comparison, python = self.comparison, ["python", "-m"]
        first = [comparison.first(name) for name in comparison.twins]
        found = report(comparison) | {
            "study": self.file,
            "changed": self.changed(),
            "text": self.text,
            "command": cli.command(),
            "commands": {s.entry: shlex.join([*python, *self.command(s)]) for s in first},
        }
        if found["environments"]:
            device = plain_name(found["environments"][0]["device"]["kind"])
            # The name of the folder, because flags may make another study from the same file.
            name = f"{comparison.folder.name}.json"
            self.events = self.events or Events(comparison.folder)
            out = self.out or Path("results") / device / "studies" / name
            tables.write(found, out, comparison.folder, self.events)
        return found


def stop(number, frame):
    sys.exit(EXIT_PREEMPTED)


def chosen(study: Study) -> Study:
    """The study with the learning rates of the flag."""
    try:
        rates = None if RATES.value is None else tuple(map(float, RATES.value))
    except ValueError as error:
        given = f"--learning_rates={','.join(RATES.value)}"
        raise UserError(f"{shown(given)} must be numbers with commas between.") from error
    return study if rates is None else dataclasses.replace(study, learning_rates=rates)


def main(_):
    cli.refuse_empty(WORKDIR)
    name = flags.FLAGS["config"].config_filename
    file, colon, preset = name.partition(":")
    module = runpy.run_path(str(expand_path(file)))
    if not isinstance(module.get("STUDY"), Study):
        raise UserError(f"The file {shown(file)} has no STUDY (yocou_jax/study.py).")

    def settings():
        return module["get_config"](*([preset] if colon else []))

    study, base = chosen(module["STUDY"]), Config.from_dict(CONFIG.value)
    check_changes(study, Config.from_dict(settings()), base)
    folder = expand_path(WORKDIR.value or f"runs/compare/{Path(file).stem}")
    comparison = Comparison(study, base, folder, SEEDS.value)
    comparison.check_entries(ONLY.value)
    runner, screen = Runner(name, module.get("__doc__") or "", settings, comparison), console(160)
    screen.print(table(Grid(*tables.plan(comparison, ONLY.value))))
    if DRY_RUN.value:
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    comparison.train(runner.train, runner.evaluate, runner.ended, ONLY.value)
    found = runner.write()
    for made in tables.tables(found)[:2]:
        screen.print(table(Grid(*made)))
    print(f"The report: {folder}/report.html")
    return 1 if any(entry["failures"] for entry in found["entries"].values()) else 0


if __name__ == "__main__":
    cli.run(main)
