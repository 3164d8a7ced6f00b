"""Trains one model: the main command.

    python -m experiments.train --config=configs/yocou_small.py
    python -m experiments.train --config=configs/yocou_small.py:rins --config.model.num_loops=5

The same command again resumes the run from the newest checkpoint in --workdir. With a larger
run.steps the run becomes longer. --init_from=runs/a starts a new run with the parameters of another
run. On several hosts, start the command once on each host, with --distributed. On a TPU pod this is
all; elsewhere, --coordinator, --num_processes and --process_id are needed too.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from pathlib import Path

from absl import flags
from rich.console import Console as Terminal

from experiments import cli
from yocou_jax.config import Config
from yocou_jax.errors import UserError
from yocou_jax.files import expand_path

CONFIG = cli.config_file(None, "Config file, optionally with :architecture.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run. Default: runs/<config name>.")
INIT_FROM = flags.DEFINE_string(
    "init_from", None, "Workdir or exported folder. A new run starts with its parameters."
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of this run.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "Address of process 0, host:port.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of this run.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
flags.mark_flag_as_required("config")


# Seconds to wait for the other hosts. One with accelerators may still check its kernels.
JOIN_S, JOIN_CHECKED_S = 300, 3600


FAILED = "This process stops because of the error above, and so do the others."
LOST = (
    "This process stops, because another one died, cannot be reached or failed in the same way. "
    "Start all of them again with the same command: the run resumes from its last checkpoint."
)


def default_workdir(config_file: str) -> Path:
    """configs/yocou_small.py:rins -> runs/yocou_small-rins."""
    path, _, preset = config_file.partition(":")
    return Path("runs") / (Path(path).stem + (f"-{preset}" if preset else ""))


def join() -> None:
    """Joins the other processes of the run."""
    import jax

    from pallas_kernels import verdicts

    # If another process dies, jax's runtime aborts this one. Its last words say so, and a dump of
    # Python's stacks would hide them.
    faulthandler.disable()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # only CPUs read it
    try:
        jax.distributed.initialize(
            *(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value),
            initialization_timeout=JOIN_CHECKED_S if verdicts.accelerators() else JOIN_S,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "--distributed could not join the other processes; outside a TPU pod or a cluster "
            f"give --coordinator, --num_processes and --process_id too ({error})."
        ) from error


def main(_):
    cli.refuse_empty(WORKDIR, INIT_FROM)
    # Before training begins, there is nothing to save, so Ctrl-C ends the process as SIGTERM does.
    # Python's KeyboardInterrupt may arrive inside an import, and would print a stack trace.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import jax

    from experiments import process
    from yocou_jax.training.console import Console, duration
    from yocou_jax.training.loop import Run
    from yocou_jax.training.preemption import EXIT_PREEMPTED

    process.keep_freed_memory()
    process.check_kernels(CONFIG.value.compute.attention)
    if DISTRIBUTED.value:
        join()
    config = Config.from_dict(CONFIG.value)
    process.keep_compiled_programs(config.data.cache_dir)
    config_file = flags.FLAGS["config"].config_filename
    workdir = expand_path(WORKDIR.value or default_workdir(config_file))
    # Only process 0 prints, because the others would print the same.
    with Console(Terminal(quiet=jax.process_index() > 0)) as console:
        try:
            summary = Run(config, workdir, console, init_from=INIT_FROM.value).train()
        except Exception as error:
            if jax.process_count() == 1:
                raise
            # The others wait for this process in a collective, so it must end, and at once.
            console.close()
            if (sentence := cli.explained(error)) is not None:
                process.end_alone(sentence, cli.EXIT_USER_ERROR)
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exc()
            process.end_alone(LOST if isinstance(error, jax.errors.JaxRuntimeError) else FAILED)
        if summary is None:
            return EXIT_PREEMPTED
        # The path of this Python, because `python` may be another one or missing on PATH.
        python = os.path.relpath(sys.executable)
        python = sys.executable if python.startswith("..") else python
        file, _, preset = config_file.partition(":")
        other = "yoco_u" if preset == "transformer" else "transformer"
        # A value that is not finite is None in the summary of an earlier run.
        loss, bits = (
            "not finite" if summary[name] is None else f"{summary[name]:.4f}"
            for name in ("val_loss", "val_bpb")
        )
        console.notice(
            f"Finished in {duration(summary['wall_s'])}: validation {loss} nats/token, {bits} "
            f"bits/byte after {summary['tokens']:,} tokens.\n"
            f"Metrics and summary: {workdir}/metrics.jsonl, {workdir}/summary.json\n"
            f"See the curves:      {python} -m tensorboard.main --logdir={workdir.parent}\n"
            f"Train its sibling:   {python} -m experiments.train --config={file}:{other}"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
