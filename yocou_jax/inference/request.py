"""Checks the arguments of inference on the host, before any work. Each mistake is a UserError."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from yocou_jax.config import ModelConfig
from yocou_jax.errors import UserError
from yocou_jax.inference.sampling import Sampling, as_array
from yocou_jax.inference.sampling import check as check_sampling
from yocou_jax.inference.weights import PreparedModel
from yocou_jax.model import Compute, empty_memory
from yocou_jax.model.memory import Memory
from yocou_jax.sharding import batch_ways, context_ways
from yocou_jax.typing import WholeNumbers

# Positions of a chunk: enough to fill the matrix unit of a device.
CHUNK = 2048
# Positions of a chunk in all rows of one device together. A large batch gets shorter chunks (of at
# least 128 positions), because activations need memory: with 1.3B parameters in bfloat16, XLA
# reports 2 GB for 16,384 positions.
CHUNK_OF_ALL_ROWS = 16_384
LOGITS_OF_A_CHUNK = 2**28  # 1 GB in float32

# A function of new tokens [B, n]. It may return which rows [B] end here.
OnTokens = Callable[[np.ndarray], np.ndarray | Sequence[bool] | None]


class Prompts(NamedTuple):
    """Checked prompts: tokens [B, N] (int32, 0 after the end of each row), lengths [B], the
    capacity of a new memory, and the number of positions of a chunk."""

    tokens: np.ndarray
    lengths: np.ndarray
    capacity: int
    chunk: int


def bucket(n: int, least: int = 16) -> int:
    """n, rounded up to 1, 1.25, 1.5 or 1.75 times a power of two, and at least `least`. For example
    33 to 40 give 40, 41 to 48 give 48, 49 to 56 give 56, and 57 to 64 give 64. This way, few
    compiled programs serve all sizes. Above `least`, a size grows by at most a quarter."""
    if n <= least:
        return least
    quarter = max(1, 2 ** ((n - 1).bit_length() - 3))
    return -(-n // quarter) * quarter


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def default_sizes(
    batch: int,
    longest: int,
    new_tokens: int = 0,
    *,
    capacity: int | None = None,
    chunk: int | None = None,
) -> tuple[int, int]:
    """(capacity, chunk) for a batch of prompts of at most `longest` positions, and `new_tokens`
    after them. Given values stay. Requests with the same sizes share their compiled programs. If
    the mesh splits positions, the devices share a chunk, and both sizes are such that it can be
    split."""
    ways = context_ways()
    if chunk is None:
        rows = batch // batch_ways(batch=batch)  # on each device
        share = max(CHUNK_OF_ALL_ROWS // max(rows, 1) // 128, 1) * 128
        chunk = min(CHUNK * ways, share * ways, round_up(bucket(longest), 2 * ways))
    if chunk < 1:
        raise UserError(f"chunk={chunk} must be at least 1 position.")
    if capacity is None:  # room for whole chunks, so that the last one is written in one piece
        capacity = max(bucket(longest + new_tokens), round_up(longest, chunk))
        capacity = round_up(capacity, ways)
    return capacity, chunk


def check_prefill(
    model: PreparedModel,
    tokens,
    lengths,
    memory: Memory | None,
    *,
    new_tokens: int,
    capacity: int | None,
    chunk: int | None,
    all_logits: bool = False,
) -> Prompts:
    """Checks a call of `prefill`, or of `score` with all_logits: tokens [B, N], lengths [B] or
    None. Raises the errors listed there."""
    tokens, lengths = check_prompts(model.config, tokens, lengths)
    if chunk is None and all_logits:
        _, usual = default_sizes(*tokens.shape)
        chunk = min(usual, max(1, LOGITS_OF_A_CHUNK // (len(tokens) * model.config.vocab_size)))
    room, chunk = default_sizes(*tokens.shape, new_tokens, capacity=capacity, chunk=chunk)
    if memory is None:
        check_room(lengths, room if has_capacity(model) else None)
    else:
        if capacity is not None:
            raise UserError(
                f"capacity={capacity} cannot be given with a memory, which has its own."
            )
        check_memory(model, memory, lengths)
    return Prompts(tokens, lengths, room, chunk)


def padded(prompts: Sequence[WholeNumbers]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths as tokens [B, N], with 0 after the end of each row, and lengths [B].

    Raises UserError for a prompt that is not a list of token ids.
    """
    arrays = [np.asarray(prompt) for prompt in prompts]
    for row, prompt in enumerate(arrays):
        if prompt.size and (prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer)):
            raise UserError(f"Prompt {row} is not a list of token ids: encode text first.")
    lengths = np.array([prompt.size for prompt in arrays], np.int64)
    tokens = np.zeros((len(arrays), max(lengths, default=0)), np.int64)
    for row, prompt in enumerate(arrays):
        tokens[row, : prompt.size] = prompt
    return tokens, lengths


