"""The four attention operations, their contract, and the choice of the code that runs them.

Layout [batch, positions, heads, head width]: B batch, N query positions, S key positions, Q query
heads, K key/value heads (Q a multiple of K: head q reads key head q // (Q/K)), H head width,
W window = the number of visible keys **including self**.

`implementation` is "auto" or a name. A name runs, or raises UnsupportedCall with the reason. Only
this file chooses. It logs each choice once (logger "pallas_kernels.attention.api").
"""

import functools
import importlib
import logging
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import verdicts
from pallas_kernels.attention import flash, reference, xla
from pallas_kernels.attention.blocks import GPU_HEAD_WIDTHS, TPU_HEAD_WIDTHS, TRITON_HEAD_WIDTHS
from pallas_kernels.attention.flash import Kernels
from pallas_kernels.attention.mask import Mask, SegmentIds
from pallas_kernels.call import Call, UnsupportedCall
from pallas_kernels.device import interpretation, is_here, on_device, target_device
from pallas_kernels.sharding import Partition

logger = logging.getLogger(__name__)

OPERATIONS = ("window_attention", "cross_attention", "decode_window", "decode_cross")


class Implementation(NamedTuple):
    """One way to compute the operations. `attention` and `decode` have the signatures of those in
    reference.py. `unsupported_reason(call)` is None if they can run the call, else a full sentence.
    head_widths: the widths that `attention` computes with; it pads other heads to the next width.
    platform: the only one that it runs on; None: any. Calls for other platforms are refused without
    an import of the module."""

    unsupported_reason: Callable[[Call], str | None]
    attention: Callable | None = None
    decode: Callable | None = None
    head_widths: tuple[int, ...] = ()
    platform: str | None = None


class Choice(NamedTuple):
    """Which implementation runs an operation, and why, in words to print at the start of a run."""

    operation: str
    implementation: str
    reason: str


def _always(call: Call) -> None:
    return None


def _in(module: str, name: str) -> Callable:
    """A function of a module of this package, which is imported when the function is called. To
    import Pallas takes a second, and most processes run the kernels of no accelerator."""

    def call(*args, **kwargs):
        found = importlib.import_module(f"pallas_kernels.attention.{module}")
        return getattr(found, name)(*args, **kwargs)

    return call


def _kernels(module: str, decode_module: str, head_widths, platform) -> Implementation:
    """The kernels of an accelerator. `module` has forward, backward and unsupported_reason."""
    both = Kernels(_in(module, "forward"), _in(module, "backward"))
    return Implementation(
        _in(module, "unsupported_reason"),
        functools.partial(flash.attention, both, head_widths=head_widths),
        functools.partial(flash.decode, _in(decode_module, "decode")),
        head_widths,
        platform,
    )


# "auto" tries them in this order. xla can run every call, so "auto" never takes reference.
_REGISTRY = {
    "pallas_tpu": _kernels("tpu", "tpu_decode", TPU_HEAD_WIDTHS, "tpu"),
    "pallas_gpu": _kernels("gpu", "gpu_decode", GPU_HEAD_WIDTHS, "gpu"),
    "triton": _kernels("triton", "triton", TRITON_HEAD_WIDTHS, "gpu"),
    "cudnn": Implementation(
        *(_in("cudnn", name) for name in ("unsupported_reason", "attention", "decode")),
        platform="gpu",
    ),
    "xla": Implementation(
        _always,
        functools.partial(flash.attention, Kernels(xla.forward, xla.backward, opaque=False)),
        functools.partial(flash.decode, xla.decode, opaque=False),
    ),
    "reference": Implementation(_always, reference.attention, reference.decode),
}
IMPLEMENTATIONS = ("auto", *_REGISTRY)


def unsupported_reason(implementation: str, call: Call) -> str | None:
    """Why `implementation` cannot run `call`, as a full sentence, or None if it can."""
    if implementation not in _REGISTRY:
        known = ", ".join(IMPLEMENTATIONS)
        raise UnsupportedCall(f"implementation={implementation!r} is not one of: {known}.")
    found = _REGISTRY[implementation]
    if found.platform not in (None, call.device.platform) and interpretation() is None:
        needs = {"tpu": "a TPU", "gpu": "an NVIDIA GPU"}.get(found.platform, found.platform)
        return f"{implementation} needs {needs}; this computation is for {call.device.kind}."
    if call.q_shape is not None and not call.decodes:
        H = flash.padded_width(call.q_shape[-1], found.head_widths)
        call = call._replace(q_shape=(*call.q_shape[:-1], H))
    return found.unsupported_reason(call)


