"""Parameters for inference: cast once, with one tree for each layer."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from yocou_jax.config import ComputeConfig, ModelConfig
from yocou_jax.model import Compute, LanguageModel, abstract_params, head_matrix, resolve_compute
from yocou_jax.model.layers import ExactPartitioned
from yocou_jax.sharding import tree_shardings
from yocou_jax.typing import PyTree


@flax.struct.dataclass
class PreparedModel:
    """Parameters for inference, made by `prepare`.

    Matrices have the compute type, except those that are always float32. `params["stage_..."]` is a
    tuple with one tree for each layer (training has one tree with stacked arrays). `params["head"]`
    [D, V] always exists: with tie_embeddings it is the transposed embedding.
    """

    params: PyTree
    config: ModelConfig = flax.struct.field(pytree_node=False)
    compute: Compute = flax.struct.field(pytree_node=False)

    def apply(self, method: str, *args):
        """Calls a method of `LanguageModel`, such as "embed". Layers are called as `Block`s."""
        model = LanguageModel(self.config, self.compute)
        return model.apply({"params": self.params}, *args, method=method)


def prepare(params: PyTree, config: ModelConfig, compute: Compute | ComputeConfig) -> PreparedModel:
    """Prepares trained parameters, the tree of `LanguageModel`. Training casts them in every
    forward pass; here they are cast once, to the same bits. The result is a copy: delete `params`
    if memory is short.

    compute: how to run the model; `pretrained.load` returns how it was trained.
    """
    compute = compute if isinstance(compute, Compute) else resolve_compute(compute)
    return PreparedModel(_prepared(params, config, compute.dtype), config, compute)


def abstract_model(config: ModelConfig, compute: Compute) -> PreparedModel:
    """Shapes of a prepared model, split over the mesh of the context, which may be of devices that
    this machine does not have. It compiles `prepare`, to know how its arrays are split."""
    boxed = abstract_params(config)
    mesh = jax.sharding.get_mesh()

    def described(x, split):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)

    params = jax.tree.map(described, nn.unbox(boxed), tree_shardings(boxed, mesh))
    lowered = _prepared.lower(params, config, compute.dtype)
    shapes, splits = lowered.out_info, lowered.compile().output_shardings
    return PreparedModel(jax.tree.map(described, shapes, splits), config, compute)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _prepared(params: PyTree, config: ModelConfig, dtype: jnp.dtype) -> PyTree:
    exact = jax.tree.map(
        lambda box: isinstance(box, ExactPartitioned),
        abstract_params(config),
        is_leaf=lambda box: isinstance(box, nn.LogicallyPartitioned),
    )
    head = head_matrix(params, config).astype(dtype)
    params = jax.tree.map(lambda x, keep: x if keep else x.astype(dtype), params, exact)
    params |= {"head": head}
    for name, stage in config.program.named_stages:
        stacked = params[name]["layers"]
        params[name] = tuple(
            jax.tree.map(lambda x, layer=layer: x[layer], stacked) for layer in range(stage.layers)
        )
    return params
