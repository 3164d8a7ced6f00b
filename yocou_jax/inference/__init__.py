"""Inference with a memory of past positions: prefill, decode steps, generation and scores.

    model = prepare(params, config, compute)             # in the compute type, a tree per layer
    memory, logits = prefill(model, tokens, lengths, new_tokens=64)   # [B, N] -> next [B, V]
    memory, logits = decode_step(model, memory, tokens)  # one more token for each row
    out = generate(model, prompts, max_new_tokens=64, sampling=Sampling(temperature=0.8))
    memory, logits, logprobs, likeliest = score(model, tokens, lengths)      # of given tokens

A memory is donated to the call that extends it, and cannot be used again: `fork` copies it.

Modules: weights (parameters for inference), forward (the forward pass, which extends a memory),
request (checks of the arguments), sampling (from logits to a token), generation (the loop), text
(from tokens to text that can be shown).

No function here has an argument for the number of loops: each (loop, layer) has its own part of the
memory, so all calls with a memory must agree in it. To run another number of loops than in
training, change the config before `prepare`: dataclasses.replace(config, num_loops=5).
"""

from yocou_jax.inference.forward import (
    Scores,
    decode_step,
    fork,
    new_memory,
    prefill,
    programs,
    score,
)
from yocou_jax.inference.generation import Generation, generate, generate_from
from yocou_jax.inference.request import default_sizes
from yocou_jax.inference.sampling import Sampling
from yocou_jax.inference.weights import PreparedModel, prepare

__all__ = [
    "Generation",
    "PreparedModel",
    "Sampling",
    "Scores",
    "decode_step",
    "default_sizes",
    "fork",
    "generate",
    "generate_from",
    "new_memory",
    "prefill",
    "prepare",
    "programs",
    "score",
]
