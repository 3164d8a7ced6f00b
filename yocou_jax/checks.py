"""What inference is asked for, checked on the host before any work: a sentence for each mistake."""

import functools

import jax
import numpy as np

from yocou_jax.cache import KVCache, capacity, kv_cache
from yocou_jax.config import ModelConfig
from yocou_jax.errors import UserError
from yocou_jax.model import compute_dtype


def check_prompts(config: ModelConfig, tokens, lengths) -> tuple[np.ndarray, np.ndarray]:
    """tokens [B, max(lengths)] with 0 behind the end of each row, and lengths [B], both int32."""
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


def has_capacity(config: ModelConfig) -> bool:
    """Whether anything but rings is kept; those never fill."""
    return any(stage.mixer != "window" for stage in config.program.stages)


def check_room(lengths: np.ndarray, room: int | None, new_tokens: np.ndarray | int = 0) -> None:
    """Whether rows of `lengths` [B] and what is to come fit into `room` positions (None: any)."""
    needed = lengths.astype(np.int64) + new_tokens
    row = int(np.argmax(needed))
    if room is not None and needed[row] > room:
        new = needed[row] - lengths[row]
        raise UserError(
            f"Prompt {row} has {lengths[row]} positions{f' and {new} new ones' if new else ''}, "
            f"more than the {room} that the cache holds."
        )


def check_alive(cache: KVCache) -> None:
    """Whether the cache's arrays were not donated to an earlier call."""
    if cache.lengths.is_deleted():
        raise UserError(
            "The cache was given up to an earlier call; to use it twice, fork it first."
        )


def check_cache(
    config: ModelConfig, cache: KVCache, lengths: np.ndarray, new_tokens: np.ndarray | int = 0
) -> None:
    """Whether `lengths` positions and new tokens may be appended to the cache."""
    check_alive(cache)
    before = np.asarray(cache.lengths)
    if before.shape != lengths.shape:
        raise UserError(
            f"A cache of {before.shape[0]} rows cannot go on with {lengths.shape[0]} prompts."
        )
    depths = [stage.depth for stage in config.program.stages if stage.mixer != "cross"]
    same = [len(entries) for entries in cache.stages] == depths
    same &= (cache.global_kv is not None) == config.program.has_cross
    room = capacity(config, cache) if same else None
    if same:
        like = functools.partial(kv_cache, config, len(before), room or 1, compute_dtype(config))
        kinds = [(x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(like))]
        same = kinds == [(x.shape, x.dtype) for x in jax.tree.leaves(cache)]
    if not same:
        raise UserError(
            f"The cache is not one of this model, '{config.program}': it has other layers, loops "
            "or sizes."
        )
    check_room(before + lengths, room, new_tokens)


def whole_numbers(name: str, value, shapes, words: str, low: int, high: int) -> np.ndarray:
    """The numbers as int64 of one of the shapes; `words` say which those are."""
    try:
        array = np.asarray(value)
    except ValueError:  # nested lists of different lengths
        array = np.array(None)
    if array.dtype.kind not in "iu" or array.shape not in shapes:
        raise UserError(f"{name}={value!r} must be {words} from {low} to {high}.")
    if (array < low).any() or (array > high).any():
        raise UserError(f"{name}={value!r} must lie between {low} and {high}.")
    return array.astype(np.int64)


def whole_number(name: str, value: int) -> int:
    """One from 1 up."""
    return int(whole_numbers(name, value, [()], "a whole number", 1, 2**31 - 1))
