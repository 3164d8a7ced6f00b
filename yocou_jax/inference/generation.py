"""Generation: tokens are drawn, appended and drawn again, in one compiled loop."""

import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from yocou_jax.errors import UserError
from yocou_jax.inference import request as requests
from yocou_jax.inference import sampling as sampling_lib
from yocou_jax.inference.forward import fork, run_prefill, step
from yocou_jax.inference.request import OnTokens, Prompts, Request, bucket, default_sizes
from yocou_jax.inference.sampling import Sampling
from yocou_jax.inference.weights import PreparedModel
from yocou_jax.model.memory import Memory
from yocou_jax.sharding import constrain
from yocou_jax.typing import AnyArray, Array, Bool, Float, Int, WholeNumbers


@flax.struct.dataclass
class _State:
    """What a step of the loop reads and changes.

    logits: of the next token. seen: the tokens of prompt and output; None if no row has a
    repetition penalty. keys: one random key per row. end: the length at which a row has all its new
    tokens. done: whether a row has ended.
    """

    memory: Memory
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"] | None
    keys: Array
    end: Int[Array, " B"]
    done: Bool[Array, " B"]


def _constrain_state(state: _State) -> _State:
    """Like `Memory.constrained`, for the whole state. `done` is replicated: every host reads it."""
    rows = {name: constrain(getattr(state, name), None) for name in ("keys", "end", "done")}
    table = {
        name: None if x is None else constrain(x, "batch", "vocab")
        for name, x in (("logits", state.logits), ("seen", state.seen))
    }
    return state.replace(memory=state.memory.constrained(), **rows, **table)


@functools.partial(jax.jit, donate_argnames="memory")
def _begin(memory, logits, seen, seeds, limit) -> _State:
    """The first state. This is a jit, so that its arrays are sharded as those that a block returns.
    Otherwise the second block would be compiled again."""
    keys = jax.vmap(jax.random.key)(seeds)
    end = memory.lengths + limit
    return _constrain_state(_State(memory, logits, seen, keys, end, jnp.zeros(end.shape, bool)))


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("block", "sort", "logprobs"))
def _generate_block(model, state, sampling, stop, *, block, sort, logprobs):
    """Runs up to `block` steps, fewer if all rows are done. A row is done at its `end`, or after a
    token of `stop`.

    Returns the state, tokens [B, block] (-1 after the end of a row), and their log-probabilities
    [B, block] (None without `logprobs`).
    """
    B = state.done.shape[0]

    def unfinished(carry):
        i, state, *_ = carry
        return (i < block) & ~state.done.all()

    def draw(carry):
        i, state, tokens, logps = carry
        # The key depends on the position, so two calls draw the tokens that one call would draw.
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.memory.lengths)
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
        memory, logits = step(model, state.memory, chosen, active)
        logits = jnp.where(active[:, None], logits, state.logits)
        done = state.done | (chosen[:, None] == stop[None]).any(1) | (memory.lengths >= state.end)
        return i + 1, _State(memory, logits, seen, state.keys, state.end, done), tokens, logps

    logps = jnp.zeros((B, block)) if logprobs else None
    carry = (0, state, jnp.full((B, block), -1, jnp.int32), logps)
    _, state, tokens, logps = jax.lax.while_loop(unfinished, draw, carry)
    # Replicated, because the host of every process reads them.
    tokens, logps = (None if x is None else constrain(x, None, None) for x in (tokens, logps))
    return _constrain_state(state), tokens, logps


@functools.partial(jax.jit, donate_argnames="state")
def _end_rows(state: _State, ended: Bool[Array, " B"]) -> _State:
    """Marks rows as done. It is a jit, so that the arrays keep the sharding that a block takes."""
    return _constrain_state(state.replace(done=state.done | ended))


