"""The request to stop a run: after a signal or a preemption it ends its step, saves and exits."""

import contextlib
import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75  # EX_TEMPFAIL, "try again": the exit code of a run that was asked to stop
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_S = 0.5  # within it, a shell or a launcher may send the same signal a second time


class StopRequest:
    """Turns SIGTERM, SIGHUP and Ctrl-C into a flag that the run reads after each step, so that it
    can save and exit.

        with StopRequest() as stop:
            ...
            if stop.reached(step): save, close, exit with EXIT_PREEMPTED

    The first signal prints a line on stderr immediately, and a later Ctrl-C ends the process
    immediately. A thread does this, because Python runs a handler only between two of its own
    instructions, and a step or a compilation may take minutes. A signal that was ignored (SIGHUP
    under nohup) stays ignored. With several processes, only SIGTERM counts. It may reach only one
    of them; with jax's preemption service, `reached` is True in all of them at the same step.
    """

    def __enter__(self) -> "StopRequest":
        self._requested = False
        self._service = jax.process_count() > 1
        # Python allows handlers only in the main thread. In other threads, a signal ends the run.
        main = threading.current_thread() is threading.main_thread()
        self._installed = main and not self._service
        if self._installed:
            # C code of Python writes the number of each signal into this pipe when it arrives.
            self._read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            self._wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
            taken = [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._on_signal) for s in taken}
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._installed:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write_end)  # this ends the thread

    def _on_signal(self, number, frame) -> None:
        self._requested = True

    def _watch(self) -> None:
        """Reacts to signals while the main thread is busy."""
        first = None
        while received := os.read(self._read_end, 1):
            number, now = received[0], time.monotonic()
            if number not in self._before:
                continue
            if first is None:
                first, self._requested = now, True
                _say(
                    f"{signal.Signals(number).name}: the run saves and stops after this step. "
                    "Ctrl-C after this message ends it immediately, without saving."
                )
            elif number == signal.SIGINT and now - first > SAME_REQUEST_S:
                os._exit(128 + number)
        os.close(self._read_end)

    def reached(self, step: int) -> bool:
        """True if the run must save and stop. Every process calls it at every step."""
        if self._service:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested


def _say(text: str) -> None:
    """Writes a line to stderr without buffers and locks. A live line is drawn again below it."""
    with contextlib.suppress(OSError):  # SIGHUP says that the terminal was closed
        clear = "\r\x1b[2K" if os.isatty(2) else ""
        os.write(2, f"{clear}{text}\n".encode())