def check_prompts(config: ModelConfig, tokens, lengths) -> tuple[np.ndarray, np.ndarray]:
    """tokens [B, max(lengths)] with 0 after the end of each row, and lengths [B], both int32."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"Prompts are integers [batch, positions]; got {tokens.dtype} of shape {tokens.shape}."
        )
    B, N = tokens.shape
    lengths = np.full(B, N) if lengths is None else np.asarray(lengths)
    fit = lengths.shape == (B,) and (not B or np.issubdtype(lengths.dtype, np.integer))
    if not fit or lengths.max(initial=0) > N:
        raise UserError(f"The lengths {lengths.tolist()} do not fit {B} prompts of {N} positions.")
    if not B or lengths.min() < 1:
        row = int(np.argmin(lengths)) if B else 0
        raise UserError(f"Prompt {row} is empty; it needs at least one token.")
    tokens = tokens[:, : lengths.max()]
    exists = np.arange(tokens.shape[1]) < lengths[:, None]
    wrong = exists & ((tokens < 0) | (tokens >= config.vocab_size))
    if wrong.any():
        row, at = np.argwhere(wrong)[0]
        raise UserError(
            f"Prompt {row} has the token {tokens[row, at]} at position {at}, outside the "
            f"vocabulary of {config.vocab_size}."
        )
    return np.where(exists, tokens, 0).astype(np.int32), lengths.astype(np.int32)


@functools.cache
def _capacity_of_one(config: ModelConfig, compute: Compute) -> int | None:
    return _described(config, compute, 1, 1).capacity


def has_capacity(model: PreparedModel) -> bool:
    """Whether any part of the memory can become full."""
    return _capacity_of_one(model.config, model.compute) is not None


def check_room(lengths: np.ndarray, room: int | None, new_tokens: np.ndarray | int = 0) -> None:
    """Checks that rows of `lengths` [B] and new tokens fit into `room` positions, if not None."""
    needed = lengths.astype(np.int64) + new_tokens
    row = int(np.argmax(needed))
    if room is not None and needed[row] > room:
        new = needed[row] - lengths[row]
        raise UserError(
            f"Prompt {row} has {lengths[row]} positions{f' and {new} new ones' if new else ''}, "
            f"more than the {room} that fit into the cache."
        )


def check_alive(memory: Memory) -> None:
    """Raises UserError if the arrays were donated to an earlier call."""
    if memory.lengths.is_deleted():
        raise UserError(
            "This memory was donated to an earlier call and cannot be used again. Call fork() "
            "first if you need it twice."
        )


def _described(config: ModelConfig, compute: Compute, batch: int, capacity: int) -> Memory:
    """Shapes and types of a memory in the compute type. Allocates nothing."""
    return jax.eval_shape(functools.partial(empty_memory, config, batch, capacity, compute.dtype))


def check_memory(
    model: PreparedModel, memory: Memory, lengths: np.ndarray, new_tokens: np.ndarray | int = 0
) -> None:
    """Checks that `lengths` [B] positions and new tokens can be appended to the memory."""
    check_alive(memory)
    before = np.asarray(memory.lengths)
    if before.shape != lengths.shape:
        raise UserError(
            f"A memory of {before.shape[0]} rows does not fit {lengths.shape[0]} prompts."
        )
    room = memory.capacity
    like = _described(model.config, model.compute, len(before), room or 1)
    same = jax.tree.structure(like) == jax.tree.structure(memory)
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(m)] for m in (like, memory)]
    if not same or kinds[0] != kinds[1]:
        raise UserError(
            f"The memory does not fit this model, '{model.config.program}': it has other layers, "
            "loops or sizes."
        )
    check_room(before + lengths, room, new_tokens)


def check_shape(name: str, x, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise UserError(f"{name} has the shape {x.shape}, but must have {shape}.")


def whole_numbers(name: str, value, shapes, words: str, low: int, high: int) -> np.ndarray:
    """The numbers as int64. They must have one of the `shapes`, which `words` describe, and be from
    `low` to `high`. Raises UserError otherwise."""
    array = as_array(value)
    if array.dtype.kind not in "iu" or array.shape not in shapes:
        raise UserError(f"{name}={value!r} must be {words} from {low} to {high}.")
    if (array < low).any() or (array > high).any():
        raise UserError(f"{name}={value!r} must be between {low} and {high}.")
    return array.astype(np.int64)


def whole_number(name: str, value: int) -> int:
    """A whole number, at least 1."""
    return int(whole_numbers(name, value, [()], "a whole number", 1, 2**31 - 1))


class Request(NamedTuple):
    """Checked arguments of `generate`: limit [B], sampling (arrays [B]), seeds [B], stop [any]."""

    limit: np.ndarray
    sampling: Sampling
    seeds: np.ndarray
    stop: np.ndarray
    logprobs: bool
    on_tokens: OnTokens | None
    block: int


def check_request(
    config: ModelConfig,
    B: int,
    max_new_tokens: int | WholeNumbers,
    sampling: Sampling | None,
    seeds: int | WholeNumbers,
    stop_tokens: WholeNumbers,
    logprobs: bool,
    on_tokens: OnTokens | None,
    block: int,
) -> Request:
    """Checks the arguments of `generate_from` for a memory of B rows. Raises UserError."""
    each = [(), (B,)], f"a whole number, or one for each of {B} rows,"
    limit = whole_numbers("max_new_tokens", max_new_tokens, *each, 1, 2**31 - 1)
    given = whole_numbers("seeds", seeds, *each, 0, 2**32 - 1)
    seeds = given if given.ndim else given + np.arange(B)
    stop, count = np.zeros(0, np.int64), len(stop_tokens) if np.ndim(stop_tokens) else None
    if count != 0:
        words = "a list of token ids"
        stop = whole_numbers(
            "stop_tokens", stop_tokens, [(count,)], words, 0, config.vocab_size - 1
        )
    return Request(
        np.broadcast_to(limit, (B,)),
        check_sampling(sampling or Sampling(temperature=0.0), B),
        seeds.astype(np.uint32),
        stop.astype(np.int32),
        logprobs,
        on_tokens,
        whole_number("block", block),
    )
