"""Long work logs a line every few seconds. Work that takes less time logs nothing."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

SECONDS = 5.0  # between two lines, and before the first
log = logging.getLogger(__name__)
Item = TypeVar("Item")


def teller(what: str, total: int | None = None) -> Callable[[int], None]:
    """A function that is told how many bytes were done since its last call. It logs lines such as
    "Tokenizing python: 12.3 MB of 40.1 MB."."""
    done, last = 0, time.monotonic()

    def add(size: int) -> None:
        nonlocal done, last
        done += size
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            of = "" if total is None else f" of {total / 1e6:.1f} MB"
            log.info("%s: %.1f MB%s.", what, done / 1e6, of)

    return add


def with_progress(
    items: Iterable[Item], what: str, size: Callable[[Item], int], total: int | None = None
) -> Iterator[Item]:
    """Yields the items, and logs as `teller` does (`size` is in bytes)."""
    add = teller(what, total)
    for item in items:
        yield item
        add(size(item))


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Logs "Hashing x: 10 s." while the block runs, for work without a progress to count.

    A thread logs the line, because the work may be a single call of a library.
    """
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(SECONDS):
            log.info("%s: %.0f s.", what, time.monotonic() - start)

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
