import io
import sys

import pytest


@pytest.fixture
def typed(monkeypatch):
    def type_(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return type_
