"""Attention over sequences that the mesh axis "context" splits: exact, with little communication.

Every device has the queries, keys and values of N / C consecutive positions. What is missing comes
from the other devices:

* A window layer needs the W - 1 positions before its own. The left neighbor sends them, with one
  collective permute; further neighbors too, if W - 1 is more than the N / C positions of one
  device. Meanwhile the device attends to its own positions.
* The global K, V are gathered once for all cross layers (`share`). Their gradients are summed over
  the layers on each device in float32, and are then reduced over the devices once. The same holds
  for heads that several devices read (`own_heads`, also without this axis).
* The last positions see the most keys, and have the most work in cross layers. So `deal` gives
  each device two half shards of rows before the cross-decoder: one from the beginning and its
  mirror image from the end. All devices then see equally many keys. `deal` again restores the
  order.
* A full layer gathers the keys and values of its own. Its rows are not dealt.
* In inference, the chunks of a prompt are split like sequences of training, and the ring of a
  window layer has the positions before a chunk. Each device stores a part of the slots of a cache.
  It attends to these, and the results are joined by their lse: a decode step moves outputs of one
  position, and no keys.

A kernel needs to know at compile time which keys its queries may see, but the devices run one
program and have different positions. So each attention has two parts with fixed masks: keys before
the shard, which all its queries see (`kv_lengths` says how many there are), and causal attention to
the keys of the shard. `join` combines them.
"""

import functools
import itertools
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import SegmentIds, api, join, sharding
from pallas_kernels.attention.mask import MASKED
from yocou_jax.model.memory import KeyValue
from yocou_jax.sharding import (
    LOGICAL_AXES,
    attention_partition,
    axes_of_one_device,
    gather,
    length_ways,
)
from yocou_jax.typing import Array, Float, Int

(AXIS,) = LOGICAL_AXES["length"]


@flax.struct.dataclass
class SharedKeyValue:
    """The global K, V for the cross layers of all C devices of a context group.

    every [C, B, S, K, H]: one copy of all S positions on each device; the axis C is split.
    own [B, N, K, H]: those of the positions whose queries the device has, in the order of `deal`.
    """

    every: KeyValue
    own: KeyValue


def _ways() -> int:
    return jax.sharding.get_abstract_mesh().shape[AXIS]


def _rows(where: sharding.Layout) -> tuple[str, ...] | None:
    """The mesh axes that split the rows of a batch."""
    return where.batch + axes_of_one_device() or None


class _Specs:
    """How the mesh splits the arrays of a call with B rows, Q query and K key/value heads.

    The shard_maps are over all axes of the mesh: XLA would gather the rows too, if it had to split
    them inside of a shard_map over "context" alone.
    """

    def __init__(self, B: int, Q: int = 1, K: int = 1):
        self.where = sharding.layout(attention_partition(), B, Q, K)
        rows = _rows(self.where)
        heads = self.where.kv_heads or None
        self.x = P(rows, AXIS)
        self.q = P(rows, AXIS, self.where.heads or None)
        self.kv = P(rows, AXIS, heads)
        self.whole_kv = P(rows, None, heads)
        self.every_kv = P(AXIS, rows, None, heads)
        self.ids = P(rows)

    def run(self, body: Callable, in_specs, out_specs) -> Callable:
        return sharding.on_each_device(body, self.where, in_specs, out_specs)

    def sent(self, kv):
        """Keys and values as the shard_map gets them. If each device has all heads, their gradients
        are summed over the devices: then in float32, as in flash.py."""
        if self.where.kv_heads == self.where.heads:
            return kv
        return jax.tree.map(lambda x: x.astype(jnp.float32), kv)

    def mine(self, kv, q):
        """Inside: of all heads of kv, those that the heads of q read."""
        return jax.tree.map(lambda x: self.where.my_kv_heads(x, q.shape[2]), kv)


def _ids(segment_ids, first, length: int):
    """The ids of `length` positions from `first` on, or None."""
    if segment_ids is None:
        return None
    return jax.lax.dynamic_slice_in_dim(segment_ids, first, length, 1)


