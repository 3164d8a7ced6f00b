"""The model does what its program says: visible tokens, loops, scans, packing, options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from yocou_jax.errors import UserError
from yocou_jax.model import LanguageModel, head_matrix, logits
from yocou_jax.model.layers import rope, rotation
from yocou_jax.program import Program

# --- Visible tokens -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def sensitivities(params, config, tokens, segment_ids):
    """[N, N]: the norm of d (a projection of hidden[i]) / d (embedding of token j).

    All tokens of the row must be different, so that a row of the table is a position.
    """
    direction = jax.random.normal(jax.random.key(7), (config.d_model,))

    def outputs(embedding):
        changed = params | {"embedding": embedding}
        ids = None if segment_ids is None else segment_ids[None]
        model = LanguageModel(config, tiny.compute())
        output = model.apply({"params": changed}, tokens[None], None, ids)
        return output.hidden[0] @ direction

    return jnp.abs(jax.jacrev(outputs)(params["embedding"])).sum(-1)[:, tokens]


def seen(config, segments) -> np.ndarray:
    """[N, N] booleans: output i depends on token j."""
    tokens = np.random.default_rng(3).permutation(config.vocab_size)[: len(segments)]
    ids = None if config.program.streams > 1 else np.asarray(segments, np.int32)
    return np.asarray(sensitivities(tiny.params(config), config, tokens, ids)) > 0


def expected_reach(program: Program, window: int, segments) -> np.ndarray:
    """Layer by layer, a position depends on all that the positions it attends to depend on."""
    n = len(segments)
    i, j = np.mgrid[:n, :n]
    causal = (j <= i) & (segments[:, None] == segments[None, :])
    known = np.eye(n, dtype=bool)
    written = None
    for stage in program.stages:
        for _ in range(stage.depth):
            if stage.mixer == "cross":
                written = known if written is None else written
                known = known | (causal @ written)
            else:
                sees = causal & (i - j < window) if stage.mixer == "window" else causal
                known = known | (sees @ known)
    return known


@pytest.mark.parametrize("name", tiny.quick(tiny.FOUR, "yoco_u", "parscale"))
def test_each_output_depends_on_exactly_the_tokens_it_may_see(name):
    config = tiny.model(name, window=3, num_kv_heads=1)
    one, packed = np.ones(21, int), np.repeat([1, 2, 3], [4, 10, 7])
    for segments in (one, packed) if name != "parscale" else (one,):  # a prefix has no segment
        expected = expected_reach(config.program, 3, segments)
        np.testing.assert_array_equal(seen(config, segments), expected)


@pytest.mark.parametrize(("window", "layers", "loops"), [(1, 1, 1), (4, 1, 1), (3, 2, 3)])
def test_a_window_has_w_keys_with_that_of_the_query(window, layers, loops):
    """One layer sees exactly W keys. Each further layer or loop adds W - 1."""
    config = tiny.model(f"window*{layers}@{loops}", window=window)
    counts = seen(config, np.ones(21)).sum(axis=1)
    reach = layers * loops * (window - 1) + 1
    np.testing.assert_array_equal(counts, np.minimum(np.arange(21) + 1, reach))
    packed = seen(config, np.repeat([1, 2, 3], [2, 12, 7])).sum(axis=1)
    within = np.concatenate([np.arange(n) + 1 for n in (2, 12, 7)])
    np.testing.assert_array_equal(packed, np.minimum(within, reach))


# --- Loops ----------------------------------------------------------------------------------------


def test_one_loop_is_yoco():
    looped, yoco = tiny.model("yoco_u", num_loops=1), tiny.model("yoco")
    tokens = tiny.tokens(2, 12)
    tiny.assert_close(tiny.params(looped), tiny.params(yoco), tolerance=0)
    tiny.assert_close(
        tiny.hidden(tiny.params(yoco), looped, tokens), tiny.hidden(tiny.params(yoco), yoco, tokens)
    )


@pytest.mark.parametrize(
    ("program", "unrolled", "extra"),
    [
        ("window*2@3 | cross*1@2", "window*6 | cross*2", {}),
        pytest.param("full*2@2 | full*1", "full*4 | full*1", {}, marks=pytest.mark.slow),
        pytest.param("window*2@3", "window*6", tiny.MOE, marks=pytest.mark.slow),
    ],
    ids=["window and cross", "full", "experts"],
)
def test_a_loop_is_a_deeper_model_with_copied_weights(program, unrolled, extra):
    """Values are equal, and the gradient of a shared weight is the sum over its copies."""
    looped, deep = tiny.model(program, **extra), tiny.model(unrolled, **extra)
    params, tokens = tiny.params(looped), tiny.tokens(2, 13)
    copied, loops = dict(params), {}
    for i, (few, many) in enumerate(zip(looped.program.stages, deep.program.stages, strict=True)):
        name = f"stage_{i}_{few.mixer}"
        loops[name] = many.layers // few.layers
        copied[name] = jax.tree.map(lambda x, n=loops[name]: jnp.concatenate([x] * n), params[name])
    loss, grads = tiny.value_and_grad(params, looped, tokens)
    deep_loss, deep_grads = tiny.value_and_grad(copied, deep, tokens)
    summed = dict(deep_grads)
    for name, n in loops.items():
        summed[name] = jax.tree.map(
            lambda g, n=n: g.reshape(n, -1, *g.shape[1:]).sum(0), deep_grads[name]
        )
    tiny.assert_close(loss, deep_loss)
    tiny.assert_close(grads, summed)


@pytest.mark.parametrize("architecture", ["yoco_u", "rins"])
def test_num_loops_of_a_call_overrides_the_config(architecture):
    three, five = (tiny.model(architecture, num_loops=n) for n in (3, 5))
    params, tokens = tiny.params(three), tiny.tokens(2, 12)
    called = tiny.hidden(params, three, tokens, num_loops=5)
    tiny.assert_close(called, tiny.hidden(params, five, tokens))
    assert np.abs(called - tiny.hidden(params, three, tokens)).max() > 1e-3


def test_num_loops_of_a_call_needs_a_looped_stage():
    config = tiny.model("yoco")
    with pytest.raises(UserError, match="no looped"):
        tiny.hidden(tiny.params(config), config, tiny.tokens(1, 4), num_loops=2)


# --- Scans and recomputation ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({"scan": False}, {}),
        pytest.param(
            {"scan": False}, tiny.MOE | {"architecture": "window*2@2"}, marks=pytest.mark.slow
        ),
        pytest.param({"scan": False, "remat": "full"}, {}, marks=pytest.mark.slow),
        ({"unroll": 6}, {}),
        ({"unroll": 6, "remat": "full"}, tiny.MOE | {"architecture": "window*2@2"}),
        ({"remat": "attention"}, {}),
        pytest.param({"remat": "full"}, {}, marks=pytest.mark.slow),
    ],
    ids=[
        *("python", "python experts", "python remat", "unrolled", "unrolled remat"),
        *("remat attention", "remat full"),
    ],
)
def test_loops_in_python_unrolled_and_remat_agree(fields, extra):
    config, compute = tiny.model(**extra), tiny.compute(**fields)
    params, tokens = tiny.params(config), tiny.tokens(2, 13)
    plain = tiny.value_and_grad(params, config, tokens)
    tiny.assert_close(tiny.value_and_grad(params, config, tokens, compute), plain)


def _gradient_jaxpr(config, length=12, **fields) -> str:
    tokens, compute = tiny.tokens(2, length), tiny.compute(**fields)
    traced = jax.make_jaxpr(lambda p: tiny.value_and_grad(p, config, tokens, compute))
    return str(traced(tiny.params(config)))


def test_remat_recomputes_products_and_attention_fewer_of_them():
    """The number of matrix products in the program shows what runs twice."""
    for scan in (True, False):
        products = {
            remat: _gradient_jaxpr(tiny.model(), remat=remat, scan=scan).count("dot_general")
            for remat in ("none", "attention", "full")
        }
        assert products["none"] < products["attention"] < products["full"]


def _lowered(fields=None, **compute):
    config, compute = tiny.model(**fields or {}), tiny.compute(attention="reference", **compute)
    return tiny.value_and_grad.lower(tiny.params(config), config, tiny.tokens(2, 13), compute)


def test_remat_of_unrolled_layers_is_still_there_after_compilation():
    """XLA could find that the same values are computed twice."""
    flops = {
        remat: _lowered(remat=remat, unroll=16).compile().cost_analysis()["flops"]
        for remat in ("none", "full")
    }
    assert flops["full"] > 1.2 * flops["none"]


def test_a_stage_with_few_runs_of_a_layer_is_unrolled():
    def loops(unroll, **fields):
        return _lowered(fields, unroll=unroll).as_text().count("stablehlo.while")

    assert loops(6) < loops(5) < loops(1)  # of window*2@3 | cross*2
    assert loops(6, num_loops=4) == loops(5)


@pytest.mark.slow
def test_the_program_to_compile_does_not_grow_with_loops_or_layers():
    def size(scan=True, **fields):
        return len(_gradient_jaxpr(tiny.model(**fields), scan=scan).splitlines())

    small = size(num_layers=4, num_loops=2)
    assert size(num_layers=4, num_loops=8) == small
    assert size(num_layers=16, num_loops=2) == small
    assert size(num_layers=4, num_loops=1) <= small
    # This measure does grow if the layers are unrolled.
    assert size(num_layers=4, num_loops=8, scan=False) > 1.5 * small


@pytest.mark.slow
def test_the_compiled_code_does_not_grow_with_loops():
    def instructions(num_loops):
        config = tiny.model(num_loops=num_loops)
        lowered = tiny.value_and_grad.lower(tiny.params(config), config, tiny.tokens(2, 13))
        return lowered.compile().as_text().count(" = ")

    assert instructions(8) <= 1.1 * instructions(2)


# --- Packing and positions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", tiny.quick(["yoco_u", "transformer", "upper_loop_unshared"], "yoco_u")
)
def test_packed_documents_do_not_change_each_other(architecture):
    config = tiny.model(architecture, cross_rope=architecture == "yoco_u", window=3)
    params, lengths = tiny.params(config), [5, 9, 6]
    tokens = tiny.tokens(1, 20)
    segments = jnp.asarray(np.repeat([1, 2, 3], lengths)[None], jnp.int32)
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None], jnp.int32)
    packed = tiny.hidden(params, config, tokens, positions, segments)
    alone, start = [], 0
    for n in lengths:
        # A document does not see the padding after it. With it, all three share one compilation.
        document = jnp.zeros((1, 20), jnp.int32).at[:, :n].set(tokens[:, start : start + n])
        alone.append(tiny.hidden(params, config, document)[:, :n])
        start += n
    tiny.assert_close(packed, jnp.concatenate(alone, axis=1))
    assert np.abs(packed - tiny.hidden(params, config, tokens)).max() > 1e-2


def test_rotary_positions_are_relative():
    config = tiny.model("transformer")
    params, tokens, at = tiny.params(config), tiny.tokens(2, 12), jnp.arange(12)[None]
    plain = tiny.hidden(params, config, tokens, at)
    tiny.assert_close(tiny.hidden(params, config, tokens, at + 100), plain, 1e-4)
    assert np.abs(tiny.hidden(params, config, tokens, at * 3) - plain).max() > 1e-2


def test_cross_layers_know_positions_only_with_cross_rope():
    """With a window of one key, only the cross layers could distinguish positions."""
    tokens, at = tiny.tokens(2, 12), jnp.arange(12)[None]
    for cross_rope in (False, True):
        config = tiny.model("yoco_u", window=1, cross_rope=cross_rope)
        params = tiny.params(config)
        change = tiny.hidden(params, config, tokens, at * 3) - tiny.hidden(
            params, config, tokens, at
        )
        assert (np.abs(change).max() > 1e-3) == cross_rope


# --- Heads, head, types ---------------------------------------------------------------------------


def _map_named(params, name, change):
    """Changes every array that has `name` in its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: change(x) if f"'{name}'" in jax.tree_util.keystr(path) else x, params
    )


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_shared_kv_heads_are_copies(num_kv_heads):
    shared, own = tiny.model(num_kv_heads=num_kv_heads), tiny.model(num_kv_heads=4)
    params, tokens = tiny.params(shared), tiny.tokens(2, 12)
    copied = _map_named(params, "key_value", lambda x: jnp.repeat(x, 4 // num_kv_heads, axis=-2))
    tiny.assert_close(tiny.hidden(copied, own, tokens), tiny.hidden(params, shared, tokens))


def test_tied_head_is_the_embedding():
    tied, untied = (tiny.model("window*1", tie_embeddings=tie) for tie in (True, False))
    params, tokens = tiny.params(tied), tiny.tokens(2, 12)
    assert "head" not in params
    with_head = params | {"head": params["embedding"].T}
    tiny.assert_close(
        *(logits(p, c, tokens, tiny.compute()) for p, c in ((params, tied), (with_head, untied)))
    )
    loss, grads = tiny.value_and_grad(params, tied, tokens)
    same_loss, separate = tiny.value_and_grad(with_head, untied, tokens)
    tiny.assert_close(loss, same_loss)
    tiny.assert_close(grads["embedding"], separate["embedding"] + separate["head"].T)


def test_with_qk_norm_the_size_of_queries_and_keys_has_no_effect():
    for qk_norm in (False, True):
        config = tiny.model(qk_norm=qk_norm, norm_eps=1e-9)
        params, tokens = tiny.params(config), tiny.tokens(2, 12)

        def larger(x):
            return x * 4 if x.ndim > 2 else x  # the projections, not the norms after them

        change = tiny.hidden(_map_named(params, "query", larger), config, tokens) - tiny.hidden(
            params, config, tokens
        )
        assert (np.abs(change).max() < 1e-4) == qk_norm


def test_logits_are_the_hidden_state_times_the_head():
    config = tiny.model()
    params, tokens = tiny.params(config), tiny.tokens(2, 12)
    expected = np.asarray(tiny.hidden(params, config, tokens)) @ np.asarray(
        head_matrix(params, config)
    )
    found = logits(params, config, tokens, tiny.compute())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", [{}, tiny.MOE], ids=["dense", "experts"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(extra):
    config, half = tiny.model(**extra), tiny.compute(dtype="bfloat16")
    params, tokens = tiny.params(config), tiny.tokens(2, 12)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    _, grads = jax.eval_shape(lambda p: tiny.value_and_grad(p, config, tokens, half), params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    got = tiny.hidden(params, config, tokens, compute=half)
    assert got.dtype == jnp.bfloat16
    if not extra:  # rounding may send a token to another expert
        error = np.abs(got.astype(jnp.float32) - tiny.hidden(params, config, tokens)).max()
        assert 0 < error < 0.1


# --- Parallel streams -----------------------------------------------------------------------------


def _parscale(streams=2, layers=2, **fields):
    return tiny.model(f"full*{layers}, streams={streams}", **fields)


def test_streams_without_a_prefix_are_the_transformer():
    config, plain = _parscale(prefix_length=0), tiny.model("full*2")
    params, tokens = tiny.params(config), tiny.tokens(2, 12)
    alone = {k: v for k, v in params.items() if k != "stream_gate"}
    tiny.assert_close(tiny.hidden(params, config, tokens), tiny.hidden(alone, plain, tokens))


def test_identical_prefixes_act_as_one_stream_with_that_prefix():
    """In a model of one layer, a prefix is the K and V of two tokens before the text."""
    config, plain = _parscale(layers=1, prefix_length=2), tiny.model("full*1")
    params, tokens = tiny.params(config), tiny.tokens(2, 10)
    before, start = tokens[:1, :2], jnp.array([[-2, -1]])
    layer = jax.tree.map(lambda x: x[0], params["stage_0_full"]["layers"])
    x = config.d_model**0.5 * params["embedding"][before]
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_eps)
    x = x * layer["attention_norm"]["scale"][None, None]
    weights = layer["attention"]["key_value"]
    k, v = (jnp.einsum("bnd,dkh->bnkh", x, weights[name]["kernel"]) for name in ("key", "value"))
    k = rope(k, rotation(start, config.head_dim, config.rope_theta))
    prefix = jnp.stack([k, v])  # [2, 1, 2, K, H]
    prefix = jnp.repeat(prefix, 2, axis=1)[None]
    old = params["stage_0_full"]["layers"]["attention"]["prefix"]
    assert old.shape == prefix.shape
    params = _map_named(params, "prefix", lambda _: prefix)
    alone = {k: v for k, v in params.items() if k != "stream_gate"}
    alone = jax.tree.map(lambda x: x, alone)
    del alone["stage_0_full"]["layers"]["attention"]["prefix"]
    longer = jnp.concatenate([jnp.repeat(before, 2, axis=0), tokens], axis=1)
    positions = jnp.arange(-2, 10)[None]
    expected = tiny.hidden(alone, plain, longer, positions)[:, 2:]
    tiny.assert_close(tiny.hidden(params, config, tokens), expected)


def test_no_stream_falls_below_the_floor_of_the_gate():
    """At the ends of the gate one stream has the full weight, except the floor of the others."""
    free, floored = (_parscale(gate_floor=f) for f in (0.0, 0.2))
    params, tokens = tiny.params(free), tiny.tokens(2, 10)
    one = _map_named(params, "stream_gate", lambda x: 1e6 * x)
    other = _map_named(params, "stream_gate", lambda x: -1e6 * x)
    a, b = tiny.hidden(one, free, tokens), tiny.hidden(other, free, tokens)
    assert np.abs(a - b).max() > 1e-2
    tiny.assert_close(tiny.hidden(one, floored, tokens), 0.8 * a + 0.1 * (a + b))


def test_every_stream_and_the_gate_learn():
    config = _parscale()
    _, grads = tiny.value_and_grad(tiny.params(config), config, tiny.tokens(2, 10))
    prefix = grads["stage_0_full"]["layers"]["attention"]["prefix"]
    # [layers, K or V, streams, prefix, K heads, H]: every entry of every stream
    assert (np.abs(np.asarray(prefix)).sum(axis=(-1, -2)) > 0).all()
    assert (np.abs(np.asarray(grads["stream_gate"]["kernel"])) > 0).all()


def test_streams_differ_from_the_start():
    """Otherwise the gate would mix copies, and the streams would always learn the same."""
    config = _parscale()
    prefix = tiny.params(config)["stage_0_full"]["layers"]["attention"]["prefix"]
    assert np.abs(np.asarray(prefix[:, :, 0] - prefix[:, :, 1])).min() > 0


def test_config_is_hashable_and_equal_by_value():
    """It is a static argument of jitted functions, and equal configs must share a compilation."""
    a, b = tiny.model(), tiny.model()
    assert a == b
    assert hash(a) == hash(b)
    assert a != dataclasses.replace(a, window=5)
