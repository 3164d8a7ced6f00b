"""The other process of a comparison: how it is started, asked and ended."""

import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from yocou_jax.errors import UserError

CHILD = Path(__file__).with_name("child.py")
LIMIT_S = 900.0  # of one answer: torch.compile of a large model takes minutes


class Peer:
    """A process that runs child.py with the Python of some environment.

    It is a process of its own, because the thread pools of two libraries in one process disturb
    each other. It uses `threads` threads, and sleeps while it is not asked.

    Raises UserError if `python` cannot be run, or lacks one of `packages`.
    """

    def __init__(self, python: str, packages: tuple[str, ...], threads: int):
        self.python, self.packages = python, packages
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - what PyTorch prints
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        try:
            self.process = subprocess.Popen(
                [python, str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                env=environment,
                text=True,
            )
        except OSError as error:
            self.log.close()
            raise UserError(f"--peer={python} cannot be run: {error.strerror}.") from error
        try:
            self.versions = self.ask("start", packages=packages, threads=threads)
        except BaseException:
            self.close()
            raise

    def ask(self, call: str, **arguments: Any) -> Any:
        """What the function `call` of child.py returns. Raises RuntimeError with the stack trace of
        the child if it fails there, and if it gives no answer within LIMIT_S."""
        late = threading.Event()

        def stop():
            late.set()  # first: who sees the process end must see why
            self.process.kill()

        alarm = threading.Timer(LIMIT_S, stop)
        alarm.start()
        try:
            print(
                json.dumps({"call": call, "arguments": arguments}),
                file=self.process.stdin,
                flush=True,
            )
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            code = self.process.wait()
            why = f"no answer to {call} in {LIMIT_S:g} s" if late.is_set() else f"exit code {code}"
            self.log.seek(0)
            raise RuntimeError(
                f"{self.python} has ended: {why}. Its last words: {self.log.read()[-2000:]}"
            )
        answer = json.loads(line)
        if answer.get("missing") in self.packages:
            raise UserError(
                f"--peer needs {answer['missing']}, which is not installed for {self.python}. "
                f"Install it (pip install {' '.join(self.packages)}), best in an environment of "
                "its own, and name the Python of that environment: --peer=PATH."
            )
        if "error" in answer:
            raise RuntimeError(f"{call} failed in {self.python}:\n{answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error) -> None:
        self.close()
