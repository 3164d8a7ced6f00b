"""Inference with caches: prefill that stops early, decode steps, and generation in one loop.

    model = prepare(params, config)                       # matrices in bfloat16, a tree per layer
    cache, logits = prefill(model, tokens, lengths, new_tokens=64)    # [B, N] -> next [B, V]
    cache, logits = decode_step(model, cache, tokens)     # one more token for each row
    out = generate(model, prompts, max_new_tokens=64, sampling=Sampling(temperature=0.8))

Prefill runs the stages that write caches over the prompt, in chunks of one size, and the
cross-decoder for the last position of each row alone (YOCO, section 2.2): the work of a YOCO is
linear in the prompt and its memory, beyond the cache, does not depend on it. (Full layers look back
from each chunk; plain XLA also makes a transposed copy of one layer's keys and values for that.)
Layers and loops are unrolled, so that each has cache arrays of its own (see cache.py). Another loop
count than the trained one is another config: dataclasses.replace(config, num_loops=5).
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from yocou_jax import cache as cache_lib
from yocou_jax import checks
from yocou_jax import sampling as sampling_lib
from yocou_jax.attention import Context, stream_prefix
from yocou_jax.cache import AXES, Append, KVCache, append, kv_cache
from yocou_jax.config import ModelConfig
from yocou_jax.errors import UserError
from yocou_jax.model import Block, LanguageModel, compute_dtype, head_matrix, to_logits
from yocou_jax.sampling import Sampling
from yocou_jax.sharding import batch_ways, constrain
from yocou_jax.typing import Array, Bool, Float, Int, PyTree

__all__ = [
    "Generation",
    "Model",
    "Sampling",
    "decode_step",
    "fork",
    "generate",
    "generate_from",
    "new_cache",
    "prefill",
    "prepare",
    "sizes",
]

# Positions of a prompt at once: enough rows to fill a device's matrix unit, and for large batches
# fewer (down to 128), because of their activations: 2 GB for 16,384 positions on one device at 1.3B
# in bfloat16, by XLA's account.
CHUNK, CHUNK_OF_ALL_ROWS = 2048, 16_384
RESIDUAL = ("batch", "length", "activation")  # logical axes of the residual stream
# Takes new tokens [B, n]; may return which rows [B] are to end here.
OnTokens = Callable[[np.ndarray], np.ndarray | Sequence[bool] | None]
# Parameters that are used in float32 whatever the compute type (see layers.py and moe.py).
FLOAT32 = ("embedding", "scale", "router", "stream_gate")


# --- The model ------------------------------------------------------------------------------------


@flax.struct.dataclass
class Model:
    """Parameters as inference reads them: matrices in the compute type, `stage_*` a tuple of one
    tree per layer instead of stacked arrays, "head" [D, V] also where it is tied."""

    params: PyTree
    config: ModelConfig = flax.struct.field(pytree_node=False)


@functools.partial(jax.jit, static_argnames="config")
def _prepared(params: PyTree, config: ModelConfig) -> PyTree:
    dtype = compute_dtype(config)

    def cast(path, x):
        exact = any(getattr(key, "key", None) in FLOAT32 for key in path)
        return x if exact else x.astype(dtype)

    head = head_matrix(params, config).astype(dtype)
    params = jax.tree_util.tree_map_with_path(cast, params) | {"head": head}
    for name, stage in config.program.named_stages:
        stacked = params[name]["layers"]
        params[name] = tuple(
            jax.tree.map(lambda x, layer=layer: x[layer], stacked) for layer in range(stage.layers)
        )
    return params


def prepare(params: PyTree, config: ModelConfig) -> Model:
    """The trained parameters (see `LanguageModel`) made ready; the results are those of training's
    forward pass, to the bit of every cast. Copies: let go of `params` if memory is short."""
    return Model(_prepared(params, config), config)


def _apply(model: Model, method: str, *args):
    """A part of LanguageModel that is no stage."""
    return LanguageModel(model.config).apply({"params": model.params}, *args, method=method)


# keep_unused: what is made of nothing lies where the parameters do, as all that follows will, and
# the programs that follow are compiled for that place once.
@functools.partial(jax.jit, static_argnames=("batch", "capacity"), keep_unused=True)
def new_cache(model: Model, batch: int, capacity: int) -> KVCache:
    """An empty cache in the compute type, the learned prefixes of parallel streams in place."""
    config = model.config
    dtype = compute_dtype(config)
    cache = kv_cache(config, batch, capacity, dtype)
    if config.kv_prefix:
        stages = []
        for (name, stage), entries in zip(config.program.named_stages, cache.stages, strict=True):
            prefixes = [layer["attention"]["prefix"] for layer in model.params[name]]
            stages.append(
                tuple(
                    jax.tree.map(
                        lambda x, first: jax.lax.dynamic_update_slice_in_dim(x, first, 0, 1),
                        kv,
                        stream_prefix(prefixes[i % stage.layers], kv.k.shape[0], dtype),
                    )
                    for i, kv in enumerate(entries)
                )
            )
        cache = cache.replace(stages=tuple(stages))
    return _constrain_cache(cache)


@functools.partial(jax.jit, static_argnames="batch", keep_unused=True)
def _no_residual(model: Model, batch: int) -> Float[Array, "PB 1 D"]:
    config = model.config
    shape = (config.program.streams * batch, 1, config.d_model)
    return constrain(jnp.zeros(shape, compute_dtype(config)), *RESIDUAL)


def _constrain_cache(cache: KVCache) -> KVCache:
    """What one program returns must lie as the next one takes it, or that is compiled twice."""
    return cache.replace(
        stages=jax.tree.map(lambda x: constrain(x, *AXES), cache.stages),
        global_kv=jax.tree.map(lambda x: constrain(x, *AXES), cache.global_kv),
        lengths=constrain(cache.lengths, None),  # the host reads them
    )


@functools.partial(jax.jit, static_argnames=("config", "mixer"))
def _block(params, x, context, cached, *, config: ModelConfig, mixer: str):
    """One layer. A jit of its own, so that unrolled layers are traced and lowered only once."""
    x, out = Block(config, mixer).apply({"params": params}, x, context, cached)
    return x, out.cached


# --- The forward pass in two parts ----------------------------------------------------------------


def _write(
    model: Model, cache: KVCache, tokens: Int[Array, "B N"], at: Append
) -> tuple[Float[Array, "PB N D"], KVCache, Context]:
    """Runs every stage that has a cache and the global K, V projection: appends the tokens.

    Returns the residual stream, the cache and the context in which cross stages go on.
    """
    config = model.config
    streams = config.program.streams
    at_streams = at
    if streams > 1:
        start = jnp.tile(at.start, streams) if jnp.ndim(at.start) else at.start
        at_streams = at.replace(start=start, count=jnp.tile(at.count, streams))
    context = Context(at_streams.positions(tokens.shape[1]), at=at_streams)
    x = _apply(model, "embed", tokens)
    stages, old = [], iter(cache.stages)
    for name, stage in config.program.named_stages:
        if stage.mixer == "cross":
            break
        layers, written = model.params[name], []
        for i, cached in zip(range(stage.depth), next(old), strict=True):
            params = layers[i % stage.layers]
            x, cached = _block(params, x, context, cached, config=config, mixer=stage.mixer)
            written.append(cached)
        stages.append(tuple(written))
    global_kv = cache.global_kv
    if global_kv is not None:
        new = _apply(model, "write_global_kv", x, context)
        global_kv = append(global_kv, new, at)
        context = context.replace(global_kv=global_kv, new_global_kv=new)
    lengths = cache.lengths + at.count
    return x, _constrain_cache(KVCache(tuple(stages), global_kv, lengths)), context


def _read(model: Model, x: Float[Array, "PB N D"], context: Context) -> Float[Array, "B N V"]:
    """Runs the cross stages, the final norm and the head for the positions of x."""
    config = model.config
    for name, stage in config.program.named_stages:
        if stage.mixer == "cross":
            for i in range(stage.depth):
                params = model.params[name][i % stage.layers]
                x, _ = _block(params, x, context, None, config=config, mixer="cross")
    return to_logits(_apply(model, "read_out", x), model.params["head"])


# --- Prefill --------------------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnames=("cache", "last"), static_argnames=("whole", "score"))
def _prefill_chunk(model, cache, last, tokens, count, start, *, whole, score):
    """One chunk [B, C] of which row b has the first count[b]; start None: each row's own length.

    last [PB, 1, D] is each row's residual stream at its last position so far, before cross stages.
    """
    at = Append(cache.lengths if start is None else start, count, whole)
    x, cache, context = _write(model, cache, tokens, at)
    logits = _read(model, x, context) if score else None
    tiled = jnp.tile(count, x.shape[0] // count.shape[0])[:, None, None]
    picked = jnp.take_along_axis(x, jnp.maximum(tiled - 1, 0), axis=1)
    return cache, constrain(jnp.where(tiled > 0, picked, last), *RESIDUAL), logits


@jax.jit
def _next_logits(model, cache, last):
    """The cross-decoder for the last position of each row: logits [B, V] of what comes next."""
    one = jnp.ones_like(cache.lengths)
    at = Append(cache.lengths - 1, one)
    context = Context(at.positions(1), at=at, global_kv=cache.global_kv)
    return _read(model, last, context)[:, 0]


def bucket(n: int, least: int = 16) -> int:
    """The least of 1, 1.25, 1.5, 1.75 times a power of two that holds n: shapes for which there is
    one compiled program each, at most a quarter larger than needed (or `least`)."""
    if n <= least:
        return least
    quarter = max(1, 2 ** ((n - 1).bit_length() - 3))
    return -(-n // quarter) * quarter


def sizes(
    batch: int,
    longest: int,
    new_tokens: int = 0,
    *,
    capacity: int | None = None,
    chunk: int | None = None,
) -> tuple[int, int]:
    """(capacity, chunk) for a batch of prompts of up to `longest` positions and what comes behind
    them, where none is given. Requests of the same sizes share their compiled programs."""
    if chunk is None:
        ways = batch_ways()
        rows = batch if batch % ways else batch // ways  # on each device
        share = max(CHUNK_OF_ALL_ROWS // max(rows, 1) // 128, 1) * 128
        chunk = min(CHUNK, share, bucket(longest))
    if chunk < 1:
        raise UserError(f"chunk={chunk} must be at least 1 position.")
    if capacity is None:  # room for whole chunks: the last one is then written in one piece
        capacity = max(bucket(longest + new_tokens), -(-longest // chunk) * chunk)
    return capacity, chunk


def prefill(
    model: Model,
    tokens: Int[Array, "B N"],
    lengths: Int[Array, " B"] | None = None,
    *,
    cache: KVCache | None = None,
    new_tokens: int = 256,
    capacity: int | None = None,
    chunk: int | None = None,
    score: bool = False,
) -> tuple[KVCache, Float[Array, "B V"]] | tuple[KVCache, Float[Array, "B V"], Array]:
    """Appends prompts to a cache, which is given up to this call, or to a new one.

    Row b is tokens[b, :lengths[b]] (all of it without lengths). The new cache has `capacity`
    positions, by default some more than prompts and `new_tokens` need. The work is done in chunks
    of `chunk` positions; see `sizes` for the defaults.

    Returns:
      The cache and the logits [B, V] (float32) of the token behind each row. With score=True, for
      which the cross-decoder runs everywhere, also the logits [B, max(lengths), V] at all
      positions (those behind the end of a row mean nothing).

    Raises:
      UserError: an empty row, a token outside the vocabulary, more positions than the cache holds,
        a cache of another model.
    """
    tokens, lengths = checks.check_prompts(model.config, tokens, lengths)
    B, N = tokens.shape
    room, C = sizes(B, N, new_tokens, capacity=capacity, chunk=chunk)
    fresh = cache is None
    if fresh:
        checks.check_room(lengths, room if checks.has_capacity(model.config) else None)
        cache = new_cache(model, B, room)
    else:
        if capacity is not None:
            raise UserError(f"capacity={capacity} cannot be given with a cache, which has its own.")
        checks.check_cache(model.config, cache, lengths)
    width = -(-N // C) * C
    padded = np.zeros((B, width), np.int32)
    padded[:, :N] = tokens
    last, scores = _no_residual(model, B), []
    for first in range(0, width, C):
        cache, last, logits = _prefill_chunk(
            model,
            cache,
            last,
            padded[:, first : first + C],
            np.clip(lengths - first, 0, C),
            np.int32(first) if fresh else None,
            whole=fresh and width <= room,
            score=score,
        )
        scores.append(logits)
    logits = _next_logits(model, cache, last)
    if not score:
        return cache, logits
    return cache, logits, jnp.concatenate(scores, axis=1)[:, :N]


@jax.jit
def _fork(cache: KVCache, rows: Int[Array, " M"]) -> KVCache:
    batch = cache.lengths.shape[0]

    def take(x):  # with parallel streams, x has every stream of every row, stream by stream
        streams = jnp.arange(x.shape[0] // batch)
        return x[(streams[:, None] * batch + rows).reshape(-1)]

    return _constrain_cache(jax.tree.map(take, cache))


def fork(cache: KVCache, rows: Sequence[int]) -> KVCache:
    """A cache of the rows `rows` of this one, copies, to continue each in another way:
    fork(cache, [0, 0, 0, 1]) gives the first prompt three continuations, and the second one.

    The logits go along as logits[rows]. Raises UserError for rows that are not there.
    """
    checks.check_alive(cache)
    batch = cache.lengths.shape[0]
    rows = np.asarray(rows)
    good = rows.ndim == 1 and rows.size and np.issubdtype(rows.dtype, np.integer)
    if not good or rows.min() < 0 or rows.max() >= batch:
        raise UserError(f"rows={rows.tolist()} must be row numbers from 0 to {batch - 1}.")
    return _fork(cache, rows)


# --- Decode ---------------------------------------------------------------------------------------


def _step(model: Model, cache: KVCache, tokens: Int[Array, " B"], active: Bool[Array, " B"]):
    at = Append(cache.lengths, active.astype(jnp.int32))
    x, cache, context = _write(model, cache, tokens[:, None], at)
    return cache, _read(model, x, context)[:, 0]


@functools.partial(jax.jit, donate_argnames="cache")
def decode_step(
    model: Model,
    cache: KVCache,
    tokens: Int[Array, " B"],
    active: Bool[Array, " B"] | None = None,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """Appends one token to every row (to those that are `active`), and says what comes next: logits
    [B, V] in float32. The cache is given up.

    Rows that are not active, or whose token found the cache full, get NaN.
    """
    if active is None:
        active = jnp.ones(tokens.shape, bool)
    cache, logits = _step(model, cache, tokens, active)
    room = cache_lib.capacity(model.config, cache)
    good = active if room is None else active & (cache.lengths <= room)
    return cache, jnp.where(good[:, None], logits, jnp.nan)


# --- Generation -----------------------------------------------------------------------------------


@flax.struct.dataclass
class _State:
    """Where a generation stands: logits [B, V] of the next token, seen [B, V] the tokens of prompt
    and output (None if no penalty needs them), keys [B], end [B] the length at which a row is at
    its limit, done [B]."""

    cache: KVCache
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"] | None
    keys: Array
    end: Int[Array, " B"]
    done: Bool[Array, " B"]


def _constrain_state(state: _State) -> _State:
    """As `_constrain_cache`; the host reads `done`."""
    rows = {name: constrain(getattr(state, name), None) for name in ("keys", "end", "done")}
    table = {
        name: None if x is None else constrain(x, "batch", "vocab")
        for name, x in (("logits", state.logits), ("seen", state.seen))
    }
    return state.replace(cache=_constrain_cache(state.cache), **rows, **table)


@functools.partial(jax.jit, donate_argnames="cache")
def _begin(cache, logits, seen, seeds, limit) -> _State:
    """A jit, so that the whole state lies where the cache does: one program runs every block."""
    keys = jax.vmap(jax.random.key)(seeds)
    end = cache.lengths + limit
    return _constrain_state(_State(cache, logits, seen, keys, end, jnp.zeros(end.shape, bool)))


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("block", "sort", "logprobs"))
def _generate_block(model, state, sampling, stop, *, block, sort, logprobs):
    """Up to `block` steps, fewer if all rows are done: at their end, or with a token of `stop`.

    Returns the state, tokens [B, block] (-1: none) and log-probabilities.
    """
    B = state.done.shape[0]

    def unfinished(carry):
        i, state, *_ = carry
        return (i < block) & ~state.done.all()

    def step(carry):
        i, state, tokens, logps = carry
        # By position: to stop and go on draws what one call would have.
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.cache.lengths)
        chosen = sampling_lib.sample(state.logits, keys, sampling, sort=sort, seen=state.seen)
        active = ~state.done
        tokens = tokens.at[:, i].set(jnp.where(active, chosen, -1))
        if logprobs:
            logp = jax.nn.log_softmax(state.logits)
            logp = jnp.take_along_axis(logp, chosen[:, None], axis=1)[:, 0]
            logps = logps.at[:, i].set(jnp.where(active, logp, 0.0))
        seen = state.seen
        if seen is not None:
            seen = seen.at[jnp.arange(B), chosen].max(active)
        cache, logits = _step(model, state.cache, chosen, active)
        logits = jnp.where(active[:, None], logits, state.logits)
        done = state.done | (chosen[:, None] == stop).any(1) | (cache.lengths >= state.end)
        return i + 1, _State(cache, logits, seen, state.keys, state.end, done), tokens, logps

    logps = jnp.zeros((B, block)) if logprobs else None
    carry = (0, state, jnp.full((B, block), -1, jnp.int32), logps)
    _, state, tokens, logps = jax.lax.while_loop(unfinished, step, carry)
    # On every process, whose hosts read them.
    tokens, logps = (None if x is None else constrain(x, None, None) for x in (tokens, logps))
    return _constrain_state(state), tokens, logps


@functools.partial(jax.jit, donate_argnames="state")
def _end_rows(state: _State, ended: Bool[Array, " B"]) -> _State:
    """A jit, so that the state stays where the next block takes it."""
    return _constrain_state(state.replace(done=state.done | ended))


class Generation(NamedTuple):
    """tokens [B, n], -1 behind the end of a row; lengths [B] without those (a stop token counts);
    logprobs [B, n]: log-probabilities of the tokens under the model itself, before temperature and
    filters, if asked for. `generate_from` goes on from cache, logits [B, V] and seen [B, V] (which
    is None without a repetition penalty).

    prefill_s (None if that was done before) and decode_s: seconds, in which programs that ran for
    the first time were compiled, and on_tokens was called.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray | None
    cache: KVCache
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"] | None
    prefill_s: float | None
    decode_s: float


