"""Judges the compiled kernels: failures, our tiles compared with those of splash, and tables."""

import math
from typing import Any

from benchmarks.aot.targets import TARGETS, TILE, Target
from benchmarks.report import Grid

CACHE_READS = 1.05  # a decode step of a TPU may access so many times the bytes of its cache


def compare_with_splash(jobs: list[dict]) -> list[dict]:
    """A row per kernel: the slowest of our tiles, the tile of splash, the ratio of their cycles,
    and how many of our tiles have unknown cycles."""
    by_name = {job["operation"]: job.get("kernels", []) for job in jobs if job["model"] == "tile"}
    splash = by_name.pop("splash", [])
    ours = next(iter(by_name.values()), [])
    rows = []
    for what, kernel in zip(("forward", "dq", "dkv"), splash, strict=False):
        (theirs,) = kernel["tiles"]
        mine = [tile for k in ours if f"_{what}_" in k["kernel"] for tile in k["tiles"]]
        known = [tile for tile in mine if tile["tile_cycles"] is not None]
        slowest = max(known, key=lambda tile: tile["tile_cycles"], default=None)
        ratio = slowest["tile_cycles"] / theirs["tile_cycles"] if slowest else None
        row = {"kernel": what, "splash": theirs, "ours": slowest, "ratio": ratio}
        rows.append(row | {"unknown": len(mine) - len(known)})
    return rows


def failures(target: Target, jobs: list[dict], tiles: list[dict]) -> list[str]:
    """A sentence for each thing that makes the command fail."""
    found = []
    for job in jobs:
        where = f"{job['model']}, {job['operation']}"
        if job["error"]:
            found.append(f"{where}: {job['error']}")
        for kernel in job.get("kernels", []):
            if kernel.get("spilled_bytes"):
                size = kernel["spilled_bytes"]
                found.append(f"{where}: {kernel['kernel']} spills {size} bytes of registers.")
            if kernel.get("wgmma_serialized"):
                found.append(f"{where}: ptxas serializes the wgmma of {kernel['kernel']}.")
        # A ring may be copied to VMEM as a whole, because it is small.
        if target.platform == "tpu" and job["operation"].startswith("decode_cross"):
            moved = job.get("bytes_accessed")
            if moved is not None and moved > CACHE_READS * job["cache_bytes"]:
                times = moved / job["cache_bytes"]
                found.append(f"{where}: it accesses {times:.2f} times the bytes of the cache.")
    return found + [sentence for row in tiles for sentence in _slower_than_splash(row)]


def _slower_than_splash(row: dict) -> list[str]:
    tile = f"tile, {row['kernel']}: "
    if row["ours"] is None:
        return [tile + "no cycles of ours to compare with splash."]
    found = []
    if row["unknown"]:
        found.append(
            f"{tile}the cycles of {row['unknown']} of our tiles are unknown and may be more than "
            "splash's."
        )
    if row["ratio"] > 1:
        ours, splash = row["ours"]["tile_cycles"], row["splash"]["tile_cycles"]
        found.append(f"{tile}{ours} cycles, and splash takes {splash}.")
    return found


def _kib(size: int | None) -> str:
    return "" if size is None else f"{size / 1024:,.0f}"


def _cache_reads(job: dict) -> str:
    if job.get("cache_bytes") is None:
        return ""
    moved = job.get("bytes_accessed")
    return "?" if moved is None else f"{moved / job['cache_bytes']:.2f}"


def _tile_cells(tile: dict | None) -> list[str]:
    if tile is None or tile["tile_cycles"] is None:
        return ["?", "", "", ""]
    shares = [f"{tile[unit]:.0%}" for unit in ("mxu", "valu")]
    return [f"{tile['tile_cycles']:,}", f"{tile['stretch_cycles']:,}", *shares]


TILE_COLUMNS = (f"cycles / {TILE}²", "stretch", "MXU", "VALU")
COLUMNS = {
    "tpu": ("bytes / cache", "VMEM KiB", "spilled", "filled", *TILE_COLUMNS),
    "cuda": ("registers", "shared KiB", "spilled bytes", "wgmma"),
    "triton": ("registers", "shared KiB", "spilled bytes"),
}


def kernel_grid(name: str, result: dict[str, Any]) -> Grid:
    """A table with a row per kernel. Only the first row of a program names the program."""
    platform, rows = TARGETS[name].platform, []
    for job in result["jobs"]:
        first = [job["model"], job["operation"], f"{job.get('compile_s', math.nan):.1f}"]
        if job["error"]:
            rows.append([*first, "FAILED"])
        for kernel in job.get("kernels", []):
            if platform == "tpu":
                cells = [_cache_reads(job), _kib(kernel["vmem_bytes"])]
                cells += [str(kernel["spilled_registers"]), str(kernel["filled_registers"])]
                tiles = [_tile_cells(tile) for tile in kernel["tiles"]] or [[""] * 4]
                cells += ["\n".join(column) for column in zip(*tiles, strict=True)]
            else:
                cells = [str(kernel["registers"]), _kib(kernel["shared_bytes"])]
                cells += [str(kernel["spilled_bytes"])]
                if "wgmma_serialized" in kernel:
                    cells += ["serialized" if kernel["wgmma_serialized"] else "ok"]
            rows.append([*first, kernel["kernel"], *cells])
            first = [""] * 3
    columns = ("model", "operation", "compile s", "kernel", *COLUMNS[platform])
    return Grid(name, columns, rows, texts=4)


def tile_grid(tiles: list[dict]) -> Grid:
    """A table with a row per kernel: our tile and that of splash."""
    figures = ("", " stretch", " MXU", " VALU")
    columns = [who + figure for who in ("splash", "ours") for figure in figures]
    rows = []
    for row in tiles:
        ratio = "?" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = _tile_cells(row["splash"]) + _tile_cells(row["ours"])
        rows.append([row["kernel"], *cells, ratio])
    title = f"one {TILE} x {TILE} tile, head width 128, window {TILE}: static cycles"
    return Grid(title, ("kernel", *columns, "ours / splash"), rows, texts=1)
