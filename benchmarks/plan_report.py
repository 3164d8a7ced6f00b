"""The tables that `experiments.plan` prints."""

from typing import Any

from benchmarks.report import Grid

GIB = 2**30


def _gib(size: float | None) -> str:
    return "not known" if size is None else f"{size / GIB:.3g} GiB"


def in_seconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.3g} s"


def mesh_of(found: dict) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "data=1"


def _setup(found: dict) -> list[list[str]]:
    return [
        ["devices", f"{found['devices']} x {found['device_kind']}"],
        ["mesh", mesh_of(found)],
        ["program", found["program"]],
    ]


def _training_facts(found: dict) -> list[list[str]]:
    sizes = found["bytes"]
    rows = [
        *_setup(found),
        [
            "batch",
            f"{found['batch_size']} x {found['sequence_length']} tokens, in "
            f"{found['accumulation_steps']} microbatches; remat {found['remat']}, {found['dtype']}",
        ],
        ["not split, because it does not divide", "; ".join(found["whole"]) or "nothing"],
        ["parameters", _gib(sizes["parameters"])],
        ["optimizer", _gib(sizes["optimizer"])],
    ]
    if "error" in found:
        return [*rows, ["does not fit", found["error"]]]
    room = None if sizes["memory"] is None else sizes["memory"] - sizes["peak"]
    least = found["at_least"]
    return [
        *rows,
        ["gradients, activations and the rest", _gib(sizes["temporary"])],
        ["peak", f"{_gib(sizes['peak'])} of {_gib(sizes['memory'])}; {_gib(room)} are left"],
        ["FLOPs of a step", f"{found['flops']:.4g}"],
        ["sent in a step", _gib(sizes["sent"])],
        ["arithmetic (estimate)", f"at least {in_seconds(least['arithmetic'])}"],
        ["links (estimate)", f"at least {in_seconds(least['links'])}"],
        [
            "step (estimate)",
            f"at least {in_seconds(least['step'])}"
            + (f", MFU at most {least['mfu']:.0%}" if least["mfu"] is not None else ""),
        ],
        ["compiled in", f"{found['compile_seconds']:.0f} s"],
    ]


def _moved(title: str, found: dict[str, Any]) -> list[Grid]:
    moved = found.get("collectives")
    if not moved:
        return []
    parts: dict[str, float] = {}
    for one in moved:
        parts[one["part"]] = parts.get(one["part"], 0) + one["sent"]
    rows = [
        [m["part"], m["kind"], m["axes"], m["dtype"], f"{m['runs']:,}", _gib(m["sent"])]
        for m in moved
    ]
    totals = [[part, _gib(sent)] for part, sent in sorted(parts.items(), key=lambda p: -p[1])]
    return [
        Grid(f"What {title} sends", ["for", "sent"], totals, 1),
        Grid(f"What moves in {title}", ["for", "kind", "over", "as", "runs", "sent"], rows, 4),
    ]


def training(found: dict[str, Any]) -> list[Grid]:
    """Of a result of `plan.plan`."""
    title = f"Plan for {found['topology']}, per device"
    return [Grid(title, ["", ""], _training_facts(found)), *_moved("a step", found)]


def inference(found: dict[str, Any]) -> list[Grid]:
    """Of a result of `plan_inference.plan_inference`."""
    sizes = found["bytes"]
    rows = [
        *_setup(found),
        [
            "prompts",
            f"{found['batch_size']} x {found['sequence_length']} positions, in chunks of "
            f"{found['chunk']}; {found['dtype']}",
        ],
        ["parameters", _gib(sizes["parameters"])],
        ["caches", _gib(sizes["caches"])],
    ]
    moved = []
    for name, one in found["programs"].items():
        moved += _moved(f"one {name}", one)
        if "bytes" in one:
            least = one["at_least"]
            peak, memory = one["bytes"]["peak"], sizes["memory"]
            words = f"{_gib(peak)} of {_gib(memory)}, with parameters and caches"
            times = [x for x in ("arithmetic", "links", "reading") if x in least]
            at_least = ", ".join(f"{x} {in_seconds(least[x])}" for x in times)
            rows += [
                [f"{name}: peak", words],
                [f"{name}: FLOPs", f"{one['flops']:.4g}"],
                [f"{name}: sent", _gib(one["bytes"]["sent"])],
                [f"{name}: at least (estimate)", at_least],
            ]
        if "error" in one:
            rows.append([f"{name}: does not fit", one["error"]])
    return [Grid(f"Inference on {found['topology']}, per device", ["", ""], rows), *moved]
