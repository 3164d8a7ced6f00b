"""How times are taken: compilation in parallel, calls in a loop, medians and spreads."""

import concurrent.futures
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case


def compile_all(programs: dict[Any, tuple[Callable, list]]) -> dict[Any, Callable]:
    """The compiled programs by key. They are traced one after the other and compiled in parallel. A
    program that cannot be compiled raises its error when it is called."""

    def fails(error, *args):
        raise error

    done = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for key, (function, args) in programs.items():
            try:
                done[key] = pool.submit(jax.jit(function).lower(*args).compile)
            except Exception as error:
                done[key] = functools.partial(fails, error)
        for key, future in done.items():
            if isinstance(future, concurrent.futures.Future):
                error = future.exception()
                done[key] = functools.partial(fails, error) if error else future.result()
    return done


def repeated(function: Callable, calls: int) -> Callable:
    """A function with the same arguments that calls `function` so many times, one call after the
    other."""

    def run(*args):
        def body(_, args):
            # One input changes in each turn. The first barrier binds the others to it, so that XLA
            # cannot move an operation on them, such as a transposition, out of the loop. Because of
            # the second barrier, XLA cannot compute only the elements that are read.
            args = jax.lax.optimization_barrier(args)
            made = jax.lax.optimization_barrier(function(*args))
            seen = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in jax.tree.leaves(made))
            first = args[0]
            element = first[(0,) * first.ndim] + (1e-6 * seen).astype(first.dtype)
            return first.at[(0,) * first.ndim].set(element), *args[1:]

        return jax.lax.fori_loop(0, calls, body, args)[0]

    return run


def first_line(error: BaseException) -> str:
    """The type and the first line of an error, for a report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def seconds(function: Callable, *args) -> float:
    """Seconds until all results of `function` are computed."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def summary(samples: list[float]) -> dict[str, float]:
    """The median of the samples, (max - min) / median, and how many samples there are."""
    median = statistics.median(samples)
    spread = (max(samples) - min(samples)) / median
    return {"seconds": median, "spread": spread, "samples": len(samples)}


class Pace:
    """How many seconds a call will take, by the speed that the same implementation had before."""

    def __init__(self, nominal_flops: float):
        self.nominal, self.seen = nominal_flops, {}

    def note(self, name: str, case: Case, seconds: float) -> None:
        self.seen[name, case.operation, case.H, case.backward] = case.flops / seconds

    def guess(self, name: str, case: Case, dense: bool) -> float:
        key = (name, case.operation, case.H, case.backward)
        # A window does not make a dense implementation faster, so the pairs of all keys count.
        speed = self.seen.get(key, self.nominal)
        scale = case.N * case.S / case.pairs / 2 if dense and not case.decodes else 1.0
        return case.flops * (scale if key not in self.seen else 1.0) / speed + 5e-6
