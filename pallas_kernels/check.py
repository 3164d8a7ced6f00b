"""The check of one implementation on this process's device. `verdicts.check` starts it:

    python -m pallas_kernels.check NAME [PART ...]     # parts that are already known

It compares the implementation with the reference on odd shapes: values, gradients and lse, with
packed documents, lengths, an offset, float32 keys, and whole calls in float32. A part of it is an
operation in a dtype. It prints JSON objects, one a line: first the device and all parts, as soon as
a product has run there, and then {"part": ..., "reason": null or a sentence, "supported": ...} for
each part.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import verdicts
from pallas_kernels.accuracy import ERROR_RATIO, error_ratio, relative_rms
from pallas_kernels.attention import api
from pallas_kernels.attention.mask import MASKED, SegmentIds
from pallas_kernels.call import Call, decodes
from pallas_kernels.device import Device, target_device

DOCUMENT = 71  # tokens
# Relative error that is always allowed in float32. How exact an accelerator's float32 products and
# exponentials are, nobody here has seen. A key too many or too few makes an error above 1e-2.
FLOAT32_FLOOR = 1e-4


class Case(NamedTuple):
    """One call, with the letters of api.py. kv_dtype: of k and v, if it is another one. lse:
    whether the call returns it, and it is differentiated too (not in decode). B: 2 or 4."""

    N: int
    S: int
    H: int
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    window: int | None = None
    q_offset: int = 0
    segments: bool = False
    lengths: bool = False
    lse: bool = False
    Q: int = 6
    K: int = 2
    B: int = 4


# Compilation takes most of the time, so each case covers several things. The sizes are odd, so the
# last block is not full. The large ones have several blocks on each axis of every grid, except in
# decode_window (a TPU's blocks are the largest: 512 queries and 1024 keys; its decode reads 1024 to
# 4096 slots at a time). They have few rows and heads, because the reference stores all scores. The
# first case of a dtype is small: for an implementation that is not written for a kind of device it
# is the only one.
CASES = {
    "window_attention": (
        Case(333, 333, 64, window=100, segments=True, lse=True),
        Case(1100, 1100, 128, window=300, Q=3, K=1, B=2),
        Case(1100, 1100, 128, window=600, Q=2, lse=True, B=2),
        Case(600, 600, 256, window=200, segments=True, Q=3, K=1, B=2),
        Case(150, 150, 64, "float32", window=37),
        Case(1100, 1100, 128, "float32", window=300, segments=True, lse=True, Q=3, K=1, B=2),
    ),
    "cross_attention": (
        Case(333, 333, 64, segments=True, lse=True),
        Case(200, 200, 64, lengths=True),
        Case(1100, 1100, 64, segments=True, Q=3, K=1, B=2),
        Case(1100, 5000, 128, kv_dtype="float32", q_offset=3900, lengths=True, Q=2, B=2),
        Case(1100, 1100, 128, segments=True, lse=True, Q=3, K=1, B=2),
        Case(1100, 1100, 256, Q=3, K=1, B=2),
        Case(150, 150, 64, "float32"),
        Case(1100, 2300, 128, "float32", q_offset=1200, lengths=True, lse=True, Q=2, B=2),
    ),
    "decode_window": (
        Case(1, 100, 64),
        Case(1, 1100, 128, Q=2),
        Case(1, 1100, 256),
        Case(1, 100, 64, "float32"),
        Case(1, 1100, 128, "float32"),
    ),
    "decode_cross": (
        Case(1, 777, 64),
        Case(1, 5000, 64),
        Case(1, 5000, 128, lse=True, Q=2),
        Case(1, 5000, 256, lse=True),
        Case(1, 777, 64, "float32", lse=True),
        Case(1, 5000, 128, "float32"),
    ),
}


def parts() -> dict[str, tuple[str, tuple[Case, ...]]]:
    """By the name of a part: its operation and its cases. All bfloat16 parts are first, so that
    they have a verdict even if float32 hangs."""
    found = {}
    for dtype in verdicts.DTYPES:
        for operation in api.OPERATIONS:
            if cases := tuple(case for case in CASES[operation] if case.dtype == dtype):
                found[verdicts.part(operation, dtype)] = operation, cases
    return found


def described(operation: str, case: Case, device: Device) -> Call:
    single = decodes(operation)
    return Call(
        operation,
        device,
        q_shape=(case.B, case.Q, case.H) if single else (case.B, case.N, case.Q, case.H),
        k_shape=(case.B, case.S, case.K, case.H),
        dtype=jnp.dtype(case.dtype),
        window=case.window,
        segments=case.segments,
        lengths=case.lengths,
        q_offset=case.q_offset,
        return_lse=case.lse,
    )


def inputs(operation: str, case: Case) -> tuple[list[np.ndarray], dict]:
    """q, k, v and the gradients of the output and of lse, in float32; and the options of the call.
    Decode: q, k, v and lengths."""
    rng = np.random.default_rng(case.S + case.H)
    B, Q, H = case.B, case.Q, case.H
    heads = (B, Q, H) if decodes(operation) else (B, case.N, Q, H)
    sizes = [heads, *[(B, case.S, case.K, H)] * 2, heads, heads[:-1]]
    arrays = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    # A ring has seen more than S.
    lengths = np.array([case.S // 2, case.S + 1, 0, 1][:B], np.int32)
    if decodes(operation):
        return [*arrays[:3], lengths], {}
    options = {"q_offset": case.q_offset}
    if case.window is not None:
        options["window"] = case.window
    if case.lengths:
        options["kv_lengths"] = jnp.asarray(lengths)
    if case.segments:
        rows = np.arange(B)[:, None] * 10
        ids = [(np.arange(n)[None] + rows) // DOCUMENT for n in (case.N, case.S)]
        options["segment_ids"] = SegmentIds(*map(jnp.asarray, ids))
    return arrays, options


def lowered(name: str, operation: str, case: Case, dtypes: Case) -> jax.stages.Lowered:
    """The program of a case, with arrays in the dtypes of another case. It returns a dict."""
    call, (arrays, options) = getattr(api, operation), inputs(operation, case)

    def run(q, k, v, *rest):
        if decodes(operation):
            how = {"return_lse": True} if case.lse else {}
            found = jax.tree.leaves(call(q, k, v, *rest, implementation=name, **how))
            return dict(zip(("out", "lse"), found, strict=False))
        attend = functools.partial(call, return_lse=case.lse, implementation=name, **options)
        out, vjp = jax.vjp(lambda *x: jax.tree.leaves(attend(*x)), q, k, v)
        gradients = vjp([d.astype(x.dtype) for d, x in zip(rest, out, strict=False)])
        names = (*("out", "lse")[: len(out)], "dq", "dk", "dv")
        return dict(zip(names, (*out, *gradients), strict=True))

    return jax.jit(run).lower(*typed(arrays, dtypes))


def typed(arrays: list[np.ndarray], dtypes: Case) -> list[np.ndarray]:
    q, k, v, *rest = arrays
    kv = dtypes.kv_dtype or dtypes.dtype
    return [q.astype(jnp.dtype(dtypes.dtype)), *(x.astype(jnp.dtype(kv)) for x in (k, v)), *rest]


def programs(name: str, operation: str, case: Case) -> list[tuple[jax.stages.Lowered, Case]]:
    """The reference in float32, the reference in the case's dtypes, the implementation in these;
    each with the dtypes of its arguments."""
    exact = case._replace(dtype="float32", kv_dtype=None)
    # On the host: a device that computes nonsense does not agree with itself, and the compiler of a
    # TPU takes half a minute for each of these programs.
    host = jax.local_devices(backend="cpu")[0]
    with jax.default_device(host), jax.default_matmul_precision("highest"):
        references = [lowered("reference", operation, case, dtypes) for dtypes in (exact, case)]
    # By default, products of float32 are rounded on accelerators: this is no fault of a kernel.
    wide = case.dtype == "float32"
    with jax.default_matmul_precision("highest") if wide else contextlib.nullcontext():
        mine = lowered(name, operation, case, case)
    return list(zip((*references, mine), (exact, case, case), strict=True))


def judge(operation: str, case: Case, exact: dict, plain: dict, mine: dict) -> str | None:
    """A sentence if `mine` is wrong: `exact` is the reference in float32, `plain` the reference in
    the dtype of the case."""
    for what in exact:
        want, theirs, got = (np.asarray(x[what], np.float64) for x in (exact, plain, mine))
        empty = want <= MASKED / 2 if what == "lse" else np.zeros(want.shape, bool)
        if what == "lse" and not np.array_equal(empty, got <= MASKED / 2):
            return f"In its check of {operation}, other queries than in the reference see no key."
        want, theirs, got = (np.where(empty, 0, x) for x in (want, theirs, got))
        rms = relative_rms(got, want)
        floor = FLOAT32_FLOOR if case.dtype == "float32" else 0.0
        ratio = error_ratio(rms, relative_rms(theirs, want), floor)
        if not ratio <= ERROR_RATIO:  # NaN too
            return (
                f"Its check of {operation} gave a wrong {what}: the relative error is {rms:.1e}, "
                f"which is {ratio:.3g} times the reference's (N = {case.N}, S = {case.S}, "
                f"Q = {case.Q}, H = {case.H}, {case.dtype})."
            )
    return None


def check(name: str, what: str) -> dict:
    """The row of a part: reason is None if all cases that the implementation supports are right.
    supported: whether it supports any of them.

    Raises:
      MemoryError: it was compiled, but could not get the memory to run.
    """
    device = target_device()
    operation, cases = parts()[what]
    # The tests compare what runs on any device with the reference, on a CPU.
    cases = cases[:1] if api._REGISTRY[name].platform is None else cases
    calls = {case: described(operation, case, device) for case in cases}
    reasons = {case: api.unsupported_reason(name, call) for case, call in calls.items()}
    cases = [case for case, reason in reasons.items() if reason is None]
    row = {"part": what, "reason": None, "supported": bool(cases)}
    if not cases:
        return row | {"reason": next(iter(reasons.values()))}
    plans = [program for case in cases for program in programs(name, operation, case)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # compiles them at the same time
        compiled = list(pool.map(lambda plan: plan[0].compile(), plans))
    for i, case in enumerate(cases):
        arrays, _ = inputs(operation, case)
        three = zip(compiled[3 * i :][:3], plans[3 * i :][:3], strict=True)
        with _memory_errors():
            found = [jax.device_get(run(*typed(arrays, dtypes))) for run, (_, dtypes) in three]
        if reason := judge(operation, case, *found):
            return row | {"reason": reason}
    return row


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Raises MemoryError if the device has no memory left, which may be the fault of another
    program. jax has no type for this error. Not to be used while a kernel is compiled: compilers
    report in the same words that a kernel needs more of the chip's own memory than there is."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "OUT_OF_MEMORY" in str(error):
            raise MemoryError(str(error)) from error
        raise


def rows(name: str, known: list[str]) -> Iterator[dict]:
    """What the process prints. After an exception there is no next row, because the device may be
    unusable in this process."""
    x = jnp.ones((128, 128))
    jax.device_get(jax.jit(jnp.dot)(x, x))
    yield {**target_device()._asdict(), "parts": list(parts())}
    for what in (p for p in parts() if p not in known):
        try:
            yield check(name, what)
        except MemoryError:
            raise
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(".")
            reason = f"Its check of {what} failed: {said}."
            yield {"part": what, "reason": reason, "supported": True}
            raise


def main(words: list[str]) -> int:
    name, *known = words
    try:
        for row in rows(name, known):
            print(json.dumps(row), flush=True)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        print(f"{type(error).__name__}: {first}", file=sys.stderr, flush=True)
        return verdicts.NO_MEMORY if isinstance(error, MemoryError) else verdicts.AGAIN
    return 0


def run() -> None:
    code = main(sys.argv[1:])
    os._exit(code)  # the exit of a runtime that has lost its device may hang


if __name__ == "__main__":
    run()
