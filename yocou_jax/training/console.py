"""Shows a run on the terminal: a banner, one live line, notices and samples."""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping

import rich.box
import rich.console
import rich.live
import rich.panel
import rich.table
import rich.text

from yocou_jax.training.metrics import BPB, LOOPS, LOSS, MFU, TOKENS_PER_S, VAL_BPB, VAL_LOSS
from yocou_jax.training.reporter import Reporter

log = logging.getLogger(__name__)


def _never_ends_a_run(show: Callable) -> Callable:
    """Decorates a method of Console, so that an error of the terminal does not end the run. The log
    says so once, and nothing more is shown. Such errors: the terminal was closed, the reader of the
    pipe has ended, the encoding lacks a character."""

    @functools.wraps(show)
    def guarded(self, *args, **kwargs) -> None:
        if self._lost:
            return
        try:
            show(self, *args, **kwargs)
        except (OSError, ValueError, SystemExit) as error:  # rich exits on a broken pipe
            self._lost = True
            with contextlib.suppress(OSError, ValueError):
                why = "the reader of the pipe has ended" if isinstance(error, SystemExit) else error
                log.warning("Nothing more is shown here (%s). The run continues.", why)

    return guarded


class Console(Reporter):
    """Shows a run on the terminal: a banner, one live line, and notices and samples above it.

    On a terminal the live line is redrawn in place. Elsewhere (a log file, CI) it is printed as a
    plain line: at the first step, at the last step, and at most every `plain_every_s` seconds
    between them. An error of the terminal never ends a run.
    """

    def __init__(self, console: rich.console.Console | None = None, *, plain_every_s: float = 10.0):
        self.console = console or rich.console.Console()
        self._plain_every_s = plain_every_s
        self._live: rich.live.Live | None = None
        self._total = 0
        self._first: tuple[int, float] | None = None
        self._printed_at = -math.inf
        self._lost = False

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @_never_ends_a_run
    def banner(self, title: str, sections: Mapping[str, Mapping[str, object]]) -> None:
        """Prints sections of keys and values. Integers have thousands separators."""
        table = rich.table.Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for i, (name, rows) in enumerate(sections.items()):
            if i:
                table.add_row()
            table.add_row(rich.text.Text(name, style="bold cyan"))
            for key, value in rows.items():
                table.add_row(rich.text.Text(f"  {key}"), rich.text.Text(show(value)))
        self.console.print(rich.panel.Panel(table, title=title, title_align="left", expand=False))

    @_never_ends_a_run
    def start(self, total_steps: int) -> None:
        """Starts the live line of a run that ends at `total_steps`."""
        self._total, self._first = total_steps, None
        if self.console.is_terminal:
            self._live = rich.live.Live(console=self.console, refresh_per_second=4)
            self._live.start()
            self.console.show_cursor(True)  # rich hides it, and a killed run cannot show it again

    @_never_ends_a_run
    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Shows the step, and if known: loops, loss, bits/byte, tokens/s, MFU, remaining time."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        line = self._line(step, values, now)
        if self._live is not None:
            self._live.update(rich.text.Text(line, no_wrap=True, overflow="ellipsis"))
        elif step >= self._total or now - self._printed_at >= self._plain_every_s:
            self._printed_at = now
            self._print(line)

    @_never_ends_a_run
    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the result of the validation above the live line."""
        if VAL_LOSS in values:
            prefix = f"{VAL_LOSS}_loops_"
            counts = [
                f"{value:.4f} with {name.removeprefix(prefix)}"
                for name, value in values.items()
                if name.startswith(prefix)
            ]
            self._print(
                f"step {step}: validation loss {values[VAL_LOSS]:.4f} nats/token, "
                f"{values[VAL_BPB]:.4f} bits/byte"
                + (f"; {', '.join(counts)} loops" if counts else "")
            )

    @_never_ends_a_run
    def notice(self, text: str) -> None:
        """Prints a sentence above the live line."""
        self._print(text)

    @_never_ends_a_run
    def sample(self, text: str, title: str) -> None:
        """Prints generated text, unchanged, above the live line."""
        self.console.print(
            rich.panel.Panel(rich.text.Text(text), title=title, title_align="left", style="dim")
        )

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError, ValueError, SystemExit):
                live.stop()

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, step: int, values: Mapping[str, float | None], now: float) -> str:
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}"]
        for name, form in _LINE:
            if (value := values.get(name)) is not None:
                parts.append(form.format(float(value)))
        first_step, first_time = self._first
        if step > first_step:  # the first interval includes compilation, so it does not count
            left = (now - first_time) / (step - first_step) * max(self._total - step, 0)
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)


_LINE = (
    (LOOPS, "loops {:.0f}"),
    (LOSS, "loss {:.3f}"),
    (BPB, "{:.3f} bits/byte"),
    (TOKENS_PER_S, "{:,.0f} tokens/s"),
    (MFU, "MFU {:.1%}"),
)


def show(value: object) -> str:
    """A number with thousands separators, a float with 4 digits. Other values: their str()."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