class _Request(NamedTuple):
    """What was asked for, checked: limit, seeds [B], sampling of arrays [B], stop [any]."""

    limit: np.ndarray
    sampling: Sampling
    seeds: np.ndarray
    stop: np.ndarray
    logprobs: bool
    on_tokens: OnTokens | None
    block: int


def _check_request(
    config: ModelConfig,
    B: int,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None,
    seeds: int | Sequence[int],
    stop_tokens: Sequence[int],
    logprobs: bool,
    on_tokens: OnTokens | None,
    block: int,
) -> _Request:
    each = [(), (B,)], f"a whole number, or one for each of {B} rows,"
    limit = checks.whole_numbers("max_new_tokens", max_new_tokens, *each, 1, 2**31 - 1)
    given = checks.whole_numbers("seeds", seeds, *each, 0, 2**32 - 1)
    seeds = given + np.arange(B) * (given.ndim == 0)
    stop, count = np.zeros(0, np.int64), len(stop_tokens) if np.ndim(stop_tokens) else None
    if count != 0:
        words = "a list of token ids"
        stop = checks.whole_numbers(
            "stop_tokens", stop_tokens, [(count,)], words, 0, config.vocab_size - 1
        )
    return _Request(
        np.broadcast_to(limit, (B,)),
        sampling_lib.check(sampling or Sampling(temperature=0.0), B),
        seeds.astype(np.uint32),
        stop.astype(np.int32),
        logprobs,
        on_tokens,
        checks.whole_number("block", block),
    )


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    num_samples: int = 1,
    seeds: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] = (),
    logprobs: bool = False,
    on_tokens: OnTokens | None = None,
    block: int = 8,
    capacity: int | None = None,
    chunk: int | None = None,
) -> Generation:
    """Continues prompts of any lengths; for the options see `generate_from`, `sizes` for the last
    two.

    Each prompt is read once and has num_samples rows in the result, one after the other, each with
    a seed (and where given, a limit and sampling fields) of its own.

    Raises:
      UserError: see `prefill` and `generate_from`; a prompt and its output longer than the cache.
    """
    config = model.config
    prompts = [np.asarray(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        if prompt.size and (prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer)):
            raise UserError(f"Prompt {row} is no list of token ids: encode text first.")
    lengths = np.array([prompt.size for prompt in prompts], np.int64)
    tokens = np.zeros((len(prompts), max(lengths, default=0)), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : prompt.size] = prompt
    tokens, lengths = checks.check_prompts(config, tokens, lengths)
    num_samples = checks.whole_number("num_samples", num_samples)
    rows = np.repeat(np.arange(len(prompts)), num_samples)
    request = _check_request(
        config,
        len(rows),
        max_new_tokens,
        sampling,
        seeds,
        stop_tokens,
        logprobs,
        on_tokens,
        block,
    )
    longest, limits = int(lengths.max()), request.limit.reshape(-1, num_samples).max(axis=1)
    new = int(limits.max())
    capacity, chunk = sizes(len(prompts), longest, new, capacity=capacity, chunk=chunk)
    checks.check_room(lengths, capacity if checks.has_capacity(config) else None, limits)
    seen = np.zeros((len(rows), config.vocab_size), bool)
    for row, prompt in enumerate(rows if sampling_lib.needs_seen(request.sampling) else ()):
        seen[row, prompts[prompt]] = True
    start = time.perf_counter()
    cache, logits = prefill(model, tokens, lengths, capacity=capacity, chunk=chunk)
    jax.block_until_ready(logits)
    prefill_s = time.perf_counter() - start
    if num_samples > 1:
        cache, logits = fork(cache, rows), logits[rows]
    return _run(model, cache, logits, seen, request)._replace(prefill_s=prefill_s)


def generate_from(
    model: Model,
    cache: KVCache,
    logits: Float[Array, "B V"],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | None = None,
    seeds: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] = (),
    logprobs: bool = False,
    on_tokens: OnTokens | None = None,
    block: int = 8,
    seen: Bool[Array, "B V"] | None = None,
) -> Generation:
    """Samples up to max_new_tokens for every row of a cache, which is given up.

    All steps run in one compiled loop. With `on_tokens` they run in blocks of `block` steps, and it
    is called with the new tokens [B, n] after each (-1 behind the end of a row). It may return
    which rows [B] end with that block, for reasons that the host alone knows.

    Args:
      logits: of the next token, as `prefill` and `decode_step` return them. To try several
        continuations of one prompt: fork(cache, rows), logits[rows].
      max_new_tokens: for all rows, or one for each.
      sampling: greedy if None; a field may have one value per row.
      seeds: one per row, from 0 to 2^32 - 1, or one from which row b takes seeds + b. What a row
        draws depends on its own seed, position and logits, and not on the batch around it.
      stop_tokens: a row ends with the first of these.
      seen: tokens that a repetition penalty counts besides the new ones.

    Raises:
      UserError: an option that makes no sense, or more tokens than the cache holds.
    """
    B, V = cache.lengths.shape[0], model.config.vocab_size
    request = _check_request(
        model.config, B, max_new_tokens, sampling, seeds, stop_tokens, logprobs, on_tokens, block
    )
    checks.check_cache(model.config, cache, np.zeros(B, np.int64), request.limit)
    for name, x in (("logits", logits), ("seen", seen)):
        if x is not None and x.shape != (B, V):
            raise UserError(f"{name} has the shape {x.shape}, but must have ({B}, {V}).")
    here = getattr(logits, "is_fully_addressable", True)
    lost = np.flatnonzero(np.isnan(logits).any(axis=1)) if here else ()
    if len(lost):
        raise UserError(
            f"Row {lost[0]} has no logits: it was not active in its last step, or its cache was "
            "full."
        )
    if seen is None:
        seen = np.zeros((B, V), bool)
    return _run(model, cache, logits, seen, request)


