"""What is compiled for which accelerator: the targets, the programs, and what must be installed."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels import api
from pallas_kernels.call import decodes


class Target(NamedTuple):
    """An accelerator to compile for. platform: "tpu", "cuda" or "triton", the compiler.
    device_kind: the device's name in jax. topology: the argument of jax's get_topology_desc.
    accelerator: the value of TPU_ACCELERATOR_TYPE, for libtpu."""

    platform: str
    implementation: str
    device_kind: str
    topology: str = ""
    accelerator: str = ""


TARGETS = {
    "v5e": Target("tpu", "pallas_tpu", "TPU v5 lite", "v5e:2x2", "v5litepod-4"),
    "v5p": Target("tpu", "pallas_tpu", "TPU v5", "v5p:2x2x1", "v5p-8"),
    "v6e": Target("tpu", "pallas_tpu", "TPU v6 lite", "v6e:2x2", "v6e-4"),
    "tpu7x": Target("tpu", "pallas_tpu", "TPU7x", "tpu7x:2x2x1", "tpu7x-8"),
    "h200": Target("cuda", "pallas_gpu", "NVIDIA H200", "1x1x1"),
    "a100": Target("triton", "triton", "NVIDIA A100"),
}

# What XLA must know about an H200 (HBM3e, 132 multiprocessors). With the GPU it asks the driver.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""

MODELS, OTHERS = ("yocou_125m", "yocou_1b"), "others"
DECODE_ROWS, DECODE_LENGTH = 8, 32_768  # sequences decoded together; slots of the global cache
TILE = 512  # cycles are reported for a tile of TILE queries and TILE keys


class Case(NamedTuple):
    """One program, with the letters of pallas_kernels/attention/api.py. For decode N is 1, and S is
    the number of slots of the cache. platforms: those whose targets it is compiled for."""

    model: str
    operation: str
    B: int
    N: int
    S: int
    Q: int
    K: int
    H: int
    window: int | None
    segments: bool = False
    lengths: bool = False
    q_offset: int = 0
    dtype: str = "bfloat16"
    platforms: tuple[str, ...] = ("tpu", "cuda", "triton")

    @property
    def decodes(self) -> bool:
        return decodes(self.operation)

    @property
    def label(self) -> str:
        words = [self.operation, *["+ lengths"] * self.lengths, *["+ segments"] * self.segments]
        if self.q_offset:
            words.append(f"+ offset {self.q_offset}")
        if self.model == OTHERS:
            words.append(f"{self.dtype} {self.H}")
        return " ".join(words)

    @property
    def cache_bytes(self) -> int:
        return 2 * self.B * self.S * self.K * self.H * jnp.dtype(self.dtype).itemsize


def _others() -> list[Case]:
    """Small cases of what the implementations support and the configs do not use."""

    def attention(operation, H, *platforms, N=512, S=512, **options):
        window = 256 if operation == "window_attention" else None
        return Case(OTHERS, operation, 2, N, S, 4, 2, H, window, platforms=platforms, **options)

    late = {"N": 512, "S": 1000, "q_offset": 488}
    cache = Case(OTHERS, "decode_cross", DECODE_ROWS, 1, DECODE_LENGTH, 4, 2, 256, None)
    return [
        attention("cross_attention", 256, "tpu", "triton"),
        attention("window_attention", 128, "tpu", dtype="float32"),
        attention("window_attention", 128, "cuda", dtype="float16"),
        attention("window_attention", 128, "cuda", "triton", **late),
        attention("cross_attention", 128, "tpu", "cuda", lengths=True, **late),
        attention("cross_attention", 128, "tpu", "cuda", lengths=True, segments=True, **late),
        cache._replace(platforms=("tpu", "triton")),
        cache._replace(S=777, H=128, platforms=("cuda",)),  # not a multiple of 8
    ]


def cases(platform: str) -> list[Case]:
    """Every program of every model that is compiled for the targets of a platform."""
    found = []
    for model in MODELS:
        config = importlib.import_module(f"configs.{model}").get_config()
        m, N = config.model, config.data.sequence_length
        heads = m.num_heads, m.num_kv_heads, m.head_dim
        for segments in (False, True):
            found += [
                Case(model, "window_attention", 1, N, N, *heads, m.window, segments),
                Case(model, "cross_attention", 1, N, N, *heads, None, segments),
            ]
        found += [
            Case(model, "decode_window", DECODE_ROWS, 1, m.window, *heads, m.window),
            Case(model, "decode_cross", DECODE_ROWS, 1, DECODE_LENGTH, *heads, None),
        ]
    return [case for case in found + _others() if platform in case.platforms]


def program(case: Case, implementation: str) -> tuple[Callable, list]:
    """The function to compile and its arguments: forward and backward, or one step of decode."""
    B, N, S, K, dtype = case.B, case.N, case.S, case.K, jnp.dtype(case.dtype)
    array, ints = jax.ShapeDtypeStruct, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    operation = functools.partial(getattr(api, case.operation), implementation=implementation)
    if case.decodes:
        cache = array((B, S, K, case.H), dtype)
        return operation, [array((B, case.Q, case.H), dtype), cache, cache, ints((B,))]
    operation = functools.partial(operation, q_offset=case.q_offset)
    if case.window is not None:
        operation = functools.partial(operation, window=case.window)
    # As in the model: the shared K/V of the cross layers comes in float32, see model/attention.py.
    kv_dtype = dtype if case.window is not None else jnp.float32
    q, kv = array((B, N, case.Q, case.H), dtype), array((B, S, K, case.H), kv_dtype)
    options: dict[str, Any] = {}
    if case.segments:
        ids = api.SegmentIds(ints((B, N)), ints((B, S)))
        options["segment_ids"] = ids.q if N == S else ids
    if case.lengths:
        options["kv_lengths"] = ints((B,))

    def train(q, k, v, d_out, options):
        out, vjp = jax.vjp(functools.partial(operation, **options), q, k, v)
        return out, vjp(d_out)

    return train, [q, kv, kv, q, options]


def splash_program() -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """jax's splash attention, forward and backward, in tiles of TILE x TILE."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    case = tile_case()
    mask = splash.LocalMask((case.N, case.S), (case.window - 1, 0), 0)
    attention = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask]), block_sizes=splash.BlockSizes(*[TILE] * 8)
    )

    def train(q, k, v, d_out):
        out, vjp = jax.vjp(attention, q, k, v)
        return out, vjp(d_out)

    return train, [jax.ShapeDtypeStruct((1, case.N, case.H), jnp.bfloat16)] * 4


