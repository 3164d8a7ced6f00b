"""Exact parameters, FLOPs and KV bytes of a program: pure arithmetic, no arrays.

Conventions. One multiply-add is 2 FLOPs. Only matrix products are counted, and attention by its
unmasked (query, key) pairs: 2 H for the score and 2 H for the value, per query head. Lookups,
norms, softmax and the optimizer are left out. A backward pass costs twice its forward pass;
recomputation (remat) is not counted, so these are model FLOPs. (MFU is model FLOP/s divided by the
peak FLOP/s of the devices.) The mixture-of-experts feed-forward counts the experts that a token is
sent to.
"""

import dataclasses

from yocou_jax.config import Config, ModelConfig
from yocou_jax.mixers import MIXERS, kv_width
from yocou_jax.program import ARCHITECTURES, Stage

MIB = 2**20


# --- Parameters -----------------------------------------------------------------------------------


def _feed_forward_params(config: ModelConfig, active: bool) -> int:
    """SwiGLU's three matrices, or the router and the (active) routed and shared experts."""
    if not config.num_experts:
        return 3 * config.d_model * config.d_ff
    routed = config.experts_per_token if active else config.num_experts
    experts = routed + config.num_shared_experts
    return config.d_model * (config.num_experts + 3 * experts * config.expert_width)


def _layer_matmul_params(config: ModelConfig, stage: Stage) -> int:
    return MIXERS[stage.mixer].weights(config) + _feed_forward_params(config, active=True)


def _kv_projection_params(config: ModelConfig) -> int:
    if not config.program.has_cross:
        return 0
    return config.d_model * kv_width(config)


def _gate_params(config: ModelConfig) -> int:
    """The matrix that mixes parallel streams."""
    streams = config.program.streams
    return streams**2 * config.d_model if streams > 1 else 0


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The number of parameters; loops add none.

    parts: by name; each parameter is in one of them.
    total: of all parts. active: without the experts that a token is not sent to.
    non_embedding: without the embedding table and the output head.
    """

    parts: dict[str, int]
    total: int
    active: int
    non_embedding: int

    def rows(self) -> dict[str, int]:
        """The parts and then the three totals, as reports list them."""
        totals = {"total": self.total, "active": self.active, "non_embedding": self.non_embedding}
        return self.parts | totals


def parameters(config: ModelConfig) -> Parameters:
    """Counts what `model.abstract_params` describes, without jax."""
    program, d = config.program, config.d_model
    parts = {"embedding": config.vocab_size * d}
    for name, stage in program.named_stages:
        mixer = MIXERS[stage.mixer]
        attention = mixer.weights(config) + mixer.other_parameters(config)
        parts[f"{name}.attention"] = stage.layers * attention
        parts[f"{name}.feed_forward"] = stage.layers * _feed_forward_params(config, active=False)
        parts[f"{name}.norms"] = stage.layers * (2 * d + mixer.scales(config))
    if program.has_cross:
        parts["global_kv"] = _kv_projection_params(config) + d
        if config.qk_norm:
            parts["global_kv"] += config.head_dim
    if gate := _gate_params(config):
        parts["stream_gate"] = gate
    parts["final_norm"] = d
    if not config.tie_embeddings:
        parts["head"] = config.vocab_size * d
    total = sum(parts.values())
    idle = sum(
        stage.layers * (_feed_forward_params(config, False) - _feed_forward_params(config, True))
        for stage in program.stages
    )
    ends = parts["embedding"] + parts.get("head", 0)
    return Parameters(parts, total, active=total - idle, non_embedding=total - ends)


# --- FLOPs ----------------------------------------------------------------------------------------


def _stage_flops(config: ModelConfig, stage: Stage, tokens: int, mixing: int) -> int:
    """Forward FLOPs of a stage over `tokens` positions. Of these, `mixing` are in the mixer of each
    layer, without its matrices (the products of queries, keys and values)."""
    matmul = 2 * _layer_matmul_params(config, stage) * tokens
    return config.program.streams * stage.depth * (matmul + mixing)


def _ends_flops(config: ModelConfig, kv_tokens: int, head_tokens: int) -> int:
    """Forward FLOPs of everything outside the stages: the global K/V projection, the stream gate
    and the head."""
    head = 2 * (config.vocab_size * config.d_model + _gate_params(config))
    return 2 * _kv_projection_params(config) * kv_tokens + head * head_tokens


def train_flops_per_token(
    config: ModelConfig, length: int, *, exits: int = 1, backprop_loops: int | None = None
) -> float:
    """Forward and backward FLOPs per token of a training sequence of `length` positions.

    exits: how many loops have a loss after them (optimizer.loop_loss); what comes after the looped
    stage runs for each of them. backprop_loops: only the last ones have a backward pass
    (optimizer.backprop_loops).
    """
    stages, times, kv_times = 0, 1, 1
    for stage in config.program.stages:
        mixing = MIXERS[stage.mixer].sequence_flops(config, length)
        forward, loops = _stage_flops(config, stage, length, mixing), stage.num_loops
        backward = 2 * forward * min(loops, backprop_loops or loops) // loops
        stages += times * (forward + backward)
        if stage.loops is not None:
            times = exits
            kv_times = kv_times if stage.reads_global else exits
    return (stages + 3 * _ends_flops(config, kv_times * length, times * length)) / length


def run_flops_per_token(config: Config, num_loops: int | None = None) -> float:
    """Those of a training step of this run, which may draw its loop count (config.model.num_loops).

    num_loops: the count that the step has drawn. None: the mean over all that it can draw.
    """
    model, optimizer = config.model, config.optimizer
    if num_loops is not None:
        model = dataclasses.replace(model, num_loops=num_loops)
    elif draw := model.loop_draw:
        shares = zip(draw.probabilities, draw.counts, strict=True)
        return sum(share * run_flops_per_token(config, count) for share, count in shares)
    return train_flops_per_token(
        model,
        config.data.sequence_length,
        exits=sum(weight > 0 for weight in optimizer.loop_weights) or 1,
        backprop_loops=optimizer.backprop_loops,
    )


def prefill_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs per prompt token to fill the caches and predict the next token.

    Cross stages and the head run for the last position alone (YOCO, section 2.2: prefill exits
    early). If all stages before them are window stages, the figure hardly depends on the length of
    a long prompt: each token sees at most W keys, and the work of the last position is shared by
    all tokens of the prompt.
    """
    flops = _ends_flops(config, length, 1)
    for stage in config.program.stages:
        mixer = MIXERS[stage.mixer]
        if stage.reads_global:
            flops += _stage_flops(config, stage, 1, mixer.step_flops(config, length))
        else:
            flops += _stage_flops(config, stage, length, mixer.sequence_flops(config, length))
    return flops / length


