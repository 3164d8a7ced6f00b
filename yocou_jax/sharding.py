"""The mesh, and the one table that says how every array is split over it.

Modules name logical axes, and LOGICAL_AXES maps them to mesh axes. All shardings are derived from
this table (`jax.eval_shape` -> specs -> `jit(init, out_shardings=...)`). A new mesh axis needs a
name in MESH_AXES, a field of MeshConfig and of configs/base.py, its rows in LOGICAL_AXES, and, if
it splits parameters, its name in `check_split`. This is enough only for logical axes that the code
can split already.

The axis "context" splits the positions of a sequence. Only attention needs positions of other
devices, and model/context_parallel.py fetches them. Token ids, targets and segment ids are not
split: they are small, and the devices of a context group read the same rows.
"""

import functools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import Partition
from yocou_jax.config import MeshConfig
from yocou_jax.errors import UserError
from yocou_jax.typing import Array, PyTree

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")
REPLICATED_SHARE = 0.25  # if a larger share of the parameters is not split, a warning says so

log = logging.getLogger(__name__)

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),  # the positions of an activation
    "keys": ("context",),  # the positions of a cache
    "activation": (),  # the model width of an activation
    # parameters
    "embed": ("fsdp", "context"),  # the model width of a matrix of parameters
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "head_dim": (),
    "norm": (),
    "streams": (),
    "prefix": (),
    "layers": (),  # the stacked axis of a scan
}


