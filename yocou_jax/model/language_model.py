"""The language model: embedding, the stages of its program, final norm, output head.

    x = sqrt(D) E[tokens]
    for each stage:      repeat num_loops times, the same parameters each time:
                             for each layer:   x = x + Attention(RMSNorm(x))
                                               x = x + FeedForward(RMSNorm(x))
    (before the first cross stage:  K, V = RMSNorm(x) W_k, RMSNorm(x) W_v)
    logits = RMSNorm(x) W_out

The output of one loop is the input of the next one; nothing else happens between loops. Layers and
loops are `nn.scan`s, so the compile time of a deep model does not grow with them (compute.unroll
says what is deep). Loops add no parameters.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from yocou_jax.config import ModelConfig
from yocou_jax.model import context_parallel
from yocou_jax.model.attention import MODULES, Context, GlobalKeyValue
from yocou_jax.model.compute import Compute
from yocou_jax.model.context_parallel import SharedKeyValue
from yocou_jax.model.embedding import embed
from yocou_jax.model.layers import Linear, RMSNorm, SwiGLU, exact, fan_in_init
from yocou_jax.model.memory import Cache, KeyValue, Memory
from yocou_jax.model.moe import MixtureOfExperts, RouterStats
from yocou_jax.program import Stage
from yocou_jax.sharding import constrain, length_ways
from yocou_jax.typing import AnyArray, Array, Float, Int, PyTree

# What a backward pass keeps of each layer. It computes the rest again. "attention" keeps the output
# and the log-sum-exp, which the kernels name, so that the quadratic part does not run again.
REMAT = {
    "attention": jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class BlockOutput:
    """What a layer returns in addition to x.

    router: routing statistics (None without experts). new: in inference, what the layer's memory
    has to `commit` (None for a layer without a memory).
    """

    router: RouterStats | None
    new: PyTree


class Block(nn.Module):
    """One pre-norm layer: x + Mixer(RMSNorm(x)), then x + FeedForward(RMSNorm(x))."""

    config: ModelConfig
    compute: Compute
    mixer: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], context: Context, memory: PyTree = None
    ) -> tuple[Float[Array, "B N D"], BlockOutput]:
        c, dtype = self.config, self.compute.dtype
        h = RMSNorm(c.norm_eps, name="attention_norm")(x)
        y, new = MODULES[self.mixer](c, self.compute, name="attention")(h, context, memory)
        x = x + y
        h = RMSNorm(c.norm_eps, name="feed_forward_norm")(x)
        if c.num_experts:
            y, stats = MixtureOfExperts(c, dtype, name="feed_forward")(h)
        else:
            y = SwiGLU(c.d_ff, dtype, c.residual_scale, name="feed_forward")(h)
            stats = None
        return constrain(x + y, "batch", "length", "activation"), BlockOutput(stats, new)


class StageStack(nn.Module):
    """The layers of one stage, which run once or in a loop.

    Parameters are stacked over layers, [layers, ...], and all loops share them. Returns x, and the
    routing statistics stacked over all runs of a layer (None without experts). Of all loops, only
    the last `backprop_loops` have a gradient (None: all).
    """

    config: ModelConfig
    compute: Compute
    stage: Stage

    def setup(self):
        unrolled = self._unrolls(self.stage.num_loops)
        self.layers = nn.scan(
            self._block(in_loop=not unrolled and self.stage.layers > 1),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.stage.layers,
            unroll=self.stage.layers if unrolled else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
            # This check traces the layer once more. Initialization needs it: it moves shared
            # parameters out of a loop, and without it other random numbers would be drawn.
            check_constancy_invariants=self.is_initializing(),
        )(self.config, self.compute, self.stage.mixer)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Context,
        num_loops: int,
        backprop_loops: int | None = None,
    ) -> tuple[Float[Array, "B N D"], RouterStats | None]:
        constant = num_loops - (backprop_loops or num_loops)  # loops without a gradient
        if self.stage.loops is None or constant <= 0:
            return self._loops(x, context, num_loops)
        y, early = jax.lax.stop_gradient(self._loops(x, context, constant))
        # Adds 0. A layer adds to the residual stream, and what these loops add is a constant for
        # the gradient. So the gradient of x is that of y: the embedding must get one.
        y, late = self._loops(y + (x - jax.lax.stop_gradient(x)), context, backprop_loops)
        return y, jax.tree.map(lambda *s: jnp.concatenate(s), early, late)

    def _loops(self, x, context, num_loops):
        if not self.compute.scan and not self.is_initializing():
            return self._in_python(x, context, num_loops)
        if self.stage.loops is None:
            x, out = self.layers(x, context)
            return x, out.router
        loop = nn.scan(
            lambda stack, x, context: stack.layers(x, context),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=nn.broadcast,
            length=num_loops,
            unroll=num_loops if self._unrolls(num_loops) else 1,
            check_constancy_invariants=self.is_initializing(),
        )
        x, out = loop(self, x, context)
        return x, jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), out.router)

    def _block(self, in_loop: bool) -> type[Block]:
        """Only in the body of a loop, recomputation needs no barrier against the elimination of
        common subexpressions."""
        if self.compute.remat == "none":
            return Block
        return nn.remat(Block, policy=REMAT[self.compute.remat], prevent_cse=not in_loop)

    def _unrolls(self, num_loops: int) -> bool:
        return self.stage.layers * num_loops <= self.compute.unroll

    def _in_python(self, x, context, num_loops):
        """The same in plain Python, to debug: a print or breakpoint in Block sees each layer."""
        stacked = self.layers.variables["params"]
        block = self._block(in_loop=False)
        block = block(self.config, self.compute, self.stage.mixer, parent=None)
        stats = []
        for visit in dataclasses.replace(self.stage, loops=num_loops).visits(self.name):
            params = jax.tree.map(operator.itemgetter(visit.layer), stacked)
            x, out = block.apply({"params": params}, x, context)
            stats.append(out.router)
        return x, jax.tree.map(lambda *s: jnp.stack(s), *stats)


@flax.struct.dataclass
class ModelOutput:
    """hidden [B, N, D]: the output of the final norm, which the head maps to logits.

    router: routing statistics, stacked over all runs of a layer (None without experts).
    """

    hidden: Float[Array, "B N D"]
    router: RouterStats | None


class LanguageModel(nn.Module):
    """A program with an embedding and a head. `accounting.parameters` counts its parameters."""

    config: ModelConfig
    compute: Compute

    def setup(self):
        c, dtype = self.config, self.compute.dtype
        init = exact(fan_in_init(c.d_model), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.d_model), jnp.float32)
        self.stages = {
            name: StageStack(c, self.compute, stage, name=name)
            for name, stage in c.program.named_stages
        }
        if c.program.has_cross:
            self.global_kv = GlobalKeyValue(c, dtype)
        if c.program.streams > 1:
            axes = ("streams", "embed", None)
            self.stream_gate = Linear((c.program.streams,), axes, jnp.float32, exact=True)
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            init = nn.with_logical_partitioning(fan_in_init(c.d_model), ("embed", "vocab"))
            self.head = self.param("head", init, (c.d_model, c.vocab_size), jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B N"],
        positions: Int[Array, "#B N"] | None = None,
        segment_ids: Int[Array, "B N"] | None = None,
        *,
        num_loops: int | None = None,
        backprop_loops: int | None = None,
    ) -> ModelOutput:
        """num_loops: how often every looped stage runs. None: as the config says. backprop_loops:
        of these, only the last ones have a gradient (None: all). It does not change the values."""
        program = self.config.program
        program = program if num_loops is None else program.with_loops(num_loops)
        x, context = self._begin(tokens, positions, segment_ids)
        x, context, router = self._run(program.named_stages, x, context, backprop_loops)
        return self._output(x, context, router)

    def after_loops(
        self,
        tokens: Int[Array, "B N"],
        positions: Int[Array, "#B N"] | None = None,
        segment_ids: Int[Array, "B N"] | None = None,
        *,
        counts: Sequence[int],
    ) -> list[ModelOutput]:
        """The output of the model with each of these numbers of loops, which must increase.

        The loops are shared: the looped stage runs as often as the last count says, and only the
        stages after it run once for each count. The program has exactly one looped stage.
        """
        stages = self.config.program.named_stages
        (at,) = (i for i, (_, stage) in enumerate(stages) if stage.loops is not None)
        x, context = self._begin(tokens, positions, segment_ids)
        x, context, router = self._run(stages[:at], x, context)
        outputs, (name, looped) = [], stages[at]
        for done, count in itertools.pairwise((0, *counts)):
            more = dataclasses.replace(looped, loops=count - done)
            x, context, stats = self._run([(name, more)], x, context)
            router += stats
            y, last, late = self._run(stages[at + 1 :], x, context)
            outputs.append(self._output(y, last, router + late))
        return outputs

    def _begin(self, tokens, positions, segment_ids):
        """What the first stage gets."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        context = Context.of(self.config, positions, segment_ids=segment_ids)
        return self.embed(tokens), context

    def _run(self, stages: list[tuple[str, Stage]], x, context: Context, backprop_loops=None):
        """Runs some stages. Before the first cross stage it puts the global K, V into the context.
        Returns x, the context, and the routing statistics of each stage."""
        router = []
        for name, stage in stages:
            if stage.reads_global and context.global_kv is None:
                x, context = self._begin_cross(x, context)
            x, stats = self.stages[name](x, context, stage.num_loops, backprop_loops)
            router.append(stats)
        return x, context, router

    def _begin_cross(self, x, context: Context):
        """Puts the global K, V into the context. If the mesh splits the positions, this also deals
        the rows again (`context_parallel.deal`)."""
        kv = context_parallel.own_heads(self.project_global_kv(x, context), self.config.num_heads)
        if length_ways(x.shape[1]) > 1:
            kv = context_parallel.share(kv, self.config.num_heads, self.compute.dtype)
            x, positions = context_parallel.deal(x), context_parallel.deal(context.positions)
            segment_ids = context.segment_ids  # whole, and in the order of the text
            context = Context.of(self.config, positions, segment_ids=segment_ids)
        return x, context.replace(global_kv=kv)

    def _output(self, x, context: Context, router: list[RouterStats | None]) -> ModelOutput:
        if isinstance(context.global_kv, SharedKeyValue):
            x = context_parallel.deal(x)  # back into the order of the positions
        joined = None
        if self.config.num_experts:
            joined = jax.tree.map(lambda *s: jnp.concatenate(s), *router)
        return ModelOutput(self.read_out(x), joined)

    # The parts that are not stages. Inference calls them too, and runs the stages layer by layer.

    def embed(self, tokens: Int[Array, "B N"]) -> Float[Array, "PB N D"]:
        """The residual stream before the first layer, once per parallel stream (stream-major)."""
        streams = self.config.program.streams
        x = embed(self.embedding, tokens, self.compute.dtype)
        x = constrain(x, "batch", "length", "activation")
        return jnp.tile(x, (streams, 1, 1)) if streams > 1 else x

    def project_global_kv(self, x: Float[Array, "B N D"], context: Context) -> KeyValue:
        """The one global K, V [B, N, K, H] of x, the output of the self-decoder."""
        return self.global_kv(x, context)

    def read_out(self, x: Float[Array, "PB N D"]) -> Float[Array, "B N D"]:
        """The final norm and the mix of parallel streams. The head maps the result to logits."""
        x = self.final_norm(x)
        return self._mix_streams(x) if self.config.program.streams > 1 else x

    def _mix_streams(self, x: Float[Array, "PB N D"]) -> Float[Array, "B N D"]:
        """sum_p ((1 - eps) w_p + eps / P) x_p, w = softmax(linear map of all x_p).

        ParScale (arXiv 2505.10475) calls the map an MLP. In its public code it is Linear(P D to D),
        SiLU, Linear(D to P), both with biases. Here it is one matrix [P, D, P] without bias.
        """
        streams, floor = self.config.program.streams, self.config.gate_floor
        x = x.reshape(streams, -1, *x.shape[1:])
        gate = self.stream_gate(jnp.moveaxis(x, 0, 2).astype(jnp.float32))
        weights = (1 - floor) * jax.nn.softmax(gate, axis=-1) + floor / streams
        return jnp.einsum("pbnd,bnp->bnd", x, weights.astype(x.dtype))


