"""Tables and the page of a comparison. All but `plan` need its report alone.

A difference is above 0 if the entry is better than the other one: lower, or higher where a claim
says so.
"""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from yocou_jax.evaluation import figure
from yocou_jax.evaluation.compare import Comparison
from yocou_jax.files import to_json, write_atomically
from yocou_jax.study import AXES
from yocou_jax.training.events import Events

TAG = "study/figure"  # in TensorBoard


class Table(NamedTuple):
    """A title, the names of the columns, and rows of text. The first column has words."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _interval(found: Mapping[str, Any] | None, form: str = ".4f") -> str:
    """A mean with its 95% interval, if it has one."""
    if found is None:
        return "-"
    mean = format(found["mean"], form)
    if found["low"] is None:
        return f"{mean} (n = {found['n']})"
    return f"{mean} [{found['low']:{form}}, {found['high']:{form}}] (n = {found['n']})"


def plan(comparison: Comparison, only: Iterable[str] = ()) -> Table:
    """The runs that are left, and how long they will take."""
    rows, total = [], 0.0
    for name in list(only) or comparison.twins:
        spec = comparison.first(name)
        amounts = (f"{AXES[a].amount(spec.config):,.4g}" for a in ("parameters", "tokens", "flops"))
        runs = len(comparison.sweep(name)) + len(comparison.seeds)
        left = runs - sum(map(comparison.has_ended, comparison.runs([name])))
        minutes = comparison.minutes(spec)
        total += left * (minutes or 0)
        words = "not known" if minutes is None else f"{left * minutes:.0f}"
        rows.append([name, str(spec.config.model.program), *amounts, f"{left} of {runs}", words])
    known = bool(comparison.records)
    time = f"about {total / 60:.1f} hours" if known else "the first run shows how long it takes"
    columns = ["entry", "program", "parameters", "tokens", "FLOPs", "runs left", "minutes"]
    return Table(f"Runs that are left: {time}", columns, rows)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Results, claims, the learning rates, and the sizes of the entries."""
    return [_results(report), _claims(report), _rates(report), _sizes(report)]


def _results(report: Mapping[str, Any]) -> Table:
    """A difference to the reference is written only next to the axes on which the two match."""
    rows = []
    for name, entry in report["entries"].items():
        equal = ", ".join(axis for axis in entry["matched"]) or "nothing"
        effect = (entry["difference"] or {}).get("smallest_effect")
        rows.append(
            [
                name,
                entry["program"],
                _interval(entry["mean"]),
                _interval(entry["difference"], "+.4f"),
                "-" if name == report["reference"] else equal,
                _number(effect),
            ]
        )
    columns = [
        *("entry", "program", report["metric"], f"lower than {report['reference']} by"),
        *("equal in", "smallest effect"),
    ]
    return Table("Means over seeds with 95% intervals", columns, rows)


def _claims(report: Mapping[str, Any]) -> Table:
    rows = []
    for claim in report["claims"]:
        low, high = claim["expected"]
        other = claim["metric"] != report["metric"]
        relation = "above" if claim["more"] else "below"
        below = "" if claim["against"] is None else f" {relation} {claim['against']}"
        words = f"{claim['better']} {relation} {claim['worse']} ({claim['source']})"
        rows.append(
            [
                (f"{words}, {claim['metric']}" if other else words) + below,
                ", ".join(claim["match"]),
                f"{low:+g} to {high:+g}",
                _interval(claim["difference"], "+.4f"),
                _number((claim["difference"] or {}).get("smallest_effect")),
                claim["verdict"],
                "; ".join([*claim["doubts"], *claim["remarks"]]),
            ]
        )
    columns = [
        *("claim", "at equal", "expected: better by", "found: better by", "smallest effect"),
        *("verdict", "remarks"),
    ]
    return Table("Claims", columns, rows)


def _rates(report: Mapping[str, Any]) -> Table:
    rates = [f"{rate:g}" for rate in report["learning_rates"]]
    rows = [
        [
            name,
            *(_number(entry["sweep"].get(rate)) for rate in rates),
            _number(entry["learning_rate"], "g"),
            f"the {edge} of those tried" if (edge := entry["rate_at_edge"]) else "",
        ]
        for name, entry in report["entries"].items()
    ]
    title = f"{report['metric']} with seed {report['sweep_seed']}, by learning rate"
    return Table(title, ["entry", *rates, "taken", "remark"], rows)


def _sizes(report: Mapping[str, Any]) -> Table:
    rows = []
    for name, entry in report["entries"].items():
        amounts = [f"{entry['amounts'][a]:,.6g} ({entry['ratios'][a]:.3f})" for a in AXES]
        fields = ", ".join(f"{field}={value}" for field, value in entry["fields"].items())
        rows.append([name, *amounts, fields or "the reference"])
    title = f"Amounts (over those of {report['reference']}), and fields that differ"
    return Table(title, ["entry", *(axis.words for axis in AXES.values()), "fields"], rows)


# --- The page -------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { border: 1px solid #bbb; padding: 3px 8px; text-align: left; vertical-align: top; }
th { background: #eee; } img { max-width: 100%; }
pre { background: #f6f6f6; padding: 1em; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def _html_table(table: Table) -> str:
    def row(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    lines = [f"<h2>{html.escape(table.title)}</h2>", "<table>", row("th", table.columns)]
    return "\n".join([*lines, *(row("td", cells) for cells in table.rows), "</table>"])


SIGNS = (
    "Differences are paired by seed. Above 0, the entry is better than the other one. The smallest "
    "effect is the true difference that this many seeds would find with 80% probability."
)


def page(report: Mapping[str, Any], png: bytes | None) -> str:
    """One HTML page that needs no other file and no script.

    report: of findings.report, with `text` (the docstring of the study), `command` and `commands`
    (one for each entry). png: the figure.
    """
    parts = [f"<h1>{html.escape(report['question'])}</h1>", _pre(report["text"])]
    parts.append(f"<p>All runs: <code>{html.escape(report['command'])}</code></p>")
    if report["remarks"]:
        parts.append(f"<p><b>Note: {html.escape('; '.join(report['remarks']))}.</b></p>")
    if png is not None:
        data = base64.b64encode(png).decode()
        parts.append(f'<img alt="what was measured" src="data:image/png;base64,{data}">')
    parts.append(f"<p>{SIGNS}</p>")
    parts += [_html_table(table) for table in tables(report)]
    commands = [[name, command] for name, command in report["commands"].items()]
    parts.append(_html_table(Table("Commands", ["entry", "one run"], commands)))
    failures = [[n, f] for e in report["entries"].values() for n, f in e["failures"].items()]
    if failures:
        parts.append(_html_table(Table("Runs that failed", ["run", "why"], failures)))
    for title, values in (("Environment", "environments"), ("Settings of the reference", "config")):
        parts.append(f"<h2>{title}</h2>{_pre(json.dumps(report[values], indent=1))}")
    parts.append(f"<p>All runs together: {report['minutes']:.0f} minutes.</p>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(report['question'])}</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


# --- Files ----------------------------------------------------------------------------------------


def write(report: Mapping[str, Any], out: Path, folder: Path, events: Events) -> None:
    """Writes the results as `out` (JSON), the figure next to it, and report.html in `folder`. The
    figure is also an event, whose step is the number of runs that have ended."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, to_json(report, indent=1) + "\n")
    picture = None
    if figure.draw(report, out.with_suffix(".png")):
        picture = out.with_suffix(".png").read_bytes()
        events.picture(TAG, picture, sum(len(e["runs"]) for e in report["entries"].values()))
    write_atomically(folder / "report.html", page(report, picture))
