"""The one custom gradient that every blocked implementation shares (FlashAttention-2, arXiv
2307.08691): the forward keeps q, k, v, out and lse; the backward recomputes p block by block.

An implementation has two functions, `Kernels(forward, backward)`. What all of them need is in
this file: the residuals (what the backward needs from the forward), delta, rows that see nothing,
the names for remat, the dtypes of gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import sharding
from pallas_kernels.attention.mask import MASKED, Mask
from pallas_kernels.device import interpretation

LOG2E = math.log2(math.e)


class Kernels(NamedTuple):
    """forward(spec, q, k, v, mask) -> out [B N Q H] in q's dtype, lse [B Q N] fp32: the natural log
    of the sum of exponentials, MASKED where a row sees nothing (out is 0 there).

    backward(spec, q, k, v, mask, lse2, delta, d_out) -> dq, dk, dv: dq in q's dtype, dk and dv in
    spec.kv_grad_dtype. lse2 [B Q N] is in base 2, and 0 for a row that sees nothing,
    so that exp2(MASKED - lse2) is 0; delta [B Q N] = sum(out * d_out, H) - d_lse, both fp32.

    k and v [B S K H] come in q's dtype; mask.lengths are int32 if there are any.

    opaque: XLA cannot look inside these functions, and so cannot split them over devices. False
    only for plain XLA operations.
    """

    forward: Callable
    backward: Callable
    opaque: bool = True


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static facts of a call, without shapes, dtypes and the static fields of its mask."""

    kernels: Kernels
    scale: float
    kv_grad_dtype: jnp.dtype
    where: sharding.Layout | None = None  # how devices share the call; None: it is not split


def kernel_name(what: str, implementation: str, window: int | None = None) -> str:
    """The name of a kernel in profiles and compilers' reports. what: forward, dq, dkv, backward
    where one kernel has all gradients, or decode, which serves the window and the whole cache."""
    kind = "" if what == "decode" else "full_" if window is None else "window_"
    return f"attention_{kind}{what}_{implementation}"


def _run_forward(spec: Spec, q, k, v, mask: Mask):
    where = spec.where
    if where is None:
        return spec.kernels.forward(spec, q, k, v, mask)

    def body(q, k, v, mask):
        k, v = (where.my_kv_heads(x, q.shape[2]) for x in (k, v))
        return spec.kernels.forward(spec, q, k, v, mask)

    in_specs = where.specs("b.q.", "b.k.", "b.k.", "b")  # the last is that of each array of mask
    run = sharding.on_each_device(body, where, in_specs, where.specs("b.q.", "bq."))
    return run(q, k, v, mask)


def _run_backward(spec: Spec, q, k, v, mask: Mask, lse2, delta, d_out):
    where = spec.where
    if where is None:
        return spec.kernels.backward(spec, q, k, v, mask, lse2, delta, d_out)
    replicated = where.kv_heads != where.heads
    local_spec = dataclasses.replace(spec, kv_grad_dtype=jnp.dtype("float32"))
    local_spec = local_spec if replicated else spec

    def body(q, k, v, mask, lse2, delta, d_out):
        mine = [where.my_kv_heads(x, q.shape[2]) for x in (k, v)]
        dq, *dkv = spec.kernels.backward(local_spec, q, *mine, mask, lse2, delta, d_out)
        if replicated:
            whole = jax.ShapeDtypeStruct(k.shape, jnp.float32)
            put_back = jax.linear_transpose(lambda x: where.my_kv_heads(x, q.shape[2]), whole)
            dkv = [jax.lax.psum(put_back(x)[0], where.heads) for x in dkv]
        return dq, *(x.astype(spec.kv_grad_dtype) for x in dkv)

    rows = ("b.q.", "b.k.", "b.k.")
    in_specs = where.specs(*rows, "b", "bq.", "bq.", "b.q.")
    run = sharding.on_each_device(body, where, in_specs, where.specs(*rows))
    return run(q, k, v, mask, lse2, delta, d_out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, mask):
    return _forward(spec, q, k, v, mask)[0]