# The config field that sets the size of a logical axis that is split, for messages.
SIZES = {
    "embed": "model.d_model",
    "experts": "model.num_experts",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "mlp": "model.d_ff or model.expert_width",
    "vocab": "model.vocab_size",
}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh with the axes of MESH_AXES over all devices. -1 means all that are left."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    named = math.prod(max(size, 1) for size in sizes.values())
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(devices) % named or (not rest and named != len(devices)):
        raise UserError(_does_not_fit(sizes, named, len(devices)))
    for axis in rest:
        sizes[axis] = len(devices) // named
    shape, kinds = tuple(sizes.values()), (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # no axis of a TPU's torus may be split, but one must be
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        log.warning(
            "The mesh %s splits an axis of the torus of these devices, so neighbors in the mesh "
            "may be far apart. Sizes that are products of those of the torus have faster links.",
            asked,
        )
        found = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(found, MESH_AXES, axis_types=kinds)


def _does_not_fit(sizes: dict[str, int], named: int, devices: int) -> str:
    """Says why a mesh does not fit that many devices, and what would be possible."""
    free = [axis for axis, size in sizes.items() if devices % (named // max(size, 1)) == 0]
    sizes = {axis: size for axis, size in sizes.items() if size != 1} or {"data": 1}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    sentence = f"A mesh of {asked} does not fit {devices} devices"
    others = " * ".join(axis for axis, size in sizes.items() if size != -1)
    if -1 in sizes.values():
        return f"{sentence}: {others} is {named}, which does not divide {devices}."
    hint = f" mesh.{free[0]}=-1 would take all that are left." if free else ""
    return f"{sentence}: {others} is {named} and must be {devices}.{hint}"


def check_length(length: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError if the mesh cannot split sequences of so many positions."""
    ways = mesh.shape["context"]
    if ways > 1 and length % (2 * ways):
        near = max(round(length / (2 * ways)), 1) * 2 * ways
        raise UserError(
            f"data.sequence_length={length} must be a multiple of {2 * ways}, which is 2 * "
            f"mesh.context (each device gets two halves of equal length), for example {near}."
        )


def check_split(boxed: PyTree, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError if a mesh axis splits no parameter: its devices would do the same work.
    (Those of `context` share the positions in any case.)

    If it splits only some parameters, every device stores the others as a whole. If their share is
    more than REPLICATED_SHARE, a warning says so. boxed: parameters with their logical axes.
    """
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for axis in (axis for axis in MESH_AXES[1:] if mesh.shape[axis] > 1):
        ways, whole = mesh.shape[axis], [box for box in boxes if not _is_split(box, mesh, axis)]
        sizes = [pair for box in whole for pair in zip(box.names, box.value.shape, strict=True)]
        uneven = dict.fromkeys(
            f"{size} ({SIZES.get(n, n)})" for n, size in sizes if axis in LOGICAL_AXES.get(n, ())
        )
        # Only what fsdp has split is split over context.
        parts = ways * mesh.shape["fsdp"] if axis == "context" else ways
        reason = f"{parts} does not divide {', '.join(uneven)}"
        reason = reason if uneven else "they have no dimension for it"
        if len(whole) == len(boxes) and axis != "context":
            raise UserError(
                f"mesh.{axis}={ways} would split no parameter: {reason}. Choose another mesh, "
                f"such as mesh.{axis}=1 and more in mesh.data, or other sizes of the model."
            )
        share = sum(box.value.size for box in whole) / sum(box.value.size for box in boxes)
        if share > REPLICATED_SHARE:
            log.warning(
                "mesh.%s=%d leaves %.0f%% of the parameters whole on every device: %s.",
                *(axis, ways, 100 * share, reason),
            )


def whole_dimensions(boxed: PyTree, mesh: Mesh | AbstractMesh) -> list[str]:
    """The dimensions of parameters that stay whole along a mesh axis which does not divide them,
    such as "model.num_kv_heads=2 over tensor". boxed: parameters with their logical axes."""
    found = {}
    for box in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        for name, size in zip(box.names, box.value.shape, strict=True):
            used = split_over(name, size, mesh)
            left = [axis for axis in LOGICAL_AXES.get(name, ()) if mesh.shape[axis] > 1]
            if left := [axis for axis in left if axis not in used]:
                found[f"{SIZES.get(name, name)}={size} over {' * '.join(left)}"] = None
    return list(found)


def _is_split(box: nn.LogicallyPartitioned, mesh, axis: str) -> bool:
    return any(axis in (entry or ()) for entry in spec_for(box.names, box.value.shape, mesh))


def spec_for(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    Mesh axes that do not divide a dimension do not split it (`split_over`), so 2 K/V heads work
    with tensor=4.
    Raises ValueError if two dimensions of one array map to the same mesh axis, or if a name is not
    in the table. Both are mistakes in a module, not in a config.
    """
    if len(axes) != len(shape):
        raise ValueError(f"Logical axes {axes} do not match the shape {shape}.")
    entries, used = [], {}
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f"The logical axis '{name}' of {axes} is not in LOGICAL_AXES.")
        for axis in LOGICAL_AXES[name] if name else ():
            if axis in used:
                raise ValueError(
                    f"Logical axes '{used[axis]}' and '{name}' of {axes} both map to the mesh axis "
                    f"'{axis}'; an array can be split along it only once."
                )
            used[axis] = name
        entries.append(split_over(name, size, mesh) or None)
    return PartitionSpec(*entries)


def constrain(x: Array, *axes: str | None) -> Array:
    """Tells the compiler how to split an activation over the mesh of the context (jax.set_mesh).
    axes: the logical axis of each axis of x; None: not split. Without a mesh it returns x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(axes, x.shape, mesh))


def attention_partition() -> Partition:
    """The mesh axes over which the attention kernels split batch rows and heads."""
    return Partition(batch=LOGICAL_AXES["batch"], heads=LOGICAL_AXES["heads"])


def tree_shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
    """The NamedShardings of a tree of parameters in flax boxes, which name their logical axes.

    Leaves without a box (step counters, scalars of the optimizer) are replicated.
    """

    def one(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec_for(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits sequences over data, fsdp and expert. All devices of a tensor group and of a context
    group have the same ones, as a whole."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_AXES["batch"], None))


def sum_and_split(x: Array, axes: str | tuple[str, ...], dimension: int) -> Array:
    """Inside a shard_map: each device's part, along a dimension, of the sum of x over the devices
    along mesh axes. The sum is computed in the type of x."""
    total = jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
    if total.dtype != jnp.float32:
        return total
    # If all that reads the sum casts it to bfloat16, libtpu adds in bfloat16. It cannot if the bits
    # are read as integers.
    bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(total, jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(x: Array, axes: str | tuple[str, ...], dimension: int, dtype: jnp.dtype) -> Array:
    """Inside a shard_map: x of all devices along mesh axes, joined along a dimension. It has the
    type of x, but is sent in `dtype`. Its gradient is summed over the devices in the type of x."""
    sent = jax.lax.all_gather(x.astype(dtype), axes, axis=dimension, tiled=True)
    return sent.astype(x.dtype)


def _gather_bwd(axes, dimension, dtype, _, g):
    return (sum_and_split(g, axes, dimension),)


gather.defvjp(lambda x, *static: (gather(x, *static), None), _gather_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def scatter(x: Array, axes: str | tuple[str, ...], dimension: int, dtype: jnp.dtype) -> Array:
    """`sum_and_split`. Its gradient is sent in `dtype`, which must be the type that the result is
    cast to next: this then loses nothing."""
    return sum_and_split(x, axes, dimension)


def _scatter_bwd(axes, dimension, dtype, _, g):
    return (gather(g, axes, dimension, dtype),)


scatter.defvjp(lambda x, *static: (scatter(x, *static), None), _scatter_bwd)


def axes_of_one_device() -> tuple[str, ...]:
    """Mesh axes of size 1. A spec of a shard_map should name them somewhere: of an input without
    them, the gradient has an all-reduce over each, which XLA keeps."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.axis_names if mesh.shape[axis] == 1)


def split_over(name: str | None, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes over which a dimension is split. Axes at the end that do not divide it are left
    out: the devices along such an axis have the same."""
    mesh_axes = LOGICAL_AXES[name] if name else ()
    while size % _ways(mesh_axes, mesh):
        mesh_axes = mesh_axes[:-1]
    return mesh_axes


def _ways(mesh_axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    """Number of parts along these axes of the mesh."""
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in mesh_axes)


def batch_ways(mesh: Mesh | AbstractMesh | None = None, batch: int = 0) -> int:
    """Number of parts of the global batch on a mesh, by default on the mesh of the context. batch:
    its rows, if they may be so many that not all axes divide them."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return _ways(split_over("batch", batch, mesh), mesh)


def context_ways() -> int:
    """Number of devices that share the positions of a sequence, on the mesh of the context."""
    return _ways(LOGICAL_AXES["length"], jax.sharding.get_abstract_mesh())


def length_ways(length: int) -> int:
    """Number of parts into which the mesh of the context splits so many positions. 1 if it cannot
    give every device two equal halves, which cross layers need (model/context_parallel.py)."""
    ways = context_ways()
    return 1 if length % (2 * ways) else ways


def keys_ways(slots: int) -> int:
    """Number of parts of a cache with so many slots on the mesh of the context."""
    mesh = jax.sharding.get_abstract_mesh()
    return _ways(split_over("keys", slots, mesh), mesh)


def take(x: Array, index: Array, *axes: str | None) -> Array:
    """x[b, index[b, m]] for x [B, N, ...] and index [B, M]. axes: the logical axes of x.

    If the mesh splits the N positions, each device takes those that it has, and the results, in
    which all others are 0, are added: M positions move, and not N.
    """
    mesh, N = jax.sharding.get_abstract_mesh(), x.shape[1]
    spread = (..., *[None] * (x.ndim - 2))
    if length_ways(N) == 1:
        return jnp.take_along_axis(x, index[spread], axis=1)
    split = spec_for(axes, x.shape, mesh)
    rows, axis, *others = split

    def local(x, index):
        n = x.shape[1]
        index -= jax.lax.axis_index(axis) * n
        here = (index >= 0) & (index < n)
        found = jnp.take_along_axis(x, jnp.clip(index, 0, n - 1)[spread], axis=1)
        return jax.lax.psum(jnp.where(here[spread], found, 0), axis)

    specs = (split, PartitionSpec(rows, None)), PartitionSpec(rows, None, *others)
    return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], check_vma=False)(x, index)


def vocab_ways(vocab: int) -> int:
    """Number of parts of a vocabulary of this size on the mesh of the context."""
    mesh = jax.sharding.get_abstract_mesh()
    return _ways(split_over("vocab", vocab, mesh), mesh)
