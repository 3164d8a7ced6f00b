"""The sizes and parameters of a model, as a peer takes them. No other file knows both layouts."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from yocou_jax.config import Config, ModelConfig
from yocou_jax.errors import UserError
from yocou_jax.mixers import MIXERS
from yocou_jax.model import head_matrix
from yocou_jax.typing import AnyArray, PyTree

OPTIMIZER = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "clip_norm")
SIZES = (
    *("vocab_size", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"),
    *("rope_theta", "cross_rope", "qk_norm", "norm_eps", "tie_embeddings"),
)


def _refuse(wrong: dict[str, bool], peer: str) -> None:
    for what, found in wrong.items():
        if found:
            raise UserError(f"--peer cannot compare this config, because the {peer} has no {what}.")


def twin_sizes(config: Config, compile: bool = True) -> dict[str, Any]:
    """What torch_twin needs to know. compile: whether it uses torch.compile.

    Raises UserError for what it does not have.
    """
    model = config.model
    kernels = [MIXERS[stage.mixer].kernel(model) for stage in model.program.stages]
    wrong = {
        "experts (model.num_experts)": model.num_experts > 0,
        "parallel streams": model.program.streams > 1,
        "layers without attention": None in kernels,
        "packed documents (data.packing)": config.data.packing,
        "z-loss (optimizer.z_loss)": config.optimizer.z_loss > 0,
        "microbatches (optimizer.accumulation_steps)": config.optimizer.accumulation_steps > 1,
    }
    _refuse(wrong, "PyTorch twin")
    stages = [
        {
            "window": kernel.window,
            "reads_global": stage.reads_global,
            "layers": stage.layers,
            "loops": stage.num_loops,
        }
        for stage, kernel in zip(model.program.stages, kernels, strict=True)
    ]
    return {
        "stages": stages,
        "batch_size": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "optimizer": {name: getattr(config.optimizer, name) for name in OPTIMIZER},
        "compile": compile,
        **{name: getattr(model, name) for name in SIZES},
    }


def llama_sizes(config: ModelConfig, longest: int) -> dict[str, Any]:
    """Arguments of LlamaConfig, for a transformer. longest: positions of the longest text.

    Raises UserError for what Llama does not have.
    """
    wrong = {
        "experts (model.num_experts)": config.num_experts > 0,
        "norm of queries and keys (model.qk_norm)": config.qk_norm,
    }
    _refuse(wrong, "LlamaForCausalLM")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.program.layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": longest,
        "tie_word_embeddings": False,  # only our embedding is scaled by sqrt(D)
    }


# --- Parameters -----------------------------------------------------------------------------------
# PyTorch stores the matrix of a linear map as [outputs, inputs].


def _matrix(linear: PyTree, inputs: int) -> np.ndarray:
    """W [*inputs, *outputs] of a `Linear` with `inputs` numbers in -> [outputs, inputs]."""
    return np.ascontiguousarray(np.asarray(linear["kernel"]).reshape(inputs, -1).T)


def _key_value(projection: PyTree, width: int) -> tuple[np.ndarray, np.ndarray]:
    return _matrix(projection["key"], width), _matrix(projection["value"], width)


def _blocks(params: PyTree, config: ModelConfig) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(stage, layer, parameters of the layer) of each layer."""
    for number, (name, stage) in enumerate(config.program.named_stages):
        for layer in range(stage.layers):
            block = jax.tree.map(lambda x, layer=layer: x[layer], params[name]["layers"])
            yield number, layer, block


def _parts(block: PyTree, config: ModelConfig) -> dict[str, AnyArray]:
    """The parameters of one layer, by the names of torch_twin, without keys and values."""
    D, attention, feed_forward = config.d_model, block["attention"], block["feed_forward"]
    gate_up = [_matrix(feed_forward[name], D) for name in ("gate", "up")]
    found = {
        "attention_norm.weight": block["attention_norm"]["scale"],
        "query.weight": _matrix(attention["query"]["project"], D),
        "output.weight": _matrix(
            attention["output"]["project"], config.num_heads * config.head_dim
        ),
        "feed_forward_norm.weight": block["feed_forward_norm"]["scale"],
        "gate_up.weight": np.concatenate(gate_up),
        "down.weight": _matrix(feed_forward["down"], config.d_ff),
    }
    if config.qk_norm:
        found["query_norm.weight"] = attention["query"]["norm"]["scale"]
    return found


def _twin_key_value(projection: PyTree, config: ModelConfig, prefix: str) -> dict[str, AnyArray]:
    found = {f"{prefix}.project.weight": np.concatenate(_key_value(projection, config.d_model))}
    if config.qk_norm:
        found[f"{prefix}.norm.weight"] = projection["norm"]["scale"]
    return found


def twin_arrays(params: PyTree, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters by the names of torch_twin, matrices as [outputs, inputs]."""
    found = {
        "embedding.weight": params["embedding"],
        "final_norm.weight": params["final_norm"]["scale"],
    }
    if not config.tie_embeddings:
        found["head.weight"] = np.asarray(params["head"]).T
    if config.program.has_cross:
        found["global_norm.weight"] = params["global_kv"]["norm"]["scale"]
        found |= _twin_key_value(params["global_kv"]["key_value"], config, "global_kv")
    for stage, layer, block in _blocks(params, config):
        parts = _parts(block, config)
        if "key_value" in block["attention"]:
            parts |= _twin_key_value(block["attention"]["key_value"], config, "key_value")
        found |= {f"stages.{stage}.layers.{layer}.{name}": x for name, x in parts.items()}
    return {name: np.asarray(x) for name, x in found.items()}


def llama_arrays(params: PyTree, config: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters of a transformer by the names of LlamaForCausalLM, matrices as [outputs, inputs].
    Llama does not scale its embedding, so it gets ours times sqrt(D)."""
    found = {
        "model.embed_tokens.weight": config.d_model**0.5 * np.asarray(params["embedding"]),
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": np.asarray(head_matrix(params, config)).T,
    }
    for _, layer, block in _blocks(params, config):
        parts = _parts(block, config)
        k, v = _key_value(block["attention"]["key_value"], config.d_model)
        gate, up = np.split(parts["gate_up.weight"], 2)
        named = {
            "input_layernorm.weight": parts["attention_norm.weight"],
            "self_attn.q_proj.weight": parts["query.weight"],
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": parts["output.weight"],
            "post_attention_layernorm.weight": parts["feed_forward_norm.weight"],
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": parts["down.weight"],
        }
        found |= {f"model.layers.{layer}.{name}": x for name, x in named.items()}
    return {name: np.asarray(x, order="C") for name, x in found.items()}
