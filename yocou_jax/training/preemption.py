"""The request to stop: signals and preemption, answered once the step in hand is done and saved."""

import contextlib
import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75  # EX_TEMPFAIL, "try again": the exit code of a run that was asked to stop
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_S = 0.5  # a shell or a launcher may pass on a signal that the process has already


class StopRequest:
    """Turns SIGTERM, SIGHUP and Ctrl-C into a question asked after each step: the run can save and
    exit.

        with StopRequest() as stop:
            ...
            if stop.reached(step): save, close, exit with EXIT_PREEMPTED

    The first signal is answered at once on stderr, and a later Ctrl-C ends the process at once:
    Python itself runs a handler only between two of its own instructions, and a step or a
    compilation may take minutes. A signal that was ignored (SIGHUP under nohup) stays ignored. With
    several processes SIGTERM alone is taken: it may reach one of them only, and jax's preemption
    service lets all of them answer True at the same step.
    """

    def __enter__(self) -> "StopRequest":
        self._requested = False
        self._service = jax.process_count() > 1
        # Python allows handlers in the main thread only: elsewhere a signal just ends the run.
        main = threading.current_thread() is threading.main_thread()
        self._installed = main and not self._service
        if self._installed:
            # C code writes the number of each signal into this pipe when it comes.
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
            os.close(self._write_end)  # which ends the thread

    def _on_signal(self, number, frame) -> None:
        self._requested = True

    def _watch(self) -> None:
        """Answers signals while the main thread is busy."""
        first = None
        while received := os.read(self._read_end, 1):
            number, now = received[0], time.monotonic()
            if number not in self._before:
                continue
            if first is None:
                first, self._requested = now, True
                _say(
                    f"{signal.Signals(number).name}: the run stops and saves once this step is "
                    "done. Ctrl-C after this ends it at once, without saving."
                )
            elif number == signal.SIGINT and now - first > SAME_REQUEST_S:
                os._exit(128 + number)
        os.close(self._read_end)

    def reached(self, step: int) -> bool:
        """True once it is time to save and stop; every process calls it at every step."""
        if self._service:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested


def _say(text: str) -> None:
    """A line on stderr past all buffers and locks; a live line on the screen is drawn below it."""
    with contextlib.suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
        clear = "\r\x1b[2K" if os.isatty(2) else ""
        os.write(2, f"{clear}{text}\n".encode())
