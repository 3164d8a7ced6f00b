"""What a report of `inference.measure` says, as sentences and tables: ratios of architectures, the
lengths at which they are equally fast (crossings), and which aims (paper.py) are reached."""

import statistics

import numpy as np

from benchmarks import paper
from benchmarks.report import Grid

VALUE = {"prefill": "tokens_per_s", "decode": "tokens_per_s", "kv": "mib"}
# What bounds the speed in theory: speeds should have the inverse ratio of these.
COST = {"prefill": "flops_per_token", "decode": "gb_per_step"}


def pairs(architectures) -> list[tuple[str, str]]:
    """Which architectures are compared: all with the transformer, and yoco_u with yoco."""
    found = [(name, "transformer") for name in architectures if name != "transformer"]
    found = found if "transformer" in architectures else []
    if {"yoco_u", "yoco"} <= set(architectures):
        found.append(("yoco_u", "yoco"))
    return found


def ratios(rows: list[dict], architectures: list[str]) -> list[dict]:
    """How many times better `of` is than `to`, at the largest batch that both have: by tokens/s,
    and for kv by bytes. expected: the ratio by FLOPs for prefill, by a step's bytes for decode."""
    measured = [row for row in rows if row["status"] == "measured"]
    measured.sort(key=lambda row: row["batch"])  # so that the largest one is kept
    keys = "kind", "architecture", "length", "batch"
    by_key = {tuple(row[key] for key in keys): row for row in measured}
    found = {}
    for of, to in pairs(architectures):
        for (kind, name, length, batch), mine in by_key.items():
            other = by_key.get((kind, to, length, batch))
            if name != of or other is None:
                continue
            a, b = (other, mine) if kind == "kv" else (mine, other)
            ratio = {"kind": kind, "of": of, "to": to, "length": length, "batch": batch}
            ratio["value"] = a[VALUE[kind]] / b[VALUE[kind]]
            ratio["expected"] = other[COST[kind]] / mine[COST[kind]] if kind in COST else None
            ratio["paper"] = a["paper"] / b["paper"] if a["paper"] and b["paper"] else None
            found[kind, of, to, length] = ratio
    return list(found.values())


def ratios_of(report: dict, kind: str, of: str, to: str) -> dict[int, dict]:
    """The ratios of `of` to `to`, by length."""
    wanted = kind, of, to
    return {r["length"]: r for r in report["ratios"] if (r["kind"], r["of"], r["to"]) == wanted}


def curve(report: dict, kind: str, architecture: str) -> dict[int, dict]:
    """The rows by length. If a length has several, the row of the largest measured batch."""
    rows = [r for r in report["rows"] if (r["kind"], r["architecture"]) == (kind, architecture)]
    rows.sort(key=lambda row: (row["status"] == "measured", row["batch"]))
    found = {row["length"]: row for row in rows}
    return {length: found[length] for length in sorted(found)}


def speeds(report: dict, kind: str, architecture: str) -> dict[int, float]:
    """The measured values of the curve, by length."""
    rows = curve(report, kind, architecture).items()
    return {n: row[VALUE[kind]] for n, row in rows if row["status"] == "measured"}


def crossings(lengths, ratio) -> list[float]:
    """The lengths at which the ratio is 1, interpolated between two lengths on log axes."""
    found = []
    x, y = np.log(lengths), np.log(ratio)
    for i in range(len(x) - 1):
        if (y[i] < 0) != (y[i + 1] < 0):
            share = y[i] / (y[i] - y[i + 1])
            found.append(float(np.exp(x[i] + share * (x[i + 1] - x[i]))))
    return found


