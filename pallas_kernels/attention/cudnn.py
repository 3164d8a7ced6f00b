"""cuDNN's fused attention through `jax.nn.dot_product_attention`: for comparison, and for GPUs on
which none of our kernels runs.

Why it exists: others measure against cuDNN's kernels, and these run on every NVIDIA GPU since
Ampere. cuDNN computes less than the contract asks for; `unsupported_reason` says what it leaves to
other implementations. cuDNN has its own backward. So nothing here is named for remat: a layer that
is recomputed runs attention again. And the gradients of k and v are rounded to the dtype of q
before they are returned in float32.

How it rounds: products of bf16 or fp16 accumulate in fp32, softmax is fp32; NVIDIA decides the
rest.

What it runs on: machines on which jax sees an NVIDIA GPU and its cuDNN. Never ran on a device. The
arguments that it gets are tested on the CPU, where jax.nn runs its own implementation.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import Mask
from pallas_kernels.call import Call
from pallas_kernels.device import interpretation, is_here

_LONGEST_HEAD = {True: 256, False: 128}  # from Hopper on, and before


def unsupported_reason(call: Call) -> str | None:
    device = call.device
    if interpretation() is not None:
        return "cuDNN is a library for NVIDIA GPUs; it cannot be interpreted."
    capability = device.compute_capability
    if capability is None:
        return f"cuDNN needs an NVIDIA GPU of known compute capability; this is {device.kind}."
    if not is_here(device):
        return (
            f"cuDNN chooses its kernel on the GPU itself, while jax compiles: {device.kind} is "
            "only named here, not present."
        )
    if capability < 80:
        return f"cuDNN's attention needs compute capability 8.0 (A100) or newer; got {device.kind}."
    if call.dtype_name not in (None, "bfloat16", "float16"):
        return f"cuDNN's attention takes bfloat16 or float16; got {call.dtype_name}."
    if (H := call.head_width) is not None:
        longest = _LONGEST_HEAD[capability >= 90]
        if longest < H or H % 8:
            return (
                f"cuDNN's attention takes heads of a width up to {longest}, a multiple of 8, on "
                f"{device.kind}; got {H}."
            )
    if call.return_lse:
        return "jax.nn rounds cuDNN's lse to the dtype of q and does not differentiate it."
    if call.decodes:
        return None
    if call.segments:
        return "cuDNN's attention is called without segment ids, which it would take only dense."
    if call.q_offset:
        return f"cuDNN counts queries and keys from 0; got q_offset={call.q_offset}."
    if call.q_shape is not None and call.k_shape is not None:
        N, S = call.q_shape[1], call.k_shape[1]
        if N != S:
            return f"cuDNN's causal mask is used for N == S only; got {N} queries and {S} keys."
    return None


def attention(q, k, v, mask: Mask, *, scale, partition=None):
    """As `reference.attention`, q [B N Q H], k and v [B S K H], except that lse is None. jax
    partitions cuDNN's calls by itself, so `partition` is not needed."""
    out = _attend(
        q,
        k,
        v,
        mask.lengths,
        scale,
        is_causal=True,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
    )
    return out, None


def decode(q, k, v, valid, *, scale, partition=None):
    """As `reference.decode`: q [B Q H], k and v [B S K H], valid [B] -> [B Q H], except that lse is
    None."""
    return _attend(q[:, None], k, v, valid, scale)[:, 0], None


def _attend(q, k, v, lengths, scale, **options):
    if lengths is not None:
        options["key_value_seq_lengths"] = jnp.maximum(lengths, 1).astype(jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k.astype(q.dtype), v.astype(q.dtype), scale=scale, implementation="cudnn", **options
    )
    if lengths is not None:  # what cuDNN makes of a row without keys is not documented
        out = jnp.where((lengths > 0)[:, None, None, None], out, 0)
    return out
