"""A new kind of layer is one entry of facts and one module. The rest is derived from them.

The mixer of this file is the causal mean of the last four values. It is added with the recipe of
CONTRIBUTING.md. Only the two tables know it.
"""

import re
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests import tiny
from yocou_jax import accounting, inference
from yocou_jax.config import MeshConfig
from yocou_jax.mixers import MIXERS, Mixer
from yocou_jax.model import empty_memory, logits
from yocou_jax.model.attention import MODULES, MixerModule
from yocou_jax.model.layers import Linear
from yocou_jax.sharding import constrain, make_mesh, tree_shardings
from yocou_jax.training.banner import attention_choices
from yocou_jax.training.step import set_up

SPAN = 4
ROOT = Path(__file__).parent.parent.parent
PROGRAMS = ["mean*2@2 | cross*1", "window*1 | mean*1 | full*1@2", "mean*1@3"]


class MeanFacts(Mixer):
    def weights(self, config):
        return 2 * config.d_model * config.num_kv_heads * config.head_dim

    def sequence_flops(self, config, length):
        return 0  # it has sums, but no products

    def step_flops(self, config, context):
        return 0

    def memory_size(self, config, length):
        return (SPAN - 1) * config.num_kv_heads * config.head_dim

    step_reads = memory_size


@flax.struct.dataclass
class LastValues:
    """The newest values [B, SPAN - 1, K, H], with zeros before the first position."""

    values: jax.Array
    capacity = None

    def joined(self, new):
        return jnp.concatenate([self.values, new.astype(self.values.dtype)], axis=1)

    def commit(self, new, at):
        def newest(row, count):
            return jax.lax.dynamic_slice_in_dim(row, count, SPAN - 1)

        return LastValues(jax.vmap(newest)(self.joined(new), at.count))

    def constrained(self):
        return LastValues(constrain(self.values, "batch", "length", "kv_heads", "head_dim"))


class CausalMean(MixerModule):
    """y_i = W_o mean(W_v x_j, i-3 <= j <= i, j in the document of i)."""

    @staticmethod
    def empty(config, rows, capacity, dtype):
        shape = (rows, SPAN - 1, config.num_kv_heads, config.head_dim)
        return LastValues(jnp.zeros(shape, dtype))

    @flax.linen.compact
    def __call__(self, x, context, memory=None):
        c, (B, N, _) = self.config, x.shape
        axes = ("embed", "kv_heads", "head_dim")
        v = Linear((c.num_kv_heads, c.head_dim), axes, self.dtype, name="value")(x)
        joined = (memory or self.empty(c, B, 0, self.dtype)).joined(v)
        ids = jnp.ones((B, N), jnp.int32) if context.segment_ids is None else context.segment_ids
        joined_ids = jnp.pad(ids, ((0, 0), (SPAN - 1, 0)), constant_values=1)
        same = [(joined_ids[:, i : i + N] == ids)[..., None, None] for i in range(SPAN)]
        # In each document, positions begin at 0: the first ones see fewer than SPAN values.
        seen = jnp.minimum(context.positions + 1, SPAN)[..., None, None]
        mean = sum(joined[:, i : i + N] * same[i] for i in range(SPAN)) / seen
        y = Linear((c.d_model,), (*axes[1:], "embed"), self.dtype, c.residual_scale, name="output")
        return y(mean.astype(self.dtype)), None if memory is None else v


@pytest.fixture(scope="module", autouse=True)
def mean_mixer():
    """Adds the two entries, and removes them after the test."""
    MIXERS["mean"], MODULES["mean"] = MeanFacts(), CausalMean
    yield
    del MIXERS["mean"], MODULES["mean"]


def test_the_two_tables_have_the_same_keys():
    assert MIXERS.keys() == MODULES.keys()


@pytest.mark.parametrize("program", PROGRAMS)
def test_parameters_and_bytes_of_the_new_mixer(program):
    config = tiny.model(program, num_loops=None)
    params = tiny.params(config)
    sizes = accounting.parameters(config)
    assert sizes.total == sum(x.size for x in jax.tree.leaves(params))
    described = jax.eval_shape(lambda: empty_memory(config, 3, 50, jnp.float32))
    assert described.nbytes == 3 * accounting.kv_bytes(config, 50, 4)
    assert accounting.report(config, (8, 64))["program"] == program
    per_token = 2 * (sizes.total - sizes.parts["embedding"])  # a loop has a multiple of it
    assert accounting.decode_flops_per_token(config, 8) > 0.9 * per_token