def _forward(spec, q, k, v, mask):
    # k and v may be fp32 when q is bf16. They are read in bf16, but their gradients are not rounded
    # to it: layers that share k and v then sum the gradients in fp32.
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    out, lse = _run_forward(spec, q, k, v, mask)
    # Named, so that a remat policy can keep them and not run attention again.
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return (out, lse), (q, k, v, mask, out, lse)


def _backward(spec, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    # ds = p (dp - delta), and d lse / d s = p, so the gradient of lse joins delta.
    products = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = products.sum(-1).swapaxes(1, 2) - d_lse
    lse2 = jnp.where(lse < MASKED / 2, 0.0, lse * LOG2E)
    grads = _run_backward(spec, q, k, v, mask, lse2, delta, d_out)
    return *grads, None


_attention.defvjp(_forward, _backward)


def padded_width(H: int, head_widths: tuple[int, ...]) -> int:
    """The smallest of head_widths that is at least H; H itself if there is none, and in an
    interpreter, which takes any width."""
    if interpretation() is not None:
        return H
    return next((width for width in head_widths if width >= H), H)


_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # matrix products that a pair takes part in


def work(kernel: str, q, k, mask: Mask) -> tuple[int, int]:
    """FLOPs and exponentials of a kernel, for the compilers' cost estimates. They count the pairs
    of a query and a key that causality and the window allow. q [B N Q H], k [B S K H]."""
    B, N, Q, H = q.shape
    pairs = B * Q * mask.pairs(N, k.shape[1])
    return 2 * _PRODUCTS[kernel] * pairs * H, pairs


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def padded(x, axis: int, size: int):
    """x with zeros at the end of the axis, which then has `size` elements. Queries of zeros get
    gradients of zero; keys of zeros are masked."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _check_context(opaque: bool, q, where) -> None:
    if (opaque or where is not None) and getattr(jax.typeof(q), "vma", None):
        raise ValueError(
            "Attention kernels do not declare the mesh axes along which their results vary: give "
            "the jax.shard_map around them check_vma=False."
        )


def attention(kernels: Kernels, q, k, v, mask: Mask, *, scale, partition=None, head_widths=()):
    """Computes what `reference.attention` computes, by the kernels given, under the mesh in use.
    q [B N Q H], k and v [B S K H]. Returns out [B N Q H] in q's dtype, and lse [B N Q] in fp32.
    Heads are padded with zeros to the next of head_widths; the zeros change no result."""
    H = q.shape[-1]
    q, k, v = (padded(x, 3, padded_width(H, head_widths)) for x in (q, k, v))
    if mask.window is not None and mask.window >= mask.q_offset + q.shape[1]:
        mask = dataclasses.replace(mask, window=None)  # the window hides no key
    where = sharding.layout(partition, q.shape[0], q.shape[2], k.shape[2])
    _check_context(kernels.opaque, q, where)
    spec = Spec(kernels, scale, jnp.dtype(k.dtype), where)
    out, lse = _attention(spec, q, k, v, mask)
    return out[..., :H], lse.swapaxes(1, 2)


def decode(kernel: Callable, q, k, v, valid, *, scale, partition=None, opaque=True):
    """Computes what `reference.decode` computes, by the kernel given, under the mesh in use.
    q [B Q H], k and v [B S K H]; valid [B]: how many slots count. Returns [B Q H], [B Q]."""
    where = sharding.layout(partition, q.shape[0], q.shape[1], k.shape[2])
    _check_context(opaque, q, where)
    if where is None:
        return kernel(q, k, v, valid, scale=scale)

    def body(q, k, v, valid):
        k, v = (where.my_kv_heads(x, q.shape[1]) for x in (k, v))
        return kernel(q, k, v, valid, scale=scale)

    in_specs = where.specs("bq.", "b.k.", "b.k.", "b")
    out_specs = where.specs("bq.", "bq")
    return sharding.on_each_device(body, where, in_specs, out_specs)(q, k, v, valid)