def tile_case() -> Case:
    return Case("tile", "window_attention", 1, 4 * TILE, 4 * TILE, 1, 1, 128, TILE)


def environment(target: Target, folder: Path | None = None) -> dict[str, str]:
    """What must be set before jax starts. folder: where the compiler writes what it makes of each
    kernel; None: nowhere."""
    common = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "XLA_FLAGS": ""}
    if target.platform == "cuda":
        dump = {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}
        return common | (dump if folder else {})
    dump = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}
    return (
        common
        | (dump if folder else {})
        | {
            "TPU_ACCELERATOR_TYPE": target.accelerator,
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_MIN_LOG_LEVEL": "2",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    )


def mesh(target: Target) -> Mesh:
    """A mesh of one device of the target, which this machine need not have."""
    from jax.experimental import topologies

    options = {"topology": target.topology, "target_config": H200}
    if target.platform == "tpu":
        options = {"topology_name": target.topology}
    description = topologies.get_topology_desc(platform=target.platform, **options)
    return Mesh(np.array(description.devices[:1]), ("device",))


def what_to_install(target: Target) -> str | None:
    """A sentence if the package that compiles for the target is missing; None if it is not."""
    needed = {
        "tpu": ("libtpu", "TPU", "requirements-aot.txt"),
        "cuda": ("jax_cuda13_plugin", "NVIDIA GPU", "requirements-aot.txt"),
        "triton": ("triton", "Triton", "requirements-aot.txt"),
    }
    package, what, requirements = needed[target.platform]
    if importlib.util.find_spec(package) is not None:
        return None
    return (
        f"Compiling {what} kernels needs {package}, which is not installed: "
        f"`make setup REQUIREMENTS={requirements}`, or `pip install -r {requirements}`."
    )