def exponent(lengths, seconds) -> float:
    """The slope of log seconds in log length, by least squares."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def findings(report: dict) -> list[str]:
    """Sentences: where yoco_u is slower, where the curves cross, how prefill grows, the noise."""
    said = []
    for kind, cost in (("prefill", "FLOPs"), ("decode", "bytes")):
        found = dict(sorted(ratios_of(report, kind, "yoco_u", "transformer").items()))
        slower = [f"{n} ({r['value']:.2f}x)" for n, r in found.items() if r["value"] < 1]
        if found:
            where = f"N = {', '.join(slower)}" if slower else "none of these lengths"
            said.append(f"yoco_u's {kind} is slower than the transformer's at {where}.")
            measured, expected = (
                [f"{n:,.0f}" for n in crossings(list(found), [r[key] for r in found.values()])]
                for key in ("value", "expected")
            )
            said.append(
                f"Their curves of {kind} cross at N = {' and '.join(measured) or 'none of these'} "
                f"(interpolated; {cost} are equal at {' and '.join(expected) or 'none of these'})."
            )
    for name in report["programs"]:
        speed = speeds(report, "prefill", name)
        lengths, seconds = list(speed), [n / rate for n, rate in speed.items()]
        if len(speed) > 1:
            said.append(
                f"Prefill time of {name} per prompt grows as N^{exponent(lengths, seconds):.2f}, "
                f"over the last two lengths as N^{exponent(lengths[-2:], seconds[-2:]):.2f}; its "
                f"slowest tokens/s are {min(speed.values()) / max(speed.values()):.2f} of its "
                "fastest."
            )
    spreads = [row["spread"] for row in report["rows"] if row.get("samples", 1) > 1]
    if spreads:
        said.append(
            f"Noise: samples of a measurement are {statistics.median(spreads):.0%} apart, at most "
            f"{max(spreads):.0%}: (max - min) / median."
        )
    return said


def aims(report: dict) -> list[dict]:
    """Each aim with reached, not reached or not measured."""
    said = []
    for text, kind, of, to, least in paper.AIMS:
        found = ratios_of(report, kind, of, to).get(paper.AIM_LENGTH)
        entry = {"aim": text, "least": least, "value": None, "verdict": "not measured"}
        if found and found["paper"]:  # the aims are for the paper's model only
            entry |= {key: found[key] for key in ("value", "expected", "paper", "batch")}
            entry["verdict"] = "reached" if found["value"] >= least else "not reached"
        said.append(entry)
    return said


def _aim_line(aim: dict) -> str:
    line = f"at 256K, {aim['aim']}: {aim['verdict']}"
    if aim["value"] is None:
        return line
    by = f"; FLOPs or bytes alone give {aim['expected']:.2f}" if aim["expected"] else ""
    return f"{line} ({aim['value']:.3g}, B = {aim['batch']}{by})"


def _cell(row: dict) -> str:
    """A measurement and the paper's figure."""
    papers = f" [{row['paper']:,}]" if row["paper"] else ""
    if row["status"] != "measured":
        return row["status"] + papers
    if row["kind"] == "kv":
        return f"{row['mib']:,.6g}{papers}"
    text = f"{row['tokens_per_s']:,.0f}{papers}"
    if row["kind"] == "decode":
        text += f"\nB={row['batch']} {row['gb_per_s']:,.1f} GB/s {row['of_copy']:.0%}"
    return text


def _ratio_cell(ratio: dict | None) -> str:
    if ratio is None:
        return "-"
    expected = f" ({ratio['expected']:.2f})" if ratio["expected"] else ""
    papers = f" [{ratio['paper']:.2f}]" if ratio["paper"] else ""
    rows = f"\nB={ratio['batch']}" if ratio["kind"] == "decode" else ""
    return f"{ratio['value']:.2f}{expected}{papers}{rows}"


def short(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


TITLES = {
    "prefill": "prefill: tokens/s; ratios (by FLOPs)",
    "decode": "decode: tokens/s of all rows; batch, GB/s, share of a copy's; ratios (by bytes)",
    "kv": "KV cache: MiB per sequence; how many times smaller",
}


def grids(report: dict) -> list[Grid]:
    """One per kind, a line per length."""
    names, found = list(report["programs"]), []
    papers = "; in brackets the paper's, H100" if report["papers_model"] else ""
    for kind, title in TITLES.items():
        headers = [f"{of} /\n{to}" for of, to in pairs(names)]
        columns = [curve(report, kind, name) for name in names]
        compared = [ratios_of(report, kind, *pair) for pair in pairs(names)]
        rows = []
        for length in report["lengths"]:
            cells = [_cell(column[length]) for column in columns]
            cells += [_ratio_cell(column.get(length)) for column in compared]
            rows.append([short(length), *cells])
        found.append(Grid(title + papers, ["N", *names, *headers], rows))
    return found


def head_lines(report: dict) -> list[str]:
    """The device, the versions, the models, and which attention ran."""
    base = report["reference"]
    n, versions = base["matmul_size"], ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    return [
        *report.get("notes", []),
        f"{report['device']}, {report['date']}, {report['dtype']}, {versions}",
        f"copy {base['copy_gb_per_s']:,.0f} GB/s, {n} x {n} product {base['matmul_tflops']:.3g} "
        f"TFLOP/s; {report['memory_gib']:.0f} GiB; {report['seconds']:.0f} s in all",
        "model: " + ", ".join(f"{k} {v}" for k, v in report["model"].items()),
        *(
            f"{name} = {program}, {report['parameters'][name] / 1e6:,.1f}M parameters"
            for name, program in report["programs"].items()
        ),
        *report["attention"],
    ]


def foot_lines(report: dict) -> list[str]:
    """What was not measured and why, what was found, and the aims."""
    missing = [
        f"{row['status']}: {row['kind']}, {row['architecture']}, N = {row['length']}, "
        f"B = {row['batch']}: {row['reason']}"
        for row in report["rows"]
        if row["status"] != "measured"
    ]
    return missing + report["findings"] + [_aim_line(aim) for aim in report["aims"]]
