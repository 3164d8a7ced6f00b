"""Sampling from a model."""

import functools

import jax
import jax.numpy as jnp

from yocou_jax.config import ModelConfig
from yocou_jax.model import LanguageModel, head_matrix
from yocou_jax.typing import Array, Int, PyTree


@functools.partial(jax.jit, static_argnames=("config", "num_tokens", "temperature"))
def sample(
    params: PyTree,
    config: ModelConfig,
    prompt: Int[Array, " N"],
    key: Array,
    *,
    num_tokens: int,
    temperature: float = 0.8,
) -> Int[Array, " N+num_tokens"]:
    """The prompt and `num_tokens` sampled behind it; temperature 0 takes the likeliest token.

    Runs the whole forward pass for every token, O(n^2) work and no cache: good for the short
    samples of a training run.
    """
    text = jnp.concatenate([prompt, jnp.zeros(num_tokens, prompt.dtype)])[None]
    head = head_matrix(params, config)

    def step(i, text):
        hidden = LanguageModel(config).apply({"params": params}, text).hidden[0, i - 1]
        head_cast = head.astype(hidden.dtype)
        logits = jnp.matmul(hidden, head_cast, preferred_element_type=jnp.float32)
        if temperature == 0:
            token = jnp.argmax(logits)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        return text.at[0, i].set(token.astype(text.dtype))

    return jax.lax.fori_loop(prompt.shape[0], text.shape[1], step, text)[0]
