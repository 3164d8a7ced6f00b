"""A line every few seconds about work that may take long; work that is done sooner says nothing."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

SECONDS = 5.0  # between two lines, and before the first
log = logging.getLogger(__name__)
Item = TypeVar("Item")


def with_progress(
    items: Iterable[Item], what: str, size: Callable[[Item], int], total: int | None = None
) -> Iterator[Item]:
    """The same items; logs, say, "Tokenising python: 12.3 MB of 40.1 MB." (sizes in bytes)."""
    done, last = 0, time.monotonic()
    for item in items:
        yield item
        done += size(item)
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            of = "" if total is None else f" of {total / 1e6:.1f} MB"
            log.info("%s: %.1f MB%s.", what, done / 1e6, of)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Says that the work of the block still goes on, where it cannot be counted: "Hashing x: 10 s."

    A thread says it, because the work may be one call of a library.
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
