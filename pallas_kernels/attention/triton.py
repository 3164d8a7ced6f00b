"""Attention in Triton, launched through jax-triton, for NVIDIA GPUs before Hopper: A100 (sm_80), L4
and RTX 40 (sm_89).

Why it exists: pallas_gpu needs wgmma, the matrix instruction that only Hopper has. Older GPUs have
mma.sync (matrix products) and cp.async (copies), which Triton schedules well. The kernels compile
for Hopper too, where "auto" prefers pallas_gpu. One template serves the window and global attention
(FlashAttention-2, arXiv 2307.08691): only blocks with visible keys are visited, and only blocks on
an edge of the visible part are masked. dq and dkv are separate kernels without atomics, so a second
run gives the same bits. Decode is split over the keys.

How it rounds: products of bf16 or fp16 accumulate in fp32; scores, softmax and all sums are fp32,
in base 2; p and ds are rounded to the dtype of q before their products, out and dq at the end of
the kernel. dk and dv are summed over the query heads of a group in the kernel, and are returned in
spec.kv_grad_dtype.

Compiled for sm_80, sm_86, sm_89 and sm_90 (`compile_report`). Never ran on a device. The kernels
are in triton_kernels.py. Tests run them under `pallas_kernels.interpret()`, in Triton's
interpreter, which computes with numpy on the host.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.blocks import (
    TRITON_DECODE_PROGRAMS,
    TRITON_HEAD_WIDTHS,
    TritonBlocks,
    triton_blocks,
)
from pallas_kernels.attention.flash import Spec, kernel_name, work
from pallas_kernels.attention.join import join_splits
from pallas_kernels.attention.mask import Mask
from pallas_kernels.call import Call
from pallas_kernels.device import Device, interpretation, target_device

_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
_OLDEST = 80  # the first compute capability with bf16 products and cp.async
_INSTALL = "`pip install -r requirements-gpu.txt` installs versions that fit each other"


def unsupported_reason(call: Call) -> str | None:
    device = call.device
    if interpretation() is not None:
        if call.dtype_name == "bfloat16":
            return "Triton's interpreter cuts bfloat16 off instead of rounding it; use float16."
        return _missing_triton()
    if device.compute_capability is None:
        return (
            f"The Triton kernels need an NVIDIA GPU of known compute capability; {device.kind} "
            "is not in the table of pallas_kernels/device.py."
        )
    if device.compute_capability < _OLDEST:
        return (
            f"The Triton kernels need compute capability 8.0 (A100) or newer; {device.kind} has "
            f"{device.compute_capability / 10}."
        )
    if call.head_width not in (None, *TRITON_HEAD_WIDTHS):
        widths = ", ".join(map(str, TRITON_HEAD_WIDTHS))
        return f"The Triton kernels take heads of width {widths}; got {call.head_width}."
    if call.dtype_name not in (None, "bfloat16", "float16"):
        return f"The Triton kernels take bfloat16 or float16; got {call.dtype_name}."
    return _missing_triton() or _misfit()


def _sentence(what: str, error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "").rstrip(".")
    return f"{what} ({type(error).__name__}: {text}); {_INSTALL}."


@functools.cache
def _missing_triton() -> str | None:
    try:
        import triton.language  # noqa: F401
    except Exception as error:
        return _sentence("Triton cannot be imported", error)
    return None


@functools.cache
def _misfit() -> str | None:
    """Why jax-triton does not work with this jax; None if it does. Only a trial shows it, because
    jax-triton uses private parts of jax: 0.4.1 with jax 0.12.0.1 can be imported and traced, and
    fails when jax lowers the program."""
    try:
        import jax_triton  # noqa: F401
    except Exception as error:
        return _sentence("jax-triton cannot be imported", error)
    x = jax.ShapeDtypeStruct((1,), jnp.float32)
    probe = _Launch("probe", [], [x], (1,), {}, TritonBlocks(1, 1, 1, 1), flops=0)

    def lower():
        jax.jit(lambda x: _on_gpu(probe, [x], _OLDEST)).trace(x).lower(lowering_platforms=("cuda",))

    try:
        with ThreadPoolExecutor(1) as thread:  # there the caller's mesh is not set
            thread.submit(lower).result()
    except Exception as error:
        mine, triton = map(importlib.metadata.version, ("jax-triton", "triton"))
        what = f"jax-triton {mine} and triton {triton} do not work with jax {jax.__version__}"
        return _sentence(what, error)
    return None


# --- Launching ------------------------------------------------------------------------------------


@functools.cache
def _kernels(interpreted: bool = False):
    """The module of kernels. A kernel's decorator decides whether Triton compiles or interprets it,
    so there are two copies of the module."""
    import triton

    name = "pallas_kernels.attention.triton_kernels"
    if not interpreted:
        return importlib.import_module(name)
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


class _Launch(NamedTuple):
    """A kernel and all its arguments except the input arrays. The arguments of every kernel are, in
    this order, pointers to inputs, scalars, pointers to outputs, constants."""

    kernel: str
    scalars: list[int]
    outs: list[jax.ShapeDtypeStruct]
    grid: tuple[int, ...]
    constants: dict
    blocks: TritonBlocks
    flops: int


def _launch(what: _Launch, arrays, device: Device):
    if interpretation() is not None:
        return jax.pure_callback(functools.partial(_interpret, what), what.outs, *arrays)
    return _on_gpu(what, arrays, device.compute_capability)


def _on_gpu(what: _Launch, arrays, compute_capability: int):
    import jax_triton

    # jax-triton 0.4 has other names than 0.3. It also leaves fp fusion to Triton's default, with a
    # warning, so it is set here.
    if "out_shape" in inspect.signature(jax_triton.triton_call).parameters:
        options = {"out_shape": what.outs}
    else:
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *what.outs))
        options = {
            "out_type": what.outs,
            "backend_options": {"enable_fp_fusion": True},
            "cost_estimate": {"flops": what.flops, "bytes_accessed": moved},
        }
    return jax_triton.triton_call(
        *arrays,
        *what.scalars,
        kernel=getattr(_kernels(), f"{what.kernel}_kernel"),
        grid=what.grid,
        name=kernel_name(what.kernel, "triton", what.constants.get("WINDOW")),
        num_warps=what.blocks.warps,
        num_stages=what.blocks.stages,
        compute_capability=compute_capability,
        **options,
        **what.constants,
    )


class _HostArray:
    """A numpy array with the methods of a tensor that Triton's interpreter calls. The interpreter
    changes the array in place."""

    def __init__(self, x: np.ndarray):
        self._x, self.dtype = x, _TYPES[str(x.dtype)]

    def data_ptr(self):
        return self._x.ctypes.data

    def untyped_storage(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def cpu(self):
        return self

    def set_(self, *_):
        pass

    copy_ = set_

    def storage_offset(self):
        return 0

    size = stride = storage_offset


_one_at_a_time = threading.Lock()  # Triton's interpreter works by patching triton.language


def _interpret(what: _Launch, *arrays):
    arrays = [np.ascontiguousarray(x) for x in arrays]
    results = [np.full(x.shape, np.nan, x.dtype) for x in what.outs]
    inputs, outputs = ([_HostArray(x) for x in xs] for xs in (arrays, results))
    with _one_at_a_time:
        kernel = getattr(_kernels(interpreted=True), f"{what.kernel}_kernel")
        kernel[what.grid](*inputs, *what.scalars, *outputs, **what.constants)
    return results


# --- The operations -------------------------------------------------------------------------------


def _blocks(kernel: str, H: int, segments: bool, device) -> TritonBlocks:
    return triton_blocks(device.compute_capability or _OLDEST, kernel, H, segments)


def _grid(kernel: str, blocks: TritonBlocks, B, N, S, Q, K) -> tuple[int, int, int]:
    if kernel == "dkv":
        return (-(-S // blocks.kv), K, B)
    return (-(-N // blocks.q) * (Q // K), K, B)


def _constants(kernel, blocks, N, S, Q, K, H, *, window, scale, segments, lengths) -> dict:
    ragged = N % blocks.q if kernel == "dkv" else S % blocks.kv or lengths
    return dict(
        Q=Q, K=K, H=H, WINDOW=window, SCALE=scale, SEGMENTS=segments, LENGTHS=lengths,
        GUARD=bool(ragged), BQ=blocks.q, BK=blocks.kv,
    )  # fmt: skip


def _attend(kernel: str, spec: Spec, q, k, v, mask: Mask, *rest, outs):
    (B, N, Q, H), (S, K) = q.shape, k.shape[1:3]
    device = target_device(q)
    segments, lengths = mask.segments, mask.lengths
    blocks = _blocks(kernel, H, segments is not None, device)
    constants = _constants(
        kernel, blocks, N, S, Q, K, H, window=mask.window, scale=spec.scale,
        segments=segments is not None, lengths=lengths is not None,
    )  # fmt: skip
    # The kernel does not read arrays that are absent, so it gets any array in their place.
    ids = [q, q] if segments is None else [x.astype(jnp.int32) for x in segments]
    valid = q if lengths is None else lengths.astype(jnp.int32)
    grid = _grid(kernel, blocks, B, N, S, Q, K)
    flops, _ = work(kernel, q, k, mask)
    what = _Launch(kernel, [N, S, mask.q_offset], outs, grid, constants, blocks, flops)
    return _launch(what, [q, k, v, *ids, valid, *rest], device)


def forward(spec: Spec, q, k, v, mask: Mask):
    """Shapes, dtypes and results: see flash.Kernels."""
    B, N, Q, _ = q.shape
    outs = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((B, Q, N), jnp.float32),
    ]
    return tuple(_attend("forward", spec, q, k, v, mask, outs=outs))


def backward(spec: Spec, q, k, v, mask: Mask, lse2, delta, d_out):
    """Shapes, dtypes and results: see flash.Kernels."""
    arguments = (spec, q, k, v, mask, lse2, delta, d_out.astype(q.dtype))
    outs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    (dq,) = _attend("dq", *arguments, outs=outs)
    outs = [jax.ShapeDtypeStruct(k.shape, spec.kv_grad_dtype)] * 2
    dk, dv = _attend("dkv", *arguments, outs=outs)
    return dq, dk, dv


def _decode_constants(blocks, Q, K, H, scale, parts) -> dict:
    rows = max(16, 1 << (Q // K - 1).bit_length())  # tl.dot multiplies 16 rows at least
    return dict(Q=Q, K=K, H=H, SCALE=scale, PARTS=parts, ROWS=rows, BK=blocks.kv)


def decode(q, k, v, valid, *, scale):
    """As `reference.decode`: q [B Q H], k and v [B S K H], valid [B] -> [B Q H], [B Q]. Each
    program handles a part of the cache. XLA then joins the results (`join_splits`)."""
    (B, Q, H), (S, K) = q.shape, k.shape[1:3]
    device = target_device(q)
    blocks = _blocks("decode", H, False, device)
    steps = -(-S // blocks.kv)
    parts = max(1, min(TRITON_DECODE_PROGRAMS // (B * K), steps))
    keys_per_part = -(-steps // parts) * blocks.kv
    what = _Launch(
        "decode",
        [S, keys_per_part],
        [
            jax.ShapeDtypeStruct((B, parts, Q, H), jnp.float32),
            jax.ShapeDtypeStruct((B, parts, Q), jnp.float32),
        ],
        (parts, K, B),
        _decode_constants(blocks, Q, K, H, scale, parts),
        blocks,
        flops=4 * B * Q * S * H,
    )
    arrays = [q, k.astype(q.dtype), v.astype(q.dtype), valid.astype(jnp.int32)]
    out, lse2 = _launch(what, arrays, device)
    out, lse = join_splits(out, lse2, axis=1)
    return out.astype(q.dtype), lse


# --- What the compiler reports --------------------------------------------------------------------


def compile_report(compute_capability: int, shapes: Iterable[Mapping]) -> list[dict]:
    """Compiles, without a device, the kernels that calls with these shapes launch on bf16. A shape
    has N, S, Q, K, H, window and, if it is not False, segments; N == 1 means decode.

    Returns:
      One dict per kernel: name, seconds, registers per thread, spills (bytes stored and loaded),
      shared_bytes (dynamic shared memory per program), warps.
    """
    found = {}
    for shape in shapes:
        N, S, Q, K, H = (shape[x] for x in "NSQKH")
        heads = f" Q={Q} K={K} H={H}"
        if N == 1:
            blocks = triton_blocks(compute_capability, "decode", H, False)
            constants = _decode_constants(blocks, Q, K, H, H**-0.5, 8)
            found["decode", heads] = ("decode", constants, blocks)
            continue
        segments = shape.get("segments", False)
        window = shape["window"]
        for kernel in ("forward", "dq", "dkv"):
            blocks = triton_blocks(compute_capability, kernel, H, segments)
            constants = _constants(
                kernel, blocks, N, S, Q, K, H, window=window, scale=H**-0.5, segments=segments,
                lengths=False,
            )  # fmt: skip
            words = " segments" if segments else ""
            words += (" ragged" if constants["GUARD"] else "") + heads
            found[kernel, window, words] = (kernel, constants, blocks)
    kernels = []
    for (*_, words), what in found.items():
        kernel = _compile(compute_capability, *what)
        kernels.append({**kernel, "name": kernel["name"] + words})
    return kernels


def _compile(compute_capability: int, kernel: str, constants: dict, blocks: TritonBlocks) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(_kernels(), f"{kernel}_kernel")
    names = [name for name in function.arg_names if name not in constants]
    fp32 = ["lse_ptr", "delta_ptr", "dk_ptr", "dv_ptr"]
    if kernel == "decode":
        fp32.append("out_ptr")
    int32 = ("q_ids_ptr", "kv_ids_ptr", "lengths_ptr")
    kinds = {name: "*fp32" for name in fp32} | {name: "*i32" for name in int32}
    signature = {
        name: kinds.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in names
    }
    aligned = [i for i, x in enumerate(function.arg_names) if x.endswith("_ptr")]
    source = ASTSource(
        function,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},  # as jax-triton does
    )
    start = time.perf_counter()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", compute_capability, 32),
            options={
                "num_warps": blocks.warps,
                "num_stages": blocks.stages,
                "enable_fp_fusion": True,
            },
        )
    return {
        "name": compiled.metadata.name,
        "seconds": time.perf_counter() - start,
        "shared_bytes": compiled.metadata.shared,
        "warps": blocks.warps,
        **_resources(compiled.asm["ptx"], compute_capability),
    }


def _resources(ptx: str, compute_capability: int) -> dict:
    """Registers and spills of a kernel, from the newest ptxas (NVIDIA's assembler) in Triton's
    wheel. It is of CUDA 13, as that of `jax[cuda13]`, which assembles the kernels when they run.
    Triton itself would ask a device for these figures."""
    import triton

    architecture = f"sm_{compute_capability}{'a' if compute_capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas_blackwell.path, "-v", f"--gpu-name={architecture}"]
        command += [str(path), "-o", str(path.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill", log)]
    return {"registers": int(re.search(r"Used (\d+) registers", log)[1]), "spills": sum(spills)}