def _pair(q_ids, kv_ids) -> SegmentIds | None:
    return None if q_ids is None else SegmentIds(q_ids, kv_ids)


# --- Window layers --------------------------------------------------------------------------------


def window_attention(
    q: Float[Array, "B N Q H"],
    kv: KeyValue,
    *,
    window: int,
    segment_ids: Int[Array, "B N"] | None = None,
    before: tuple[KeyValue, Int[Array, "B W"]] | None = None,
    **options,
) -> Float[Array, "B N Q H"]:
    """`api.window_attention` with split positions; segment_ids are whole. before: in inference, the
    W positions before the first one, and whether each exists (then there are no segment_ids)."""

    specs = _Specs(q.shape[0], q.shape[2], kv.k.shape[2])

    def local(q, kv, ids, before):
        kv = specs.mine(kv, q)
        k, v, n, shard = kv.k, kv.v, q.shape[1], jax.lax.axis_index(AXIS)
        first = shard * n
        mine = _ids(ids, first, n)
        run = functools.partial(api.window_attention, window=window, return_lse=True, **options)
        result = run(q, k, v, segment_ids=_pair(mine, mine))
        both, left = jnp.concatenate([k, v], axis=2), window - 1
        if before is not None:
            earlier = specs.mine(before[0], q)
            before = jnp.concatenate([earlier.k, earlier.v], axis=2), before[1]
        for hops in range(1, _ways()) if before is None else itertools.count(1):
            if left <= 0:
                break
            # The last positions of a neighbor, and the first queries of this shard: no other query
            # is near enough. The first shards have no such neighbor, and receive zeros.
            size = min(n, left)
            left -= size
            pairs = [(i, i + hops) for i in range(_ways() - hops)]
            last = both[:, n - size :]
            received = jax.lax.ppermute(last, AXIS, pairs) if pairs else jnp.zeros_like(last)
            exists, end, pair = shard >= hops, first - (hops - 1) * n, None
            if before is not None:
                received, pair = _from_ring(received, exists, before, end, size)
            elif ids is not None:
                pair = _pair(mine[:, :size], _ids(ids, jnp.maximum(end - size, 0), size))
            k, v = jnp.split(received, 2, axis=2)
            offset = (hops - 1) * n + size
            out, lse = run(q[:, :size], k, v, q_offset=offset, segment_ids=pair)
            part = out, jnp.where(exists | (before is not None), lse, MASKED)
            head = join(*(tuple(x[:, :size] for x in result), part))
            result = tuple(
                jnp.concatenate([new, old[:, size:]], axis=1)
                for new, old in zip(head, result, strict=True)
            )
        return result[0]

    ring = P() if before is None else (specs.whole_kv, specs.ids)
    run_all = specs.run(local, (specs.q, specs.kv, specs.ids, ring), specs.q)
    return run_all(q, specs.sent(kv), segment_ids, before)


def _from_ring(received, has_neighbor, before, end, size: int):
    """The `size` keys and values before position `end` of the chunk, and their SegmentIds: what the
    neighbor sent, or, if there is none, positions before the chunk."""
    both, exists = before
    W = both.shape[1]
    at = jnp.clip(W + end - size, 0, W - size)
    earlier, exists = (jax.lax.dynamic_slice_in_dim(x, at, size, 1) for x in (both, exists))
    exists = jnp.where(has_neighbor, 1, exists)
    return jnp.where(has_neighbor, received, earlier), _pair(jnp.ones_like(exists), exists)


# --- All keys -------------------------------------------------------------------------------------