class Generation(NamedTuple):
    """What `generate` and `generate_from` return.

    tokens [B, n]: the new tokens, and -1 after the end of a row.
    lengths [B]: the number of new tokens of each row. A stop token counts.
    logprobs [B, n]: log p of each token under the model itself, without temperature and filters.
        None if they were not asked for.
    memory, logits, seen: arguments for `generate_from`, which continues the rows. seen is None
        without a repetition penalty.
    prefill_s, decode_s: seconds. They include the compilation of programs that ran for the first
        time, and the calls of on_tokens. prefill_s is None for `generate_from`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray | None
    memory: Memory
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"] | None
    prefill_s: float | None
    decode_s: float


def generate(
    model: PreparedModel,
    prompts: Sequence[WholeNumbers],
    *,
    max_new_tokens: int | WholeNumbers,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    seeds: int | WholeNumbers = 0,
    stop_tokens: WholeNumbers = (),
    logprobs: bool = False,
    on_tokens: OnTokens | None = None,
    block: int = 8,
    capacity: int | None = None,
    chunk: int | None = None,
) -> Generation:
    """Continues prompts, which may have different lengths.

    `generate_from` describes the options, and `default_sizes` describes capacity and chunk. Each
    prompt is read once. The result has num_samples rows for each prompt, one after the other. So
    seeds, and max_new_tokens and fields of sampling if they are lists, have one entry for each of
    len(prompts) * num_samples rows.

    Raises:
      UserError: the errors of `prefill` and `generate_from`.
    """
    config = model.config
    tokens, lengths = requests.check_prompts(config, *requests.padded(prompts))
    num_samples = requests.whole_number("num_samples", num_samples)
    rows = np.repeat(np.arange(len(lengths)), num_samples)
    request = requests.check_request(
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
    capacity, chunk = default_sizes(len(lengths), longest, new, capacity=capacity, chunk=chunk)
    requests.check_room(lengths, capacity if requests.has_capacity(model) else None, limits)
    seen = np.zeros((len(rows), config.vocab_size), bool)
    if sampling_lib.needs_seen(request.sampling):
        for row, prompt in enumerate(rows):
            seen[row, tokens[prompt, : lengths[prompt]]] = True
    start = time.perf_counter()
    memory, logits = run_prefill(model, Prompts(tokens, lengths, capacity, chunk))
    jax.block_until_ready(logits)
    prefill_s = time.perf_counter() - start
    if num_samples > 1:
        memory, logits = fork(memory, rows), logits[rows]
    return _run(model, memory, logits, seen, request)._replace(prefill_s=prefill_s)


def generate_from(
    model: PreparedModel,
    memory: Memory,
    logits: Float[AnyArray, "B V"],
    *,
    max_new_tokens: int | WholeNumbers,
    sampling: Sampling | None = None,
    seeds: int | WholeNumbers = 0,
    stop_tokens: WholeNumbers = (),
    logprobs: bool = False,
    on_tokens: OnTokens | None = None,
    block: int = 8,
    seen: Bool[AnyArray, "B V"] | None = None,
) -> Generation:
    """Samples up to max_new_tokens for every row of a memory. The memory is donated: it cannot be
    used again.

    All steps run in one compiled loop. With `on_tokens` they run in blocks of `block` steps. After
    each block, on_tokens is called with the new tokens [B, n] (-1 after the end of a row). It may
    return which rows [B] end there, for example because the host has found a stop text.

    Args:
      logits: of the next token, as `prefill` and `decode_step` return them. To try several
        continuations of one prompt: fork(memory, rows), logits[rows].
      max_new_tokens: one number for all rows, or one for each row.
      sampling: greedy if None. A field may have one value per row.
      seeds: one per row, from 0 to 2^32 - 1; or one number, and row b has the seed seeds + b. The
        tokens of a row depend on its own seed, positions and logits, and not on other rows.
      stop_tokens: a row ends with the first of these.
      seen: tokens that a repetition penalty counts in addition to the new ones.

    Raises:
      UserError: a value that is not possible, or more tokens than fit into the memory.
    """
    B, V = memory.lengths.shape[0], model.config.vocab_size
    request = requests.check_request(
        model.config, B, max_new_tokens, sampling, seeds, stop_tokens, logprobs, on_tokens, block
    )
    requests.check_memory(model, memory, np.zeros(B, np.int64), request.limit)
    requests.check_shape("logits", logits, (B, V))
    if seen is not None:
        requests.check_shape("seen", seen, (B, V))
    here = getattr(logits, "is_fully_addressable", True)
    lost = np.flatnonzero(np.isnan(logits).any(axis=1)) if here else ()
    if len(lost):
        raise UserError(
            f"Row {lost[0]} has no logits: it was not active in its last step, or its cache was "
            "full."
        )
    if seen is None:
        seen = np.zeros((B, V), bool)
    return _run(model, memory, logits, seen, request)


def _run(model: PreparedModel, memory: Memory, logits, seen, request: Request) -> Generation:
    limit, sampling = int(request.limit.max()), request.sampling
    if not sampling_lib.needs_seen(sampling):
        seen = None
    start = time.perf_counter()
    state = _begin(memory, logits, seen, request.seeds, request.limit.astype(np.int32))
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
        state.memory,
        state.logits,
        state.seen,
        None,
        decode_s,
    )
