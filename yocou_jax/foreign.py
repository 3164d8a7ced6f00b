"""Facts that other packages give only in the text of an error, not in its type or attributes.

Every such text is in this file. tests/test_foreign.py compares each with what the installed version
of the package says.
"""

import errno
import os
import re

# absl: the flag with the nearest name, in an UnrecognizedFlagError.
NEAREST_FLAG = re.compile(r"Did you mean: ([\w-]+)")
# absl: a required flag that is not given, in an IllegalFlagValueError.
REQUIRED_FLAG = re.compile(r"flag --(\w+)=None: .*must have a value")
# Where a disk, a quota or the largest size of a file is used up, in the system's words.
NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


def refused_flag(text: str, reason: BaseException) -> str:
    """The refused flag as --name=value. text: the message of absl's IllegalFlagValueError. reason:
    the error that the parser of the flag raised."""
    return text.removeprefix("flag ").removesuffix(f": {reason}")


def no_room(error: BaseException) -> str | None:
    """Why nothing more can be written, from one of TensorStore's errors of hundreds of lines."""
    return next((words for words in NO_ROOM if words in str(error)), None)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# XLA, by platform: "Out of memory allocating 80 bytes" (CPU), "... trying to allocate 1.50GiB"
# (GPU), "Attempting to allocate 8.00G" and, while it compiles, "Used 33.25G of 15.75G hbm" (TPU).
_ASKED = re.compile(
    r"(?:allocat\w+|Used) (\d+(?:\.\d+)?)(?![\d.]*\d) ?([KMGT]?)(?:i?B|ytes| bytes|\b)"
)


def asked_bytes(error: BaseException) -> float | None:
    """The bytes that an allocation or a program asked for, from an error of `out_of_memory`."""
    found = _ASKED.search(str(error))
    return float(found[1]) * _UNITS[found[2]] if found else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or (an error of XLA) on a device."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or "RESOURCE_EXHAUSTED" in text
        or "out of memory" in text.lower()
    )