def _run(model: Model, cache: KVCache, logits, seen, request: _Request) -> Generation:
    limit, sampling = int(request.limit.max()), request.sampling
    if not sampling_lib.needs_seen(sampling):
        seen = None
    start = time.perf_counter()
    state = _begin(cache, logits, seen, request.seeds, request.limit.astype(np.int32))
    size = bucket(limit, 1) if request.on_tokens is None else request.block
    tokens, logps = [], []
    for _ in range(0, limit, size):
        state, new, logp = _generate_block(
            model,
            state,
            sampling,
            request.stop,
            block=size,
            sort=sampling_lib.needs_sort(sampling),
            logprobs=request.logprobs,
        )
        new = np.asarray(new)
        tokens.append(new)
        logps.append(logp)
        ended = None if request.on_tokens is None else request.on_tokens(new)
        if ended is not None:
            state = _end_rows(state, np.asarray(ended, bool))
        if np.asarray(state.done).all():
            break
    decode_s = time.perf_counter() - start
    tokens = np.concatenate(tokens, axis=1)
    lengths = (tokens >= 0).sum(axis=1)
    longest = lengths.max()
    return Generation(
        tokens[:, :longest],
        lengths,
        np.concatenate(logps, axis=1)[:, :longest] if request.logprobs else None,
        state.cache,
        state.logits,
        state.seen,
        None,
        decode_s,
    )
