"""Exact parameters, FLOPs and KV bytes of a program: pure arithmetic, no arrays.

Conventions. One multiply-add is 2 FLOPs. Only matrix products are counted, and attention by its
unmasked (query, key) pairs: 2 H for the score and 2 H for the value, per query head. Lookups,
norms, softmax and the optimiser are left out. A backward pass costs twice its forward pass;
recomputation (remat) is not counted, so these are model FLOPs, the numerator of MFU. The
mixture-of-experts feed-forward counts the experts that a token is sent to.
"""

import dataclasses

from yocou_jax.config import ModelConfig
from yocou_jax.program import ARCHITECTURES, Stage

MIB = 2**20


# --- Parameters -----------------------------------------------------------------------------------


def _attention_params(config: ModelConfig, mixer: str) -> int:
    """Matrix entries of one layer's attention: W_q, W_o and, if it has its own, W_k and W_v."""
    own_kv = 0 if mixer == "cross" else 2 * config.num_kv_heads
    return config.d_model * config.head_dim * (2 * config.num_heads + own_kv)


def _feed_forward_params(config: ModelConfig, active: bool) -> int:
    """SwiGLU's three matrices, or the router and the (active) routed and shared experts."""
    if not config.num_experts:
        return 3 * config.d_model * config.d_ff
    routed = config.experts_per_token if active else config.num_experts
    experts = routed + config.num_shared_experts
    return config.d_model * (config.num_experts + 3 * experts * config.expert_width)


def _layer_matmul_params(config: ModelConfig, stage: Stage) -> int:
    return _attention_params(config, stage.mixer) + _feed_forward_params(config, active=True)


def _kv_writer_params(config: ModelConfig) -> int:
    if not config.program.has_cross:
        return 0
    return 2 * config.d_model * config.num_kv_heads * config.head_dim


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; loops add none. `total` holds all of them, `active` those that one token
    uses (fewer with experts), `non_embedding` all but the embedding table and the output head."""
    program, d = config.program, config.d_model
    parts = {"embedding": config.vocab_size * d}
    for name, stage in program.named_stages:
        attention = _attention_params(config, stage.mixer)
        norms = 2 * d + (config.head_dim if config.qk_norm else 0)
        if config.qk_norm and stage.mixer != "cross":
            norms += config.head_dim
        if program.streams > 1:
            attention += (
                2 * program.streams * config.prefix_length * config.num_kv_heads * config.head_dim
            )
        parts[f"{name}.attention"] = stage.layers * attention
        parts[f"{name}.feed_forward"] = stage.layers * _feed_forward_params(config, active=False)
        parts[f"{name}.norms"] = stage.layers * norms
    if program.has_cross:
        parts["global_kv"] = _kv_writer_params(config) + d
        if config.qk_norm:
            parts["global_kv"] += config.head_dim
    if program.streams > 1:
        parts["stream_gate"] = program.streams**2 * d
    parts["final_norm"] = d
    if not config.tie_embeddings:
        parts["head"] = config.vocab_size * d
    total = sum(parts.values())
    idle = sum(
        stage.layers * (_feed_forward_params(config, False) - _feed_forward_params(config, True))
        for stage in program.stages
    )
    return parts | {
        "total": total,
        "active": total - idle,
        "non_embedding": total - parts["embedding"] - parts.get("head", 0),
    }


# --- FLOPs ----------------------------------------------------------------------------------------


def visible_pairs(config: ModelConfig, mixer: str, length: int) -> int:
    """Unmasked (query, key) pairs of one causal sequence of `length` positions, one head."""
    if mixer == "window":
        w = min(config.window, length)
        return w * (w + 1) // 2 + (length - w) * w
    return length * (length + 1) // 2 + length * config.kv_prefix


def visible_keys(config: ModelConfig, mixer: str, context: int) -> int:
    """Keys that the newest query sees when `context` positions, its own included, are cached."""
    if mixer == "window":
        return min(config.window, context)
    return context + config.kv_prefix


def _stage_flops(config: ModelConfig, stage: Stage, tokens: int, pairs: int) -> int:
    """Forward FLOPs of a stage over `tokens` positions with `pairs` visible (query, key) pairs."""
    matmul = 2 * _layer_matmul_params(config, stage) * tokens
    attention = 4 * config.num_heads * config.head_dim * pairs
    return config.program.streams * stage.depth * (matmul + attention)


def _ends_flops(config: ModelConfig, kv_tokens: int, head_tokens: int) -> int:
    """Forward FLOPs of what is no stage: the global K/V projection, the stream gate, the head."""
    streams = config.program.streams
    gate = 2 * streams**2 * config.d_model if streams > 1 else 0
    head = 2 * config.vocab_size * config.d_model + gate
    return 2 * _kv_writer_params(config) * kv_tokens + head * head_tokens


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Forward and backward FLOPs per token of a training sequence of `length` positions."""
    forward = _ends_flops(config, length, length) + sum(
        _stage_flops(config, stage, length, visible_pairs(config, stage.mixer, length))
        for stage in config.program.stages
    )
    return 3 * forward / length