def abstract_params(config: ModelConfig) -> PyTree:
    """Shapes of all parameters, boxed with their logical axes. Allocates nothing. Those of a stage
    are stacked over its layers: [layers, ...]."""
    # Loops add no parameters, but they double the time of a trace.
    program = config.program
    stages = tuple(dataclasses.replace(stage, loops=None) for stage in program.stages)
    once = str(dataclasses.replace(program, stages=stages))
    return _traced_params(dataclasses.replace(config, architecture=once, num_loops=None))


@functools.cache  # a trace takes a tenth of a second, and a start needs it several times
def _traced_params(config: ModelConfig) -> PyTree:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    # Parameters do not depend on how the model runs.
    compute = Compute(jnp.dtype("float32"), "auto", "none", unroll=0, scan=True)
    model = LanguageModel(config, compute)
    return jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens), tokens)["params"]


def empty_memory(config: ModelConfig, batch: int, capacity: int, dtype=jnp.bfloat16) -> Memory:
    """An empty memory for `batch` sequences of at most `capacity` positions, without ParScale's
    learned prefix.

    Under `jax.eval_shape` it allocates nothing, and describes shapes and types.
    """
    program, rows = config.program, batch * config.program.streams
    stages = {
        name: tuple(
            MODULES[stage.mixer].empty(config, rows, capacity, dtype) for _ in stage.visits(name)
        )
        for name, stage in program.self_decoder
    }
    global_kv = Cache.zeros(config, batch, capacity, dtype) if program.has_cross else None
    return Memory(stages, global_kv, jnp.zeros((batch,), jnp.int32))


def head_matrix(params: PyTree, config: ModelConfig) -> Float[AnyArray, "D V"]:
    """The output head W_out. With tied embeddings it is the transposed embedding table."""
    return params["embedding"].T if config.tie_embeddings else params["head"]


def logits(
    params: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "B N"],
    compute: Compute,
    **kwargs,
) -> Float[Array, "B N V"]:
    """All logits at once in float32, for tests, analysis and short texts. Training computes logits
    in chunks."""
    model = LanguageModel(config, compute)
    hidden = model.apply({"params": params}, tokens, **kwargs).hidden
    return to_logits(hidden, head_matrix(params, config))


def to_logits(hidden: Float[Array, "... D"], head: Float[AnyArray, "D V"]) -> Float[Array, "... V"]:
    """Logits in float32. The factors of the product have the type of `hidden`."""
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
