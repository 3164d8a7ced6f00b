"""Attention on TPUs: one template for the window and full causal attention.

Why it exists: XLA has no fused attention on TPUs. jax's splash attention reads every K/V head once
per query head, steps through a window block by block with a running softmax, and takes its masks
from tables that the host makes. Here one grid step handles the window's whole band: the bq + W - 1
keys that bq queries see. The G query heads of a group share the keys as rows of one product. Only
tiles on an edge of the band are masked.

How it rounds: products of bf16 inputs accumulate in fp32; scores, softmax and all sums are fp32, in
base 2; p and ds are rounded to the input dtype before their products. It is deterministic.

Compiled for v5e, v5p, v6e and tpu7x. Never ran on a device (README.md).

Shapes inside: q [B K G N H], k and v [B K S H], lse and delta [B K G N]. Positions and head width
are the last axes, so that a head's block is one matrix. XLA makes the transposes. It can choose
layouts that make them free; nobody has examined whether it does so in a model.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import mask as masks
from pallas_kernels.attention import tpu_kernels
from pallas_kernels.attention.blocks import (
    TPU_HEAD_WIDTHS,
    TPU_LANES,
    TPU_VMEM,
    tpu_blocks,
    tpu_form,
)
from pallas_kernels.attention.flash import Spec, kernel_name, padded, round_up, work
from pallas_kernels.attention.tpu_bands import Bands, Ceilings, Tiles
from pallas_kernels.call import Call
from pallas_kernels.device import interpretation, target_device

_DTYPES = ("bfloat16", "float32")


def unsupported_reason(call: Call) -> str | None:
    """See api.Implementation. Interpreted kernels take any head width."""
    interpreted = interpretation() is not None
    if not interpreted and call.device.kind not in TPU_VMEM:
        known = ", ".join(TPU_VMEM)
        return f"The TPU kernels were compiled for {known} only; this is {call.device.kind}."
    if call.dtype_name not in (None, *_DTYPES):
        return f"The TPU kernels take {' or '.join(_DTYPES)}; got {call.dtype_name}."
    if interpreted or call.q_shape is None:
        return None
    H = call.head_width
    if H not in TPU_HEAD_WIDTHS:
        widths = ", ".join(map(str, TPU_HEAD_WIDTHS))
        return f"The TPU kernels take heads of width {widths}; got {H}."
    if call.k_shape is not None and call.dtype is not None and not call.decodes:
        need, have = _vmem(call), TPU_VMEM[call.device.kind]
        if need > have:
            return (
                f"The TPU kernels would need some {need >> 20} MB of VMEM for "
                + (f"a window of {call.window}" if call.window else "full attention")
                + f" and {call.group} heads of {H} per group; "
                f"{call.device.kind} leaves them {have >> 20} MB."
            )
    return None


def _vmem(call: Call) -> int:
    """Roughly the bytes of VMEM of the largest kernel: its blocks (twice, because the next ones are
    copied at the same time), its sums, and the temporary arrays of a tile."""
    G, H = call.group, call.head_width
    item = jnp.dtype(call.dtype).itemsize
    largest = 0
    for kernel in ("forward", "dq", "dkv"):
        blocks = tpu_blocks(kernel, G, call.window)
        outer, inner = (blocks.kv, blocks.q) if kernel == "dkv" else (blocks.q, blocks.kv)
        if call.window is not None:
            inner = outer + call.window + TPU_LANES
        rows, keys = (G * inner, outer) if kernel == "dkv" else (G * outer, inner)
        arrays = 2 * (3 * rows + 4 * keys) * H * item
        sums = 4 * (2 * keys if kernel == "dkv" else rows) * (H + 2 * TPU_LANES)
        tile = 12 * min(rows if kernel == "forward" else 512, rows) * min(blocks.compute, inner)
        if kernel == "forward" and tpu_form(call.device.kind, H).ceilings:
            tile += 4 * math.prod(Ceilings(call.window, outer, blocks.compute, 0).shape)
        largest = max(largest, arrays + sums + tile)
    return largest


def call_kernel(
    kernel,
    name,
    grid,
    in_specs,
    out_specs,
    out_shape,
    scratch,
    cost,
    scalars,
    *args,
    ordered=False,
):
    """ordered: one core runs all grid steps, so that what a step leaves in scratch stays there."""
    mode = interpretation()
    interpret = mode is not None
    if mode is not None and mode.detect_races:
        # One core alone has no races.
        interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                *["arbitrary" if ordered else "parallel"] * (len(grid) - 1),
                "arbitrary",
            ),
            vmem_limit_bytes=TPU_VMEM.get(target_device(args[0]).kind),
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*scalars, *args)


def whole_block(n: int) -> int:
    """The size of a block that holds n positions: a power of two. Mosaic does not compile the
    gradients with a block of 384 and three heads in a group."""
    return TPU_LANES << (-(-n // TPU_LANES) - 1).bit_length()


class _Operands:
    """The arrays of one call, padded and in the kernels' layout, and the specs of their blocks."""

    def __init__(self, spec: Spec, kernel: str, q, k, mask: masks.Mask):
        self.B, self.N, Q, self.H = q.shape
        self.S, self.K = k.shape[1:3]
        self.G = Q // self.K
        self.mask, self.work = mask, work(kernel, q, k, mask)
        self.outer = "keys" if kernel == "dkv" else "queries"
        kind = target_device(q).kind
        self.form = tpu_form(kind, self.H)
        blocks = tpu_blocks(kernel, self.G, mask.window)
        bq = min(blocks.q, whole_block(self.N))
        bk = min(blocks.kv, whole_block(self.S))
        # With a window, the band is one piece of the inner axis; else it is cut into blocks.
        inner, ahead = (bk if self.outer == "queries" else bq), None
        if mask.window is not None:
            inner, ahead = TPU_LANES, mask.window - 1
        if self.outer == "queries":
            self.N_pad, self.S_pad = round_up(self.N, bq), round_up(self.S, inner)
            self.blocks = self.N_pad // bq
            self.bands = Bands.plan(bq, inner, self.S_pad, mask.q_offset, ahead, 0)
        else:
            self.N_pad, self.S_pad = round_up(self.N, inner), round_up(self.S, bk)
            self.blocks = self.S_pad // bk
            self.bands = Bands.plan(bk, inner, self.N_pad, -mask.q_offset, 0, ahead)
        self.bc = next(
            size for size in range(blocks.compute, 0, -TPU_LANES) if self.bands.size % size == 0
        )
        self.grid = (self.B, self.K, self.blocks, self.bands.steps)
        self.tiles = Tiles(
            mask.window,
            mask.q_offset,
            spec.scale,
            self.S,
            padded=self.S_pad > self.S and mask.q_offset + self.N > self.S,
            segments=mask.segments is not None,
            lengths=mask.lengths is not None,
        )

    def queries(self, x):
        """[B N Q H] -> [B K G N H]"""
        x = x.reshape(self.B, self.N, self.K, self.G, self.H).transpose(0, 2, 3, 1, 4)
        return padded(x, 3, self.N_pad)

    def queries_back(self, x):
        x = x[:, :, :, : self.N].transpose(0, 3, 1, 2, 4)
        return x.reshape(self.B, self.N, -1, self.H)

    def keys(self, x):
        """[B S K H] -> [B K S H]"""
        return padded(x.swapaxes(1, 2), 2, self.S_pad)

    def stats(self, x):
        """[B Q N] -> [B K G N]"""
        return padded(x.reshape(self.B, self.K, self.G, self.N), 3, self.N_pad)

    def ids(self):
        """[B 1 N] and [B 1 S], or two Nones."""
        if self.mask.segments is None:
            return None, None
        q_ids, k_ids = (x[:, None].astype(jnp.int32) for x in self.mask.segments)
        return padded(q_ids, 2, self.N_pad), padded(k_ids, 2, self.S_pad)

    def scalars(self):
        """lengths and the ranges of segment ids, for Scalars."""
        lengths = self.mask.lengths
        lengths = jnp.zeros(self.B, jnp.int32) if lengths is None else lengths
        if self.mask.segments is None:
            nothing = jnp.zeros((1, 1), jnp.int32)
            return lengths, nothing, nothing

        def ranges(ids):
            blocks = ids.reshape(self.B, -1, TPU_LANES)
            return jnp.stack([blocks.min(2), blocks.max(2)], 1).reshape(2 * self.B, -1)

        return lengths, *(ranges(ids) for ids in self.ids())

    def _spec(self, axis: str, before: tuple[int, ...], after: tuple[int, ...], heads=True):
        """The part of an array with the positions of `axis` (queries or keys) that a grid step
        sees: a block of the outer axis, or a band of the inner one. Other axes are whole."""
        lead = 2 if heads else 1

        def index(b, h, i, j, lengths, *_):
            limit = lengths[b] if self.tiles.lengths and self.outer == "queries" else None
            here = i if axis == self.outer else self.bands.start(i, j, limit)
            return (b, h)[:lead] + (0,) * len(before) + (here,) + (0,) * len(after)

        shape = (*before, self.bands.block, *after)
        if axis != self.outer:
            shape = tuple(pl.Element(n) for n in (*before, self.bands.size, *after))
        return pl.BlockSpec((pl.squeezed,) * lead + shape, index)

    def query_spec(self):
        return self._spec("queries", (self.G,), (self.H,))

    def key_spec(self):
        return self._spec("keys", (), (self.H,))

    def stat_spec(self):
        return self._spec("queries", (self.G,), ())

    def ids_specs(self):
        if self.mask.segments is None:
            return None, None
        return tuple(self._spec(x, (1,), (), heads=False) for x in ("queries", "keys"))

    def sums_shape(self):
        """Of the sums of dq, and of those of dk and dv."""
        sums = self.bands.block, self.H
        lead = (self.G,) if self.outer == "queries" else ()
        return (*lead, *(sums[::-1] if self.form.transposed else sums))

    def cost(self, arrays) -> pl.CostEstimate:
        flops, exponentials = self.work
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
        return pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=moved)