def decode_flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs of one decode step that sees `context` positions, including its own."""
    return _ends_flops(config, 1, 1) + sum(
        _stage_flops(config, stage, 1, MIXERS[stage.mixer].step_flops(config, context))
        for stage in config.program.stages
    )


def decode_bytes_per_step(
    config: ModelConfig, batch: int, context: int, bytes_per_value: int = 2
) -> float:
    """Bytes that one decode step of `batch` rows must read if each row sees `context` positions.

    Matrices: those of a layer each time it runs (3 times in a loop of 3). For experts, the expected
    number that at least one row chooses, if all experts are equally likely.
    Memories: W positions for each (loop, window layer), all positions for each (loop, full layer),
    and all positions of the one global cache for each (loop, cross layer).
    Left out: norms, the embeddings of the rows, and the position that a step writes to each memory.
    """
    c, program = config, config.program
    matrices = c.vocab_size * c.d_model + _gate_params(c) + _kv_projection_params(c)
    unchosen = 0.0
    if c.num_experts:
        tokens = batch * program.streams
        share = (1 - c.experts_per_token / c.num_experts) ** tokens
        unchosen = share * c.num_experts * 3 * c.d_model * c.expert_width
    cached = 0
    for stage in program.stages:
        mixer = MIXERS[stage.mixer]
        feed_forward = _feed_forward_params(c, active=False) - unchosen
        matrices += stage.depth * (mixer.weights(c) + feed_forward)
        cached += stage.depth * program.streams * mixer.step_reads(c, context)
    return bytes_per_value * (matrices + batch * cached)


# --- KV cache -------------------------------------------------------------------------------------


def kv_bytes(config: ModelConfig, length: int, bytes_per_value: int = 2) -> int:
    """Bytes of all memories of one sequence after `length` positions (Table 10 in MiB; bfloat16 by
    default).

    Keys and values of W positions for each (loop, window layer), of `length` positions and the
    learned prefix for each (loop, full layer, stream), and of `length` positions once for the
    global cache (Table 1, column KV memory).
    """
    program = config.program
    numbers = sum(
        program.streams * stage.depth * MIXERS[stage.mixer].memory_size(config, length)
        for stage in program.stages
    )
    if program.has_cross:
        numbers += length * kv_width(config)
    return numbers * bytes_per_value


# --- Reports --------------------------------------------------------------------------------------


def sibling(config: ModelConfig, architecture: str) -> ModelConfig:
    """The same sizes under another architecture of the table.

    If the config sets num_loops, looped architectures use it. Otherwise they have the loop counts
    of the paper.
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
        "params": parameters(config).rows(),
        "kv_mib": {str(n): kv_bytes(config, n) / MIB for n in lengths},
        "flops_per_token": {
            "train": {str(n): train_flops_per_token(config, n) for n in lengths},
            "prefill": {str(n): prefill_flops_per_token(config, n) for n in lengths},
            "decode": {str(n): decode_flops_per_token(config, n) for n in lengths},
        },
    }
