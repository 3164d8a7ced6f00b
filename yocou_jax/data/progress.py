"""A line every few seconds from loops that may take long; loops that do not say nothing."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
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
