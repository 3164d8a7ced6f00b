"""Parameters as inference reads them: cast once, and one tree for each layer."""

import functools

import flax.linen as nn
import flax.struct
import jax

from yocou_jax.config import ModelConfig
from yocou_jax.model import LanguageModel, abstract_params, compute_dtype, head_matrix
from yocou_jax.model.layers import ExactPartitioned
from yocou_jax.typing import PyTree


@flax.struct.dataclass
class PreparedModel:
    """Parameters with matrices in the compute type, `stage_*` a tuple of one tree per layer instead
    of stacked arrays, "head" [D, V] also where it is tied."""

    params: PyTree
    config: ModelConfig = flax.struct.field(pytree_node=False)

    def apply(self, method: str, *args):
        """A part of `LanguageModel` that is no stage."""
        return LanguageModel(self.config).apply({"params": self.params}, *args, method=method)


def prepare(params: PyTree, config: ModelConfig) -> PreparedModel:
    """The trained parameters (see `LanguageModel`) made ready; the results are those of training's
    forward pass, to the bit of every cast. Copies: let go of `params` if memory is short."""
    return PreparedModel(_prepared(params, config), config)


@functools.partial(jax.jit, static_argnames="config")
def _prepared(params: PyTree, config: ModelConfig) -> PyTree:
    dtype = compute_dtype(config)
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
