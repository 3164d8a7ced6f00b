"""Measures what a trained model can do.

    python -m experiments.evaluate --workdir=runs/yocou_small --task=perplexity
    python -m experiments.evaluate --workdir=runs/yocou_small --task=loops --loops=1,2,3,4,6,8
    python -m experiments.evaluate --workdir=exported/yocou_small --task=perplexity --source="books/*.txt"

The tasks:

perplexity  The loss on a text, in nats per token and bits per byte; by position in the sequence;
            and of the last 512 tokens of each sequence (or the last quarter) when the model sees
            more and more of the text before them. --lengths=2048,4096,8192 says how many tokens
            it sees, the last ones included; these may be more than in training.
loops       The depth curve: the loss when the loops run another number of times than in training.
inside      What happens inside the model and its loops: how far each layer turns the residual stream
            (Figure 8), the loss after each loop, whether a loop contracts (yocou_jax/analysis).
            --samples sequences are one batch (default: 8).
hops        p-hop induction: the share of right answers, and by how far back an answer is.
needle      Needles in haystacks (RULER): the share of numbers that are found, by depth and length.
harness     Tasks of EleutherAI's lm-evaluation-harness (pip install -r requirements/harness.txt), --harness=arc_easy,piqa.
            python_docs is one of our own, which needs no network: which sentence describes this
            function of Python's standard library?

The text is the held-out split of the run, the same documents as in training. --source names another
text or corpus, as --config.data.source does in training; all of its documents count. --samples
sequences are read (default: as many as in the validation of the run). An exported folder has no
text, so it needs --source. All tasks compute every layer at every position, if they do not generate text.
A flag that the task does not read is an error.
hops and needle write texts of their own: --source="hops(p=2)" or "needle(kind=text)" says which.

Results are shown, and written to WORKDIR/evaluation/TASK.json and TASK.png and to TensorBoard. No
other file is changed, so the run may still be training: the newest complete checkpoint is read.
"""  # noqa: E501

import signal
import sys

from absl import flags

from configs import base
from experiments import cli
from yocou_jax.errors import UserError, shown
from yocou_jax.evaluation.tasks import TASKS
from yocou_jax.files import expand_path

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run, or an exported folder.")
TASK = flags.DEFINE_string("task", None, f"What to measure: {', '.join(TASKS)}.")
STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint to read. Default: the newest.", lower_bound=0
)
LOOPS = flags.DEFINE_list("loops", None, "Loop counts. Default: as in training, or as in the task.")
SOURCE = flags.DEFINE_string("source", None, "Text. Default: the held-out split of the run.")
LENGTHS = flags.DEFINE_list("lengths", None, "Lengths in tokens. Default: as in training.")
SAMPLES = flags.DEFINE_integer("samples", None, "Number of sequences, or of questions.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of what a task draws.")
HARNESS = flags.DEFINE_list("harness", ["python_docs"], "Tasks of lm-evaluation-harness.")
FEW_SHOT = flags.DEFINE_integer(
    "few_shot", None, "Of harness: solved questions before each one. Default: as the task says."
)
END_OF_TEXT = flags.DEFINE_bool(
    "end_of_text", True, "Of harness: the end-of-text token comes before each text, as in training."
)
TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Devices that share each matrix of the model.", lower_bound=1
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
flags.mark_flags_as_required(["workdir", "task"])


def whole_numbers(flag: flags.FlagHolder) -> tuple[int, ...] | None:
    try:
        return None if flag.value is None else tuple(map(int, flag.value))
    except ValueError as error:
        given = f"--{flag.name}={','.join(flag.value)}"
        raise UserError(f"{shown(given)} must be whole numbers with commas between.") from error


def cell(value) -> str:
    """A number with four digits after the point, if it is not a whole number."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return "-" if value != value else f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show(report: dict) -> None:
    from benchmarks.report import Grid, console, table

    out = console(100)
    for name in ("program", "step", "trained_loops", "dtype", "source", "sequences", "length"):
        if report.get(name) is not None:
            line = f"{name.replace('_', ' '):<14} {report[name]}"
            out.print(line, markup=False, highlight=False)
    for title, rows in report["tables"].items():
        columns = [name.replace("_", " ") for name in rows[0]]
        cells = [[cell(value) for value in row.values()] for row in rows]
        out.print(f"\n{title}", markup=False, highlight=False)
        out.print(table(Grid("", columns, cells, texts=0)))


def main(_):
    cli.refuse_empty(WORKDIR)
    loops, lengths = whole_numbers(LOOPS), whole_numbers(LENGTHS)
    # There is nothing to save, so Ctrl-C ends the process as SIGTERM does: without a stack trace,
    # also in the middle of an import.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from experiments import process

    process.keep_freed_memory()
    process.check_kernels("auto")
    process.keep_compiled_programs(base.get_config().data.cache_dir)  # as in training
    from yocou_jax.config import MeshConfig
    from yocou_jax.evaluation.options import Options
    from yocou_jax.evaluation.results import evaluate, write
    from yocou_jax.sharding import make_mesh

    options = Options(
        folder=expand_path(WORKDIR.value),
        loops=loops,
        source=SOURCE.value,
        lengths=lengths,
        samples=SAMPLES.value,
        seed=SEED.value,
        harness=tuple(HARNESS.value),
        few_shot=FEW_SHOT.value,
        end_of_text=END_OF_TEXT.value,
    )
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=TENSOR.value))
    report = evaluate(TASK.value, options, mesh, STEP.value, cli.command())
    if JSON.value:
        cli.print_json(report)
    else:
        show(report)
    for path in write(report, options.folder):
        print(f"Wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
