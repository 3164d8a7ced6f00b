"""Attention for NVIDIA Hopper (sm_90a) in Pallas's Mosaic GPU dialect: forward, dq, dk and dv.

Why it exists: plain XLA moves every block of scores through device memory, and public kernels visit
all blocks in the backward of a window. Here one template serves the window and full causal
attention: `Visits` says which blocks of the other axis a block of rows visits, and which of those
need a mask; no other block is loaded.

How: FlashAttention-3 (arXiv 2407.08608). A thread block has three warpgroups (of 128 threads). The
producer streams blocks through shared memory with the copy engine (TMA). The two consumers, with 64
rows each, multiply with wgmma, Hopper's instruction for matrix products. They take turns in the
forward: one computes its softmax while the other uses the tensor cores. A thread block has one
query head; the thread blocks of a group run at the same time and share their keys in the L2 cache.
The backward has a kernel for dq and one for dk and dv. The latter sums over the query heads of the
group in registers. There are no atomics, so the same input gives the same bits.

How it rounds: q, k, v in bf16 or fp16; products accumulate in fp32; softmax in fp32 in base 2 with
the scale folded into the exponent; p and ds are rounded to the input's dtype before their products;
dk and dv leave the fp32 accumulators in spec.kv_grad_dtype.

It needs jax 0.11 or newer and compute capability 9.0. Compiled for H200. Never ran on a device:
values and races are tested in Pallas's interpreter on the host. Expected limits on an H200: 600
TFLOP/s forward. The backward: 5/7 of that, because the kernels of dq and of dk, dv both recompute
the scores (7 products, where one kernel for all has 5). A window's thread blocks run for five
blocks of keys only, so a visible share of their time is start and end. What differs in the
interpreter is in hopper.py.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu_kernels, hopper
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import GPU_HEAD_WIDTHS, gpu_blocks
from pallas_kernels.attention.flash import Spec, kernel_name, padded, round_up, work
from pallas_kernels.attention.gpu_plan import KeyVisits, Plan, QueryVisits, Visits
from pallas_kernels.attention.hopper import CONSUMERS, plgpu
from pallas_kernels.call import Call
from pallas_kernels.device import interpretation


def unsupported_reason(call: Call) -> str | None:
    """See api.Implementation. Interpreted kernels take any head width, and float32 too."""
    if plgpu is None:
        return f"pallas_gpu needs Pallas's Mosaic GPU dialect: {hopper.IMPORT_ERROR}."
    interpreted = interpretation() is not None
    device = call.device
    if not interpreted and device.compute_capability != 90:
        return "pallas_gpu is written for compute capability 9.0 (Hopper: H100, H200, GH200); " + (
            f"{device.kind} is not in the table of pallas_kernels/device.py."
            if device.compute_capability is None
            else f"{device.kind} has {device.compute_capability / 10}."
        )
    if not hasattr(plgpu, "InterpretGPUParams"):
        what = "has no interpreter for it" if interpreted else "has another interface"
        return f"pallas_gpu needs jax 0.11 or newer; this is {jax.__version__}, which {what}."
    dtypes = ("bfloat16", "float16") + (("float32",) if interpreted else ())
    if call.dtype_name not in (None, *dtypes):
        return f"pallas_gpu takes {' and '.join(dtypes)}; got {call.dtype_name}."
    if (H := call.head_width) is None:
        return None
    if not interpreted and H not in GPU_HEAD_WIDTHS:
        widths = " and ".join(map(str, GPU_HEAD_WIDTHS))
        return f"pallas_gpu takes heads of {widths}; got {H}."
    rows = gpu_blocks(H).rows
    if call.decodes and call.k_shape is not None and rows < call.group:
        return f"pallas_gpu decodes at most {rows} query heads per K/V head; got {call.group}."
    return None


def _prepare(spec: Spec, q, k, v, mask: masks.Mask):
    """The plan, the block sizes, and the operands padded to whole blocks."""
    _, N, Q, H = q.shape
    S, K = k.shape[1:3]
    blocks = gpu_blocks(H)
    tile = CONSUMERS * blocks.rows
    N_pad = round_up(N, math.lcm(tile, blocks.dkv_q))
    S_pad = round_up(S, math.lcm(tile, blocks.kv, blocks.dq_kv))
    segments, lengths = mask.segments, mask.lengths
    bounded = lengths is not None or S_pad > S
    plan = Plan(N, S, Q // K, mask.window, mask.q_offset, spec.scale, bounded)
    if segments is not None:
        sizes = masks.SegmentIds(N_pad, S_pad)
        segments = jax.tree.map(_padded_ids, segments, sizes)
    if lengths is not None:
        lengths = lengths.astype(jnp.int32)
    q, k, v = padded(q, 1, N_pad), padded(k, 1, S_pad), padded(v, 1, S_pad)
    return plan, blocks, (q, k, v, segments, lengths)


def _padded_ids(ids, size: int):
    """Padding belongs to the last document, so that no block has it and a document of its own."""
    return jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, size - ids.shape[1])), mode="edge")


def _with_documents(visits: Visits, q, k, v, segments, lengths, *others):
    """The operands of the kernel that has these visits."""
    documents = None if segments is None else visits.documents(segments, lengths)
    return q, k, v, documents, lengths, *others


def forward(spec: Spec, q, k, v, mask: masks.Mask):
    """Shapes, dtypes and results: see flash.Kernels."""
    B, N, Q, H = q.shape
    plan, blocks, operands = _prepare(spec, q, k, v, mask)
    cost, q = work("forward", q, k, mask), operands[0]
    out, lse = hopper.run(
        functools.partial(gpu_kernels.forward_kernel, plan),
        kernel_name("forward", "pallas_gpu", plan.window),
        *_with_documents(KeyVisits(plan, blocks.rows, blocks.kv), *operands),
        grid=(B, q.shape[1] // (CONSUMERS * blocks.rows), Q),
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, Q, q.shape[1]), jnp.float32),
        ],
        scratch=gpu_kernels.forward_scratch(blocks, H, q.dtype, mask.segments is not None),
        cost=cost,
    )
    return out[:, :N], lse[:, :, :N]


def backward(spec: Spec, q, k, v, mask: masks.Mask, lse2, delta, d_out):
    """Shapes, dtypes and results: see flash.Kernels."""
    B, N, Q, H = q.shape
    S, K = k.shape[1:3]
    plan, blocks, operands = _prepare(spec, q, k, v, mask)
    dq_cost, dkv_cost = (work(kernel, q, k, mask) for kernel in ("dq", "dkv"))
    q, k = operands[:2]
    lse2, delta = (padded(x, 2, q.shape[1]) for x in (lse2, delta))
    operands += lse2, delta, padded(d_out, 1, q.shape[1])
    tile, segments = CONSUMERS * blocks.rows, mask.segments is not None
    dq = hopper.run(
        functools.partial(gpu_kernels.dq_kernel, plan),
        kernel_name("dq", "pallas_gpu", plan.window),
        *_with_documents(KeyVisits(plan, blocks.rows, blocks.dq_kv), *operands),
        grid=(B, q.shape[1] // tile, Q),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=gpu_kernels.dq_scratch(blocks, H, q.dtype, segments),
        cost=dq_cost,
    )
    dk, dv = hopper.run(
        functools.partial(gpu_kernels.dkv_kernel, plan),
        kernel_name("dkv", "pallas_gpu", plan.window),
        *_with_documents(QueryVisits(plan, blocks.rows, blocks.dkv_q), *operands),
        grid=(B, k.shape[1] // tile, K),
        out_type=[jax.ShapeDtypeStruct(k.shape, spec.kv_grad_dtype)] * 2,
        scratch=gpu_kernels.dkv_scratch(blocks, H, q.dtype, segments),
        cost=dkv_cost,
    )
    return dq[:, :N], dk[:, :S], dv[:, :S]
