"""Which differences between two trees are found; nothing is trained here."""

from pathlib import Path

from benchmarks import same_numbers
from yocou_jax.program import ARCHITECTURES

ROOT = Path(__file__).parent.parent.parent


def test_a_figure_that_differs_or_is_missing_is_seen():
    here = {"loss": 1.0, "nan": float("nan"), "count": 1, "text": "a", "new": 2}
    there = {"loss": 1.0 + 2**-52, "nan": float("nan"), "count": 1.0, "text": "a", "old": None}
    found = same_numbers.differences(here, there)
    assert found.keys() == {"loss", "count", "new", "old"}
    assert found["new"] == (2, "(none)")
    assert same_numbers.differences(here, here) == {}


def test_a_case_that_fails_is_not_the_same(monkeypatch):
    monkeypatch.setattr(same_numbers, "checkout", lambda revision, folder: folder.mkdir())
    monkeypatch.setattr(same_numbers, "_figures", lambda case, *_: {"loss": 1.0})
    assert not same_numbers.compare("x", ["yoco"], 5)["yoco"]["differ"]

    def fail(case, tree, home, steps):
        raise same_numbers.UserError("no such architecture")

    monkeypatch.setattr(same_numbers, "_figures", fail)
    assert same_numbers.compare("x", ["yoco"], 5)["yoco"]["differ"].keys() == {"fails"}


def test_every_architecture_is_a_case_and_fields_are_spelled_as_the_tree_has_them(tmp_path):
    assert set(ARCHITECTURES) < set(same_numbers.ALL)
    assert not any("," in name for name in same_numbers.ALL)  # --cases is a list of names
    here = same_numbers.overrides("bfloat16", ROOT, tmp_path, 5)
    assert "--config.compute.dtype=bfloat16" in here
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/base.py").write_text("m = c.model = ConfigDict()")
    there = same_numbers.overrides("bfloat16", tmp_path, tmp_path, 5)
    assert "--config.model.dtype=bfloat16" in there