def choose_implementation(operation: str, *, implementation: str = "auto", **facts) -> Choice:
    """Decides what runs. `facts` are those fields of `Call` that are known (q_shape=..., dtype=...,
    window=...).

    Raises:
      UnsupportedCall: an unknown implementation, or the one named cannot run this call.
      ValueError: an unknown operation.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation={operation!r} is not one of: {', '.join(OPERATIONS)}.")
    call = Call(operation, **{"device": target_device(), **facts})
    if implementation != "auto":
        if reason := unsupported_reason(implementation, call):
            raise UnsupportedCall(f"{operation} cannot run with {implementation=}: {reason}")
        return Choice(operation, implementation, "asked for by name")
    reasons = ["auto"]
    for name, candidate in _REGISTRY.items():
        with on_device():
            reason = unsupported_reason(name, call)
        if reason is None and candidate.platform is not None and is_here(call.device):
            reason = verdicts.why_not(name, operation, call.device, call.dtype_name)
        if reason is None:
            return Choice(operation, name, "; ".join(reasons))
        if candidate.platform == call.device.platform:
            reasons.append(f"not {name}: {reason.rstrip('.')}")
    raise AssertionError("xla supports every call")


def check_kernels() -> None:
    """Makes the verdicts that "auto" will ask for, if this machine has an accelerator and no start
    has made them before (`verdicts.before_start`). Call it before jax has started. On a CPU it does
    nothing."""
    for platform, ids in verdicts.accelerators().items():
        names = [name for name, found in _REGISTRY.items() if found.platform == platform]
        verdicts.before_start(names, ids, platform)


def agree_on_kernels() -> None:
    """In a run of several processes on accelerators, each must call this before "auto" can take a
    kernel (`verdicts.agree`)."""
    device = target_device()
    if is_here(device) and jax.process_count() > 1:
        # The same in every process, even if one of them lacks a package.
        names = [name for name, found in _REGISTRY.items() if found.platform == device.platform]
        verdicts.agree(names, OPERATIONS, device)


@functools.cache
def _log_once(choice: Choice) -> None:
    logger.info("%s runs on %s (%s)", *choice)


def _select(implementation: str, call: Call) -> Implementation:
    choice = choose_implementation(implementation=implementation, **call._asdict())
    _log_once(choice)
    return _REGISTRY[choice.implementation]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _check_heads(operation, q, k, v):
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    _require(
        k.ndim == 4 and k.shape == v.shape,
        f"{operation} needs k and v of one shape [B, S, K, H]; got {shapes}.",
    )
    _require(
        q.shape[0] == k.shape[0] and q.shape[-1] == k.shape[-1],
        f"{operation} needs q, k and v to agree in batch and head width; got {shapes}.",
    )
    _require(
        q.shape[-2] % k.shape[-2] == 0,
        f"{operation} needs the number of query heads to be a multiple of the number of "
        f"key/value heads; got {q.shape[-2]} and {k.shape[-2]} ({shapes}).",
    )
    _require(min(q.shape + k.shape) > 0, f"{operation} needs no axis of length 0; got {shapes}.")
    _require(
        jnp.issubdtype(q.dtype, jnp.floating)
        and k.dtype == v.dtype
        and k.dtype in (q.dtype, jnp.float32),
        f"{operation} needs q, k and v of one floating dtype, or k and v in float32; got "
        f"{q.dtype}, {k.dtype} and {v.dtype}.",
    )


def _check_rows(operation, name, x, B):
    _require(
        x.shape == (B,) and jnp.issubdtype(x.dtype, jnp.integer),
        f"{operation} needs {name} as {B} integers, one per row; got {x.dtype}{x.shape}.",
    )


def _clipped(lengths, S: int):
    return jnp.clip(lengths, 0, S).astype(jnp.int32)


def _segments(operation, segment_ids, q, k) -> SegmentIds | None:
    if segment_ids is None:
        return None
    if not isinstance(segment_ids, SegmentIds):
        _require(
            q.shape[1] == k.shape[1],
            f"{operation} needs SegmentIds(q=[B, N], kv=[B, S]) when there are "
            f"{q.shape[1]} queries and {k.shape[1]} keys; got one array.",
        )
        segment_ids = SegmentIds(segment_ids, segment_ids)
    for name, ids, x in zip(("q", "kv"), segment_ids, (q, k), strict=True):
        _require(
            ids.shape == x.shape[:2] and jnp.issubdtype(ids.dtype, jnp.integer),
            f"{operation} needs integer segment ids of shape {x.shape[:2]} for {name}; "
            f"got {ids.dtype}{ids.shape}.",
        )
    return segment_ids


def _mask(operation, q, k, v, window, q_offset, segment_ids, kv_lengths) -> Mask:
    """Checks the arrays, and says who sees whom."""
    _require(q.ndim == 4, f"{operation} needs q as [B, N, Q, H]; got shape {q.shape}.")
    _check_heads(operation, q, k, v)
    q_offset = operator.index(q_offset)
    _require(q_offset >= 0, f"{operation} needs {q_offset=} to be at least 0.")
    if kv_lengths is not None:
        _check_rows(operation, "kv_lengths", kv_lengths, q.shape[0])
        kv_lengths = _clipped(kv_lengths, k.shape[1])
    if window is not None:
        window = min(window, q_offset + q.shape[1])  # even this one hides no key
    return Mask(window, q_offset, kv_lengths, _segments(operation, segment_ids, q, k))


def _scale(scale: float | None, q) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _attention(operation, q, k, v, mask: Mask, scale, return_lse, implementation, partition):
    call = Call(
        operation,
        target_device(q),
        q_shape=q.shape,
        k_shape=k.shape,
        dtype=q.dtype,
        window=mask.window,
        segments=mask.segments is not None,
        lengths=mask.lengths is not None,
        q_offset=mask.q_offset,
        return_lse=return_lse,
    )
    attend = _select(implementation, call).attention
    out, lse = attend(q, k, v, mask, scale=_scale(scale, q), partition=partition)
    return (out, lse) if return_lse else out


def window_attention(
    q: Float[Array, "B N Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    window: int,
    q_offset: int = 0,
    segment_ids: SegmentIds | Int[Array, "B N"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    partition: Partition | None = None,
):
    """Causal attention over the last W = `window` positions, the query's own included.

    Args:
      q_offset: position of q[:, 0]; k[:, 0] has position 0.
      segment_ids: documents that must not see each other; one array if N == S.
      scale: multiplies q . k. None: H ** -0.5.
      partition: the mesh axes that split batch rows and heads; each device then runs the kernel on
        its own share. Without it a kernel under a mesh of several devices is not split.

    Returns:
      [B, N, Q, H] in the dtype of q; with return_lse also the natural log of the sum of the
      exponentials of the scores (lse), fp32 [B, N, Q]. A query that sees no key has the output 0,
      the lse `MASKED` (-1e30, finite) and gradients of 0.

    Raises:
      UnsupportedCall: the implementation named cannot run this call.
      ValueError: shapes or dtypes that do not fit, window < 1.
    """
    window = operator.index(window)
    _require(window >= 1, f"window_attention needs {window=} to be at least 1 (it counts self).")
    mask = _mask("window_attention", q, k, v, window, q_offset, segment_ids, None)
    how = scale, return_lse, implementation, partition
    return _attention("window_attention", q, k, v, mask, *how)


def cross_attention(
    q: Float[Array, "B N Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_offset: int = 0,
    kv_lengths: Int[Array, " B"] | None = None,
    segment_ids: SegmentIds | Int[Array, "B N"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    partition: Partition | None = None,
):
    """Causal attention over all keys up to the query's own. Cross layers call it with the global K
    and V: the name comes from YOCO's cross-decoder. `full` layers call it with their own k and v:
    then it is ordinary causal self-attention.

    kv_lengths: only the first kv_lengths[b] keys of row b exist. k and v may be float32 when q is
    bfloat16: they are read in bfloat16, and their gradients are returned in float32. So layers that
    share k and v sum these gradients in float32. The rest is as in `window_attention`.
    """
    mask = _mask("cross_attention", q, k, v, None, q_offset, segment_ids, kv_lengths)
    how = scale, return_lse, implementation, partition
    return _attention("cross_attention", q, k, v, mask, *how)


def _decode(operation, q, k, v, lengths, scale, return_lse, implementation, partition):
    _require(q.ndim == 3, f"{operation} needs q as [B, Q, H], one query per row; got {q.shape}.")
    _check_heads(operation, q, k, v)
    _check_rows(operation, "lengths", lengths, q.shape[0])
    call = Call(
        operation,
        target_device(q),
        q_shape=q.shape,
        k_shape=k.shape,
        dtype=q.dtype,
        return_lse=return_lse,
    )
    run, lengths = _select(implementation, call).decode, _clipped(lengths, k.shape[1])
    out, lse = run(q, k, v, lengths, scale=_scale(scale, q), partition=partition)
    return (out, lse) if return_lse else out


def decode_window(
    q: Float[Array, "B Q H"],
    k_ring: Float[Array, "B W K H"],
    v_ring: Float[Array, "B W K H"],
    lengths: Int[Array, " B"],
    *,
    scale: float | None = None,
    implementation: str = "auto",
    partition: Partition | None = None,
) -> Float[Array, "B Q H"]:
    """One query per row over the last W keys, the query's own included. They are in a ring buffer
    of W slots, in which a new key replaces the oldest one.

    lengths[b] counts the positions written to row b so far; the first min(lengths[b], W) slots are
    valid. Their order does not matter: a softmax has no order, and RoPE is applied to a key before
    it is stored. A row of length 0 gives 0.
    """
    how = scale, False, implementation, partition
    return _decode("decode_window", q, k_ring, v_ring, lengths, *how)


def decode_cross(
    q: Float[Array, "B Q H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, " B"],
    *,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    partition: Partition | None = None,
):
    """One query per row over the first lengths[b] keys of a cache, the query's own included: of the
    global cache in a cross layer, of its own cache in a full layer.

    Returns [B, Q, H]; with return_lse also the lse, fp32 [B, Q], as `window_attention`. A row of
    length 0 gives 0 and MASKED."""
    how = scale, return_lse, implementation, partition
    return _decode("decode_cross", q, k_cache, v_cache, lengths, *how)