def prefill_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs per prompt token to fill the caches and predict the next token.

    Cross stages and the head run for the last position alone (YOCO, section 2.2: prefill exits
    early), so for a program with a global cache the figure does not depend on the length.
    """
    flops = _ends_flops(config, length, 1)
    for stage in config.program.stages:
        if stage.mixer == "cross":
            flops += _stage_flops(config, stage, 1, length)
        else:
            pairs = visible_pairs(config, stage.mixer, length)
            flops += _stage_flops(config, stage, length, pairs)
    return flops / length


def decode_flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs of one decode step that sees `context` positions, its own included."""
    return _ends_flops(config, 1, 1) + sum(
        _stage_flops(config, stage, 1, visible_keys(config, stage.mixer, context))
        for stage in config.program.stages
    )


def decode_bytes_per_step(
    config: ModelConfig, batch: int, context: int, bytes_per_value: int = 2
) -> float:
    """Bytes that one decode step of `batch` rows must read when each sees `context` positions.

    Matrices once per application of their layer (so 3 times in a loop of 3), of the experts those
    that some row is expected to choose if all are alike; W ring entries per (loop, window layer),
    all positions per (loop, full layer), and those of the one global cache per cross layer. Norms
    and the rows' embeddings are left out, and the position that a step writes to each cache.
    """
    c, program = config, config.program
    gate = program.streams**2 * c.d_model if program.streams > 1 else 0
    matrices = c.vocab_size * c.d_model + gate + _kv_writer_params(c)
    unchosen = 0.0
    if c.num_experts:
        tokens = batch * program.streams
        share = (1 - c.experts_per_token / c.num_experts) ** tokens
        unchosen = share * c.num_experts * 3 * c.d_model * c.expert_width
    positions = 0
    for stage in program.stages:
        feed_forward = _feed_forward_params(c, active=False) - unchosen
        matrices += stage.depth * (_attention_params(c, stage.mixer) + feed_forward)
        positions += stage.depth * program.streams * visible_keys(c, stage.mixer, context)
    cached = batch * positions * 2 * c.num_kv_heads * c.head_dim
    return bytes_per_value * (matrices + cached)


# --- KV cache -------------------------------------------------------------------------------------


def kv_entries(config: ModelConfig, length: int) -> int:
    """K/V positions kept per sequence: W per (loop, window layer), `length` per (loop, full layer)
    and stream (and there the learned prefix), and `length` once for the global cache (Table 1,
    column KV memory)."""
    program = config.program
    full = (length + config.kv_prefix) * program.streams
    per_layer = {"window": config.window, "full": full, "cross": 0}
    local = sum(stage.depth * per_layer[stage.mixer] for stage in program.stages)
    return local + (length if program.has_cross else 0)


def kv_bytes(config: ModelConfig, length: int, bytes_per_value: int = 2) -> int:
    """Bytes of all K and V caches of one sequence (Table 10 in MiB; bfloat16 by default)."""
    entry = 2 * config.num_kv_heads * config.head_dim * bytes_per_value
    return kv_entries(config, length) * entry


# --- Reports --------------------------------------------------------------------------------------


def sibling(config: ModelConfig, architecture: str) -> ModelConfig:
    """The same sizes under another architecture of the table.

    A loop count that the config sets goes along wherever the architecture loops at all; otherwise
    each has the paper's.
    """
    layers = config.program.layers
    template = ARCHITECTURES[architecture]
    loops = config.num_loops if "@" in template else None
    return dataclasses.replace(
        config, architecture=architecture, num_layers=layers, num_loops=loops
    )


def report(config: ModelConfig, lengths: tuple[int, ...]) -> dict:
    """Everything `experiments.account` prints for one model, with the lengths as string keys."""
    return {
        "program": str(config.program),
        "params": parameters(config),
        "kv_mib": {str(n): kv_bytes(config, n) / MIB for n in lengths},
        "flops_per_token": {
            "train": {str(n): train_flops_per_token(config, n) for n in lengths},
            "prefill": {str(n): prefill_flops_per_token(config, n) for n in lengths},
            "decode": {str(n): decode_flops_per_token(config, n) for n in lengths},
        },
    }
