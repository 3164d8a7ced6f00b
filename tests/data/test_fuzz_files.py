"""Tries a few hundred random data files. `python -m tests.data.fuzz_files` can try more."""

import re

import pytest

from tests.data import fuzz_files
from yocou_jax.data import formats


def test_random_files_are_read_as_meant_or_refused():
    ends, failures = fuzz_files.run(seed=1, numbers=range(250))
    assert not failures, "\n".join(failures[:3])
    assert sum(count for (_, end), count in ends.items() if end == "loaded") > 100
    assert sum(count for (_, end), count in ends.items() if end == "refused") > 50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COMPRESSED", re.compile(rb"(?!)")),
        ("BOM", b"\0"),
        ("_looks_like_rows", lambda *_: False),
    ],
)
def test_the_cases_find_a_file_that_is_misread(monkeypatch, name, value):
    monkeypatch.setattr(formats, name, value)
    _, failures = fuzz_files.run(seed=0, numbers=range(60))
    assert failures
