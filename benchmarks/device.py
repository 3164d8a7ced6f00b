"""How fast the device is by itself, and which software it runs on."""

import datetime
import functools
import importlib.metadata
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import cases, timing

PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-triton"),
    *("triton", "tokamax", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
)


def measure(sizes: cases.Sizes) -> dict[str, Any]:
    """The speed of a copy (it counts read and written bytes), the speed of a matrix product, and
    how long a turn of the timing loop takes without a call."""
    x = jnp.ones((sizes.copy_bytes // 4,), jnp.float32)
    size = x.nbytes
    # In place: with a new array a CPU would measure page faults.
    once = functools.partial(jax.lax.fori_loop, 0, 4, lambda _, x: x + 1.0)
    copy = jax.jit(once, donate_argnums=0)
    n = sizes.matmul
    a = jax.random.normal(jax.random.key(0), (n, n), sizes.dtype)
    # Scaled, so that the values do not grow from product to product.
    chain = jax.jit(lambda a: jax.lax.fori_loop(0, 8, lambda _, y: (y @ a) * n**-0.5, a))
    (Q, K), turns = sizes.heads, 100
    case = cases.Case("decode_window", 1, 1, cases.WINDOW, Q, K, sizes.head_widths[0], None)
    args = cases.inputs(case, sizes.dtype, seed=0)
    empty = jax.jit(timing.repeated(lambda q, *_: q[(0,) * q.ndim], turns))
    samples: dict[str, list[float]] = {"copy": [], "matmul": [], "turn": []}
    for _ in range(sizes.rounds + 1):
        start = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        samples["copy"].append((time.perf_counter() - start) / 4)
        samples["matmul"].append(timing.seconds(chain, a) / 8)
        samples["turn"].append(timing.seconds(empty, *args) / turns)
    # The first sample of each includes compilation.
    copied, multiplied, turn = (timing.summary(s[1:]) for s in samples.values())
    return {
        "copy_gb_per_s": 2 * size / copied["seconds"] / 1e9,
        "copy_spread": copied["spread"],
        "matmul_tflops": 2 * n**3 / multiplied["seconds"] / 1e12,
        "matmul_spread": multiplied["spread"],
        "matmul_size": n,
        "loop_turn_s": turn["seconds"],
        "loop_turn_spread": turn["spread"],
    }


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The version of Python, and that of each package that is installed."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def versions() -> dict[str, str]:
    """All versions that a time may depend on, with that of the device's runtime."""
    found = installed(PACKAGES)
    found["runtime"] = jax.devices()[0].client.platform_version.splitlines()[0].strip()
    return found


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def memory() -> int | None:
    """Bytes of the device that jax may use; None if jax does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
