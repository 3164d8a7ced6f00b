"""The facts of a run, which are shown before its first step."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pallas_kernels import UnsupportedCall, api
from yocou_jax import accounting
from yocou_jax.config import ComputeConfig, Config, ModelConfig
from yocou_jax.data.pipeline import DataBundle
from yocou_jax.errors import UserError
from yocou_jax.mixers import MIXERS
from yocou_jax.model import abstract_params, resolve_compute
from yocou_jax.sharding import length_ways, whole_dimensions


def banner(
    config: Config, data: DataBundle, mesh: Mesh, attention: dict[str, str], workdir: Path
) -> dict[str, dict]:
    """The facts of a run, by section: device, model, cost, data, run.

    attention: the result of `attention_choices`.
    """
    model, length = config.model, config.data.sequence_length
    device, parameters = jax.devices()[0], accounting.parameters(model)
    flops = accounting.run_flops_per_token(config)
    tokens = config.run.steps * config.data.batch_size * length
    dtype = resolve_compute(config.compute).dtype
    kv = accounting.kv_bytes(model, length, dtype.itemsize) / accounting.MIB
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    whole = whole_dimensions(abstract_params(model), mesh)
    drawn = {"loops": f"each step draws from {model.num_loops}"} if model.loop_draw else {}
    return {
        "device": {
            "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
            "mesh": axes,
            **({"not split": ", ".join(whole)} if whole else {}),
            "compute": f"{dtype.name}, parameters in float32",
            **attention,
        },
        "model": {"program": str(model.program), **drawn, **parameters.rows()},
        "cost": {
            "training FLOPs per token": f"{flops:.4g}",
            "training FLOPs in all": f"{flops * tokens:.4g}",
            "KV cache per sequence": f"{kv:.3f} MiB at {length} tokens, {dtype.name}",
        },
        "data": {
            "source": config.data.source,
            "corpus": f"{data.num_documents:,} documents, {data.num_tokens:,} tokens, "
            f"{data.bytes_per_token:.3f} bytes per token, sha256 {data.fingerprint[:12]}",
            "left out": f"{data.num_duplicates} copies; {data.num_skipped} rows without text; "
            f"{data.num_invalid} documents repaired (invalid UTF-8)",
            **({"tokenizer": data.tokenizer.loss} if data.tokenizer.loss else {}),
            "validation": f"{data.validation.num_sequences} sequences, "
            f"{data.validation.num_tokens:,} tokens",
            "batch": f"{config.data.batch_size} x {length} tokens",
            "training": f"{config.run.steps:,} steps, {tokens:,} tokens, "
            f"{tokens / parameters.total:.2f} per parameter, "
            f"{tokens / data.num_tokens:.2f} epochs",
        },
        "run": {"workdir": str(workdir)},
    }


def attention_choices(config: Config) -> dict[str, str]:
    """For the attention of each kind of layer: the kernel that runs in a training step, and why."""
    rows = config.data.batch_size // config.optimizer.accumulation_steps
    shape, packing = (rows, config.data.sequence_length), config.data.packing
    parts = length_ways(config.data.sequence_length)
    choices = kernels(config.model, config.compute, shape, packing, parts)
    return {f"{layers} attention": chosen for layers, chosen in choices.items()}


def _facts_of_parts(parts: int, window: int | None, length: int) -> dict[str, Any]:
    """What model/context_parallel.py asks of a kernel in addition."""
    if parts == 1:
        return {}
    earlier = min(window - 1, length // parts) if window is not None else length
    return {"return_lse": True, "lengths": window is None, "q_offset": earlier}


def kernels(
    model: ModelConfig,
    compute: ComputeConfig,
    shape: tuple[int, int],
    packing: bool,
    parts: int = 1,
) -> dict[str, str]:
    """The attention kernel of each kind of layer, and why, in a forward pass over tokens of this
    shape [B, N], of which each device has one of so many parts of the positions. Raises UserError
    if the kernel that `compute` names cannot run it."""
    (rows, length), layers, choices = shape, {}, {}  # kinds of layers may share a kernel
    for mixer in dict.fromkeys(stage.mixer for stage in model.program.stages):
        layers.setdefault(MIXERS[mixer].kernel(model), []).append(mixer)
    layers.pop(None, None)
    for kernel, mixers in layers.items():
        try:
            choice = api.choose_implementation(
                kernel.operation,
                implementation=compute.attention,
                q_shape=(rows, length // parts, model.num_heads, model.head_dim),
                k_shape=(rows, length + kernel.prefix, model.num_kv_heads, model.head_dim),
                dtype=resolve_compute(compute).dtype,
                window=kernel.window,
                segments=packing,
                **{"q_offset": kernel.prefix} | _facts_of_parts(parts, kernel.window, length),
            )
        except UnsupportedCall as error:
            raise UserError(f"compute.attention='{compute.attention}': {error}") from error
        choices[" and ".join(mixers)] = f"{choice.implementation} ({choice.reason})"
    return choices