def forward(spec: Spec, q, k, v, mask: masks.Mask):
    """Shapes, dtypes and results: see flash.Kernels."""
    o = _Operands(spec, "forward", q, k, mask)
    R = o.G * o.bands.block
    width = round_up(o.H + 1, TPU_LANES) if o.form.sums_on_mxu else o.H
    scratch, ceilings = [(R, TPU_LANES), (R, TPU_LANES), (R, width)], None
    if o.form.ceilings:
        ceilings = Ceilings(mask.window, o.bands.block, o.bc, mask.q_offset % TPU_LANES)
        scratch.append(ceilings.shape)
    args = (o.queries(q), o.keys(k), o.keys(v), *o.ids())
    out_shape = (
        jax.ShapeDtypeStruct(args[0].shape, q.dtype),
        jax.ShapeDtypeStruct(args[0].shape[:-1], jnp.float32),
    )
    out, lse = call_kernel(
        functools.partial(tpu_kernels.forward_kernel, o.tiles, o.bands, o.bc, ceilings),
        kernel_name("forward", "pallas_tpu", mask.window),
        o.grid,
        (o.query_spec(), o.key_spec(), o.key_spec(), *o.ids_specs()),
        (o.query_spec(), o.stat_spec()),
        out_shape,
        scratch,
        o.cost((args, out_shape)),
        o.scalars(),
        *args,
        ordered=o.form.ceilings,
    )
    return o.queries_back(out), lse[..., : o.N].reshape(o.B, -1, o.N)