def test_flops_of_the_new_mixer_are_those_of_its_matrices():
    one, two = (tiny.model(f"mean*{layers}") for layers in (1, 2))
    c = one
    layer = 2 * c.d_model * c.num_kv_heads * c.head_dim + 3 * c.d_model * c.d_ff
    more = [accounting.train_flops_per_token(c, 64) for c in (one, two)]
    assert more[1] - more[0] == 6 * layer


@pytest.mark.parametrize("program", PROGRAMS)
def test_prefill_and_decode_of_the_new_mixer_are_the_forward_pass(program):
    config = tiny.model(program, num_loops=None)
    params, tokens, lengths = tiny.params(config), tiny.tokens(3, 14), np.array([3, 7, 11])
    want, rows = np.asarray(logits(params, config, tokens, tiny.compute())), np.arange(3)
    model = inference.prepare(params, config, tiny.compute())
    memory, found = inference.prefill(model, tokens[:, :11], lengths, capacity=14, chunk=4)
    tiny.assert_close(found, want[rows, lengths - 1])
    for step in range(3):
        memory, found = inference.decode_step(
            model, memory, np.asarray(tokens)[rows, lengths + step]
        )
        tiny.assert_close(found, want[rows, lengths + step])
    forked = inference.fork(memory, [2, 0])
    assert forked.nbytes == memory.nbytes * 2 // 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_packed_documents_do_not_see_each_other(program):
    """Two documents in one row have the logits that each of them has alone."""
    config = tiny.model(program, num_loops=None)
    params, tokens, first = tiny.params(config), tiny.tokens(2, 12), 5
    documents = [tokens[:, :first], tokens[:, first:]]
    lengths = [first, 12 - first]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    segment_ids = jnp.tile(jnp.repeat(jnp.array([1, 2]), jnp.array(lengths))[None], (2, 1))
    how = tiny.compute()
    packed = logits(params, config, tokens, how, positions=positions, segment_ids=segment_ids)
    alone = [logits(params, config, document, how) for document in documents]
    tiny.assert_close(packed, np.concatenate(alone, axis=1))


@pytest.mark.slow
def test_the_new_mixer_trains_and_is_sharded():
    """A mesh of all three axes gives the numbers of one device. The mixer needs no kernel."""
    config = tiny.config(PROGRAMS[0], num_loops=None, optimizer={"learning_rate": 1e-2})
    assert list(attention_choices(config)) == ["cross attention"]
    assert list(attention_choices(tiny.config("window*1 | full*1 | cross*1"))) == [
        "window attention",
        "full and cross attention",
    ]
    params, losses = tiny.params(config.model), {}
    for devices in (1, 8):
        mesh = {"data": 2, "fsdp": 2, "tensor": 2} if devices == 8 else {"data": 1}
        setup = set_up(tiny.config(PROGRAMS[0], num_loops=None, mesh=mesh), jax.devices()[:devices])
        with jax.set_mesh(setup.mesh):
            state = tiny.fresh_state(setup, params)
            losses[devices] = []
            for _ in range(4):
                state, out = setup.step(state, tiny.batch())
                losses[devices].append(float(out["loss"]))
    np.testing.assert_allclose(losses[8], losses[1], rtol=1e-4)
    assert losses[1][-1] < losses[1][0]
    boxed = inference.weights.abstract_params(config.model)
    split = tree_shardings(boxed, make_mesh(MeshConfig(2, 2, 2)))
    value = split["stage_0_mean"]["layers"]["attention"]["value"]["kernel"].spec
    wanted = PartitionSpec(None, ("fsdp", "context"), ("tensor",), None)
    assert value == wanted


def test_no_other_code_compares_the_name_of_a_mixer():
    tables = {"mixers.py", "attention.py"}
    names = re.compile(r"""(==|!=|\bin\b|\bnot in\b)\s*[({\[]?["'](window|full|cross)["']""")
    for folder in ("yocou_jax", "pallas_kernels", "benchmarks", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            found = names.search(path.read_text())
            assert path.name in tables or not found, f"{path}: {found[0]}"
