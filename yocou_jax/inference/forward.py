"""The forward pass of inference, which reads and extends a memory.

Prefill runs the self-decoder over the prompt, in chunks of one size, and the cross-decoder only for
the last position of each row (YOCO, section 2.2). So if all layers of the self-decoder are window
layers, the work is linear in the length of the prompt. Temporary memory does not grow with the
prompt, except in full layers on plain XLA: it makes a transposed copy of the keys and values of one
layer. Layers and loops are unrolled, so that each (loop, layer) has arrays of its own (see
memory.py).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from yocou_jax.errors import UserError
from yocou_jax.inference import request
from yocou_jax.inference.request import Prompts
from yocou_jax.inference.weights import PreparedModel
from yocou_jax.model import Block, empty_memory, to_logits
from yocou_jax.model.attention import MODULES, Context
from yocou_jax.model.memory import Memory, NewPositions
from yocou_jax.program import Visit
from yocou_jax.sharding import constrain, take
from yocou_jax.typing import AnyArray, Array, Bool, Float, Int, WholeNumbers

RESIDUAL = ("batch", "length", "activation")  # logical axes of the residual stream


# keep_unused keeps `model` as an input, so that the new arrays are on the devices of the model.
# Otherwise the programs that take these arrays would be compiled twice.
@functools.partial(jax.jit, static_argnames=("batch", "capacity"), keep_unused=True)
def new_memory(model: PreparedModel, batch: int, capacity: int) -> Memory:
    """An empty memory for `batch` rows of at most `capacity` positions, in the compute type, with
    learned prefixes in it. `Memory` has the shapes."""
    config = model.config
    memory = empty_memory(config, batch, capacity, model.compute.dtype)
    stages = {
        name: tuple(
            MODULES[stage.mixer].begin(
                memory.stages[name][visit.index], model.params[name][visit.layer]["attention"]
            )
            for visit in stage.visits(name)
        )
        for name, stage in config.program.self_decoder
    }
    return memory.replace(stages=stages).constrained()


@functools.partial(jax.jit, static_argnames="batch", keep_unused=True)
def _no_residual(model: PreparedModel, batch: int) -> Float[Array, "PB 1 D"]:
    config = model.config
    shape = (config.program.streams * batch, 1, config.d_model)
    return constrain(jnp.zeros(shape, model.compute.dtype), *RESIDUAL)


@functools.partial(jax.jit, static_argnames="batch", keep_unused=True)
def _no_logits(model: PreparedModel, batch: int) -> Float[Array, "B V"]:
    """Logits of NaN for the first token of a text, because nothing predicts it."""
    shape = (batch, model.config.vocab_size)
    return constrain(jnp.full(shape, jnp.nan, jnp.float32), "batch", "vocab")


# --- The two halves -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="block")
def _layer(params, x, context: Context, memory, *, block: Block):
    """Runs one layer, and returns x and the memory of the layer with the new positions. It is a jit
    of its own, so that unrolled layers are traced and lowered only once."""
    x, out = block.apply({"params": params}, x, context, memory)
    return x, None if memory is None else memory.commit(out.new, context.at)


def _block(model: PreparedModel, visit: Visit) -> Block:
    return Block(model.config, model.compute, visit.stage.mixer)


def self_decoder(
    model: PreparedModel, memory: Memory, tokens: Int[Array, "B N"], at: NewPositions
) -> tuple[Float[Array, "PB N D"], Memory, Context]:
    """Runs the stages before the cross-decoder, and adds the global K, V of the tokens to the
    memory. In prefill no other layers run for most tokens: see `prefill`.

    Returns the residual stream [PB, N, D], the memory with the new tokens, and the context of the
    cross-decoder.
    """
    config = model.config
    at_streams = at.for_streams(config.program.streams)
    context = Context.of(config, at_streams.positions(tokens.shape[1]), at=at_streams)
    x = model.apply("embed", tokens)
    stages = {name: [] for name, _ in config.program.self_decoder}
    for visit in config.program.visits():
        if visit.stage.reads_global:  # the cross-decoder begins here
            break
        params, part = model.params[visit.name][visit.layer], memory.stages[visit.name][visit.index]
        x, part = _layer(params, x, context, part, block=_block(model, visit))
        stages[visit.name].append(part)
    global_kv = memory.global_kv
    if global_kv is not None:
        new = model.apply("project_global_kv", x, context)
        global_kv = global_kv.commit(new, at)
        context = context.replace(global_kv=new, global_cache=global_kv)
    stages = {name: tuple(parts) for name, parts in stages.items()}
    return x, Memory(stages, global_kv, memory.lengths + at.count).constrained(), context


def cross_decoder(
    model: PreparedModel, x: Float[Array, "PB N D"], context: Context
) -> Float[Array, "B N V"]:
    """Runs the stages that read the global K, V (if any), the final norm and the head, at the
    positions of x."""
    config = model.config
    for visit in config.program.visits():
        if visit.stage.reads_global:
            params = model.params[visit.name][visit.layer]
            x, _ = _layer(params, x, context, None, block=_block(model, visit))
    return to_logits(model.apply("read_out", x), model.params["head"])


# --- Prefill --------------------------------------------------------------------------------------


def _last(x, last, count: Int[Array, " B"]):
    """x [PB, C, D] at the last new position of each row: [PB, 1, D]. A row without a new position
    gets its entry of `last`."""
    tiled = jnp.tile(count, x.shape[0] // count.shape[0])[:, None]
    picked = take(x, jnp.maximum(tiled - 1, 0), *RESIDUAL)
    return jnp.where(tiled[..., None] > 0, picked, last)


@functools.partial(jax.jit, donate_argnames=("memory", "last"), static_argnames="fits")
def prefill_chunk(model, memory, last, tokens, count, start, *, fits):
    """One chunk [B, C], in which row b has count[b] tokens.

    start: the first position of the chunk; None: each row starts at its own length.
    last [PB, 1, D]: the residual stream before the cross-decoder, at the last position of each row.
    """
    at = NewPositions(memory.lengths if start is None else start, count, fits)
    x, memory, _ = self_decoder(model, memory, tokens, at)
    return memory, constrain(_last(x, last, count), *RESIDUAL)


@jax.jit
def next_logits(model, memory, last):
    """Runs the cross-decoder for the last position of each row: logits [B, V] of the next token.

    The cache has the global K, V of this position already. A cross layer with one query reads only
    the cache, so the context has no `global_kv`.
    """
    at = NewPositions(memory.lengths - 1, jnp.ones_like(memory.lengths))
    context = Context.of(model.config, at.positions(1), at=at, global_cache=memory.global_kv)
    return cross_decoder(model, last, context)[:, 0]


def _chunks(prompts: Prompts, fresh: bool):
    """Splits prompts into chunks. fresh: the memory is new, so that every row starts at position 0.

    Returns the arguments of each chunk: tokens [B, C], how many of them exist in each row [B], and
    start (see `prefill_chunk`). Also returns whether all chunks, with their padding, are known to
    fit into the memory.
    """
    (B, N), C = prompts.tokens.shape, prompts.chunk
    width = -(-N // C) * C
    padded = np.zeros((B, width), np.int32)
    padded[:, :N] = prompts.tokens
    chunks = [
        (
            padded[:, first : first + C],
            np.clip(prompts.lengths - first, 0, C),
            np.int32(first) if fresh else None,
        )
        for first in range(0, width, C)
    ]
    return chunks, fresh and width <= prompts.capacity


def run_prefill(
    model: PreparedModel, prompts: Prompts, memory: Memory | None = None
) -> tuple[Memory, Float[Array, "B V"]]:
    """`prefill` without its checks."""
    B = len(prompts.lengths)
    chunks, fits = _chunks(prompts, memory is None)
    memory = new_memory(model, B, prompts.capacity) if memory is None else memory
    last = _no_residual(model, B)
    for tokens, count, start in chunks:
        memory, last = prefill_chunk(model, memory, last, tokens, count, start, fits=fits)
    return memory, next_logits(model, memory, last)


def prefill(
    model: PreparedModel,
    tokens: Int[AnyArray, "B N"],
    lengths: Int[AnyArray, " B"] | None = None,
    *,
    memory: Memory | None = None,
    new_tokens: int = 256,
    capacity: int | None = None,
    chunk: int | None = None,
) -> tuple[Memory, Float[Array, "B V"]]:
    """Appends prompts to a memory, which is donated (it cannot be used again), or to a new one.

    This is the early exit of YOCO: `self_decoder` stops before the cross-decoder, and `next_logits`
    runs the cross-decoder once, for the last position of each row.

    Row b is tokens[b, :lengths[b]], or tokens[b] without lengths. A new memory has room for
    `capacity` positions. The default is enough for the prompts and `new_tokens`. Prefill runs in
    chunks of `chunk` positions. See `default_sizes` for both defaults.

    Returns:
      The memory and the logits [B, V] (float32) of the token after each row.

    Raises:
      UserError: an empty row, a token outside the vocabulary, more positions than fit into the
        memory, a memory of another model.
    """
    sizes = {"new_tokens": new_tokens, "capacity": capacity, "chunk": chunk}
    prompts = request.check_prefill(model, tokens, lengths, memory, **sizes)
    return run_prefill(model, prompts, memory)


# --- Scores ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnames="memory", static_argnames="fits")
def score_chunk(model, memory, logits, tokens, count, start, *, fits):
    """One chunk as in `prefill_chunk`, but the cross-decoder runs at every position.

    logits [B, V]: they predict the first token of the chunk. Returns the memory, the logits of the
    token after the chunk, and for the tokens [B, C] their log-probabilities, and whether each is
    the likeliest one.
    """
    at = NewPositions(memory.lengths if start is None else start, count, fits)
    x, memory, context = self_decoder(model, memory, tokens, at)
    after = cross_decoder(model, x, context)
    before = jnp.concatenate([logits[:, None], after[:, :-1]], axis=1)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(before), tokens[..., None], axis=-1)[..., 0]
    likeliest = jnp.argmax(before, axis=-1) == tokens
    logits = constrain(_last(after, logits[:, None], count)[:, 0], "batch", "vocab")
    return memory, logits, *(constrain(x, "batch", "length") for x in (logprobs, likeliest))


class Scores(NamedTuple):
    """What `score` returns.

    memory: with the tokens.
    logits [B, V]: of the token after each row, float32.
    logprobs [B, N]: log p(tokens[b, i] | all before) in nats, float32. NaN after the end of a row,
      and for the first token if no logits were given, because nothing predicts it.
    likeliest [B, N]: whether the token is the one that greedy sampling would take; False where
      logprobs is NaN.
    """

    memory: Memory
    logits: Float[Array, "B V"]
    logprobs: Float[Array, "B N"]
    likeliest: Bool[Array, "B N"]


def score(
    model: PreparedModel,
    tokens: Int[AnyArray, "B N"],
    lengths: Int[AnyArray, " B"] | None = None,
    *,
    memory: Memory | None = None,
    logits: Float[AnyArray, "B V"] | None = None,
    new_tokens: int = 0,
    capacity: int | None = None,
    chunk: int | None = None,
) -> Scores:
    """The log-probabilities of given tokens. Every layer runs at every position. (`prefill` runs
    the cross-decoder only at the last one.)

    Arguments and errors are those of `prefill`. `logits` [B, V] predict the first token of each
    row; the call that made `memory` has returned them. So a context that several continuations
    share runs only once:

        memory, logits = prefill(model, context)
        found = score(model, endings, memory=fork(memory, rows), logits=logits[rows])
    """
    sizes = {"new_tokens": new_tokens, "capacity": capacity, "chunk": chunk}
    prompts = request.check_prefill(model, tokens, lengths, memory, **sizes, all_logits=True)
    B, V = len(prompts.lengths), model.config.vocab_size
    if logits is None:
        logits = _no_logits(model, B)
    request.check_shape("logits", logits, (B, V))
    chunks, fits = _chunks(prompts, memory is None)
    memory = new_memory(model, B, prompts.capacity) if memory is None else memory
    parts = []
    for chunk_tokens, count, start in chunks:
        memory, logits, logprobs, likeliest = score_chunk(
            model, memory, logits, chunk_tokens, count, start, fits=fits
        )
        exists = np.arange(chunk_tokens.shape[1]) < count[:, None]
        logprobs = jnp.where(exists, logprobs, jnp.nan)
        parts.append((logprobs, likeliest & ~jnp.isnan(logprobs)))
    N = prompts.tokens.shape[1]
    joined = (jnp.concatenate(columns, axis=1)[:, :N] for columns in zip(*parts, strict=True))
    return Scores(memory, logits, *joined)


# --- Forks and decode steps -----------------------------------------------------------------------


@jax.jit
def _fork(memory: Memory, rows: Int[Array, " rows"]) -> Memory:
    batch = memory.lengths.shape[0]

    def take(x):  # with parallel streams, the rows of x are stream-major
        streams = jnp.arange(x.shape[0] // batch)
        return x[(streams[:, None] * batch + rows[None]).reshape(-1)]

    return jax.tree.map(take, memory).constrained()


def fork(memory: Memory, rows: WholeNumbers) -> Memory:
    """Copies rows of a memory into a new one, so that a prompt can have several continuations:
    fork(memory, [0, 0, 0, 1]) makes three copies of row 0, and one of row 1.

    logits[rows] are the logits of the copies. Raises UserError for rows that do not exist.
    """
    request.check_alive(memory)
    batch = memory.lengths.shape[0]
    rows = np.asarray(rows)
    good = rows.ndim == 1 and rows.size and np.issubdtype(rows.dtype, np.integer)
    if not good or rows.min() < 0 or rows.max() >= batch:
        raise UserError(f"rows={rows.tolist()} must be row numbers from 0 to {batch - 1}.")
    return _fork(memory, rows)


def step(model: PreparedModel, memory: Memory, tokens: Int[Array, " B"], active: Bool[Array, " B"]):
    """`decode_step` without its check, as a part of a larger program. Returns the memory and the
    logits [B, V]."""
    at = NewPositions(memory.lengths, active.astype(jnp.int32))
    x, memory, context = self_decoder(model, memory, tokens[:, None], at)
    return memory, cross_decoder(model, x, context)[:, 0]


@functools.partial(jax.jit, donate_argnames="memory")
def decode_step(
    model: PreparedModel,
    memory: Memory,
    tokens: Int[Array, " B"],
    active: Bool[Array, " B"] | None = None,
) -> tuple[Memory, Float[Array, "B V"]]:
    """Appends one token to every row, or to every `active` row. The given memory is donated.

    Returns the memory, and the logits [B, V] of the next token in float32. They are NaN for a row
    that is not active, and for a row that was full already.
    """
    if active is None:
        active = jnp.ones(tokens.shape, bool)
    memory, logits = step(model, memory, tokens, active)
    room = memory.capacity
    good = active if room is None else active & (memory.lengths <= room)
    return memory, jnp.where(good[:, None], logits, jnp.nan)


def described(make: Callable, model: PreparedModel):
    """Shapes and types of make(model), and, on several devices, how its arrays are split."""
    shapes, mesh = jax.eval_shape(make, model), jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return shapes
    splits = jax.jit(make).lower(model).compile().output_shardings
    return jax.tree.map(
        lambda x, split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes, splits
    )


def programs(
    model: PreparedModel, batch: int, capacity: int, chunk: int
) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """Functions that lower the programs of `prefill` (a chunk, and the logits after the last one),
    `score` and `decode_step` for these sizes, with a new memory. They are used to count FLOPs, to
    read the HLO, or to compile in parallel. `jax.eval_shape` may have made the model."""

    def i32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    memory = described(functools.partial(new_memory, batch=batch, capacity=capacity), model)
    last = described(functools.partial(_no_residual, batch=batch), model)
    logits = described(functools.partial(_no_logits, batch=batch), model)
    new = (i32(batch, chunk), i32(batch), i32())
    return {
        "prefill_chunk": lambda: prefill_chunk.lower(model, memory, last, *new, fits=True),
        "next_logits": lambda: next_logits.lower(model, memory, last),
        "score_chunk": lambda: score_chunk.lower(model, memory, logits, *new, fits=True),
        "decode_step": lambda: decode_step.lower(model, memory, i32(batch)),
    }