def backward(spec: Spec, q, k, v, mask: masks.Mask, lse2, delta, d_out):
    """Shapes, dtypes and results: see flash.Kernels."""

    def gradients(kernel, name, out_shapes, out_spec):
        o = _Operands(spec, name, q, k, mask)
        args = (o.queries(q), o.keys(k), o.keys(v), *o.ids())
        args += (o.queries(d_out), o.stats(lse2), o.stats(delta))
        rows = (o.query_spec(), o.stat_spec(), o.stat_spec())
        out_shape = out_shapes(*args[:2])
        out = call_kernel(
            functools.partial(kernel, o.tiles, o.bands, o.bc, o.form.transposed),
            kernel_name(name, "pallas_tpu", mask.window),
            o.grid,
            (o.query_spec(), o.key_spec(), o.key_spec(), *o.ids_specs(), *rows),
            (out_spec(o),) * len(out_shape),
            out_shape,
            [o.sums_shape()] * len(out_shape),
            o.cost((args, out_shape)),
            o.scalars(),
            *args,
        )
        return o, out

    o, (dq,) = gradients(
        tpu_kernels.dq_kernel,
        "dq",
        lambda q, k: (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        _Operands.query_spec,
    )
    _, dkv = gradients(
        tpu_kernels.dkv_kernel,
        "dkv",
        lambda q, k: (jax.ShapeDtypeStruct(k.shape, spec.kv_grad_dtype),) * 2,
        _Operands.key_spec,
    )
    return o.queries_back(dq), *(x[:, :, : o.S].swapaxes(1, 2) for x in dkv)