def _causal(q, every: KeyValue, own: KeyValue, starts, ids, options):
    """Causal attention of the rows of one device, which are equal pieces, one for each of `starts`:
    the positions where they begin. every: keys of all positions; own: those of the rows."""
    pieces, S = len(starts), every.k.shape[1]
    B, n = q.shape[0], q.shape[1] // pieces

    def stacked(x):  # the pieces as rows of the batch
        return x.reshape(B * pieces, n, *x.shape[2:])

    def spread(x):
        return x.reshape(B, pieces * n, *x.shape[2:])

    mine = None if ids is None else jnp.concatenate([_ids(ids, s, n) for s in starts], axis=1)
    rows = None if ids is None else stacked(mine)
    run = functools.partial(api.cross_attention, return_lse=True, **options)
    own = run(stacked(q), stacked(own.k), stacked(own.v), segment_ids=_pair(rows, rows))
    before = [
        run(
            *(q[:, i * n : (i + 1) * n], every.k, every.v),
            q_offset=S,  # so that every query sees all keys that kv_lengths leaves
            kv_lengths=jnp.full(B, start, jnp.int32),
            segment_ids=_pair(None if ids is None else mine[:, i * n : (i + 1) * n], ids),
        )
        for i, start in enumerate(starts)
    ]
    earlier = tuple(jnp.concatenate(parts, axis=1) for parts in zip(*before, strict=True))
    return join(tuple(spread(x) for x in own), earlier)


def full_attention(
    q: Float[Array, "B N Q H"],
    kv: KeyValue,
    prefix: KeyValue | None,
    *,
    segment_ids: Int[Array, "B N"] | None = None,
    **options,
) -> tuple[Float[Array, "B N Q H"], Float[Array, "B N Q"]]:
    """Causal attention to keys that are split too, and its lse. prefix: learned keys and values,
    which every query sees."""

    specs = _Specs(q.shape[0], q.shape[2], kv.k.shape[2])

    def local(q, kv, prefix, ids):
        kv = specs.mine(kv, q)
        every = jax.tree.map(lambda x: gather(x.astype(jnp.float32), AXIS, 1, q.dtype), kv)
        starts = [jax.lax.axis_index(AXIS) * q.shape[1]]
        result = _causal(q, every, kv, starts, ids, options)
        if prefix is not None:
            prefix = specs.mine(prefix, q)
            size = prefix.k.shape[1]
            seen = api.cross_attention(
                *(q, prefix.k, prefix.v), q_offset=size, return_lse=True, **options
            )
            result = join(result, seen)
        return result

    in_specs = specs.q, specs.kv, specs.whole_kv, specs.ids
    run = specs.run(local, in_specs, (specs.q, specs.q))
    prefix = jax.tree.map(lambda x: x.astype(jnp.float32), prefix)  # all shards add to its gradient
    return run(q, specs.sent(kv), prefix, segment_ids)


# --- A cache --------------------------------------------------------------------------------------


def attend_to_cache(
    q: Float[Array, "B N Q H"], cache: KeyValue, lengths: Int[Array, " B"], **options
) -> tuple[Float[Array, "B N Q H"], Float[Array, "B N Q"]]:
    """Attention of N queries of each row to the first `lengths` slots of a cache, whose slots are
    split; and its lse. If the queries are split, each device gets all of them."""
    N, specs = q.shape[1], _Specs(q.shape[0], q.shape[2], cache.k.shape[2])
    split = length_ways(N) > 1

    def local(q, kv, lengths):
        if split:
            q = jax.lax.all_gather(q, AXIS, axis=1, tiled=True)
        kv = specs.mine(kv, q)
        k, v, slots = kv.k, kv.v, kv.k.shape[1]
        here = lengths - jax.lax.axis_index(AXIS) * slots
        if N == 1:
            found = api.decode_cross(q[:, 0], k, v, here, return_lse=True, **options)
            out, lse = (x[:, None] for x in found)
        else:  # so late that every query sees all keys that kv_lengths leaves
            out, lse = api.cross_attention(
                q, k, v, q_offset=slots, kv_lengths=here, return_lse=True, **options
            )
        top = jax.lax.pmax(lse, AXIS)
        weight = jnp.exp(lse - top)
        sums = [weight[..., None] * out, weight]
        if split:
            add = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True)
            n = N // _ways()
            top = jax.lax.dynamic_slice_in_dim(top, jax.lax.axis_index(AXIS) * n, n, 1)
        else:
            add = jax.lax.psum
        out, total = (add(x, AXIS) for x in sums)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    mine = specs.q if split else P(specs.q[0], None, specs.q[2])
    run = specs.run(local, (mine, specs.kv, specs.ids), (mine, mine))
    return run(q, cache, lengths)


