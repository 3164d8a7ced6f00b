"""A command in a process of its own, for `experiments.compare`."""

import contextlib
import subprocess
import time

from pallas_kernels import children
from yocou_jax.errors import UserError
from yocou_jax.evaluation.compare import RunFailed, Spec
from yocou_jax.files import write_atomically
from yocou_jax.training.preemption import EXIT_PREEMPTED

LONGEST_S = 30 * 24 * 3600
NOTE_S = 30  # the clock is written this often, so a kill loses no more


def run(words: list[str], spec: Spec) -> None:
    """Runs `python -m words`, which prints to the log of the run `spec`. Its time is added to the
    clock of the run.

    If this process is asked to stop, it asks the other to save and stop. Raises RunFailed if the
    command failed, and UserError if somebody else has asked it to stop.
    """
    with spec.log.open("ab") as file:
        child = subprocess.Popen(
            children.bound(["-m", *words], LONGEST_S),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches only this process
        )
        start = time.monotonic() - spec.seconds

        def note() -> None:
            write_atomically(spec.clock, f"{time.monotonic() - start:.1f}\n")

        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(NOTE_S)
                note()
        except BaseException:
            child.terminate()
            child.wait()
            note()
            raise
    if child.returncode == EXIT_PREEMPTED:
        raise UserError(f"The run of {spec.log} was asked to stop. The same command goes on.")
    if child.returncode:
        lines = spec.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        raise RunFailed(f"exit code {child.returncode}, see {spec.log}: {last[:300]}")
