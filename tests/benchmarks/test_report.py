"""Tables, pages and their files."""

import io

import pytest
from rich.console import Console

from benchmarks import report
from yocou_jax.errors import UserError

GRID = report.Grid("title", ["name", "n"], [["a", "1"], ["b", "1,234"]], texts=1)


def test_numbers_are_aligned_at_the_right():
    out = io.StringIO()
    Console(file=out, width=40).print(report.table(GRID))
    title, *lines = (line.rstrip() for line in out.getvalue().splitlines())
    assert title == "title"
    assert lines[3:5] == ["│ a    │     1 │", "│ b    │ 1,234 │"]


def test_a_page_has_no_heading_without_entries():
    page = report.page("t", ["one", "two"], [GRID], [("Failed", []), ("Left out", ["x", "y"])])
    assert page == (
        "# t\n\none\n\ntwo\n\n## title\n\n| name | n |\n| --- | --- |\n| a | 1 |\n| b | 1,234 |\n"
        "\n## Left out\n\n* x\n* y\n"
    )
    grid = report.Grid("title", ["a|b"], [["`window*1 | cross*1`"]])
    assert r"| a\|b |" in report.page("t", [], [grid], [])
    assert r"| `window*1 \| cross*1` |" in report.page("t", [], [grid], [])


def test_files_that_cannot_be_written_are_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"--plot=/no/such/folder/x\.png must be"):
        report.output_file("plot", "/no/such/folder/x.png", ("png",))
    with pytest.raises(UserError, match=r"x\.foo must be a file .* of the kinds pdf, png\."):
        report.output_file("plot", "x.foo", ("png", "pdf"))
    assert report.output_file("plot", None, ("png",)) is None
    (tmp_path / "file").write_text("")
    for name in ("file", "file/folder"):
        with pytest.raises(UserError, match=f"--out={tmp_path}/{name} is not a folder"):
            report.output_folder(str(tmp_path / name))
    assert report.output_folder(str(tmp_path / "new" / "folder")).is_dir()