# --- The global K, V ------------------------------------------------------------------------------


def deal(x: Array) -> Array:
    """x [B, N, ...]: every device swaps the second half of its rows with its mirror image, so that
    device c of C has the half shards 2c and 2 (C - 1 - c) + 1 of 2C. Twice, it changes nothing."""

    def local(x):
        first, second = jnp.split(x, 2, axis=1)
        mirror = [(i, _ways() - 1 - i) for i in range(_ways())]
        return jnp.concatenate([first, jax.lax.ppermute(second, AXIS, mirror)], axis=1)

    specs = _Specs(x.shape[0])
    return specs.run(local, specs.x, specs.x)(x)


def _dealt_starts(n: int) -> list:
    """The positions where the two halves of n dealt rows begin, on this device."""
    shard, half = jax.lax.axis_index(AXIS), n // 2
    return [2 * shard * half, (2 * (_ways() - 1 - shard) + 1) * half]


def own_heads(kv: KeyValue, num_heads: int) -> KeyValue:
    """kv [B, N, K, H] with copies of its heads, [B, N, J, H], if the mesh splits the `num_heads`
    query heads over more devices than it can split K heads: then each device has the one head that
    its query heads read, or one for each of them. J counts the heads of all these devices. If a
    device would have more than K, and in all other cases, kv as it is.

    Without this, each device would have all K heads, and each cross layer would sum their gradients
    over the devices. Here they are summed once, in float32, as kv is.
    """
    B, N, K, _ = kv.k.shape
    where = sharding.layout(attention_partition(), B, num_heads, K)
    if where is None or where.kv_heads == where.heads:
        return kv
    mesh = jax.sharding.get_abstract_mesh()
    queries = num_heads // math.prod(mesh.shape[axis] for axis in where.heads)  # of a device
    if where.group % queries and queries > K:  # heads of several groups, with copies
        return kv
    rows, length = _rows(where), AXIS if length_ways(N) > 1 else None
    return sharding.on_each_device(
        lambda kv: jax.tree.map(lambda x: where.my_kv_heads(x, queries), kv),
        where,
        P(rows, length),
        P(rows, length, where.heads),
    )(kv)


def share(kv: KeyValue, num_heads: int, dtype: jnp.dtype) -> SharedKeyValue:
    """Gathers the global K, V, which are float32 with values that `dtype` can hold. num_heads: of
    the queries, which decide how heads are split.

    Each device gets a copy of its own, so the gradients of the layers are added without any
    communication; the gradient of this function reduces them, in float32.
    """

    def local(kv):
        n = kv.k.shape[1]
        every = jax.tree.map(lambda x: gather(x, AXIS, 1, dtype), kv)
        own = jax.tree.map(
            lambda x: jnp.concatenate(
                [jax.lax.dynamic_slice_in_dim(x, start, n // 2, 1) for start in _dealt_starts(n)],
                axis=1,
            ),
            every,
        )
        return SharedKeyValue(jax.tree.map(lambda x: x[None], every), own)

    B, _, K, _ = kv.k.shape
    specs = _Specs(B, num_heads, K)
    return specs.run(local, specs.kv, SharedKeyValue(specs.every_kv, specs.kv))(kv)


def cross_attention(
    q: Float[Array, "B N Q H"],
    shared: SharedKeyValue,
    *,
    segment_ids: Int[Array, "B N"] | None,
    **options,
) -> Float[Array, "B N Q H"]:
    """Causal attention of dealt rows to the global K, V."""

    specs = _Specs(q.shape[0], q.shape[2], shared.own.k.shape[2])

    def local(q, shared, ids):
        every, own = jax.tree.map(lambda x: x[0], shared.every), shared.own
        every, own = specs.mine(every, q), specs.mine(own, q)
        return _causal(q, every, own, _dealt_starts(q.shape[1]), ids, options)[0]

    in_specs = specs.q, SharedKeyValue(specs.every_kv, specs.kv), specs.ids
    return specs.run(local, in_specs, specs.q)(q, shared, segment_ids)
