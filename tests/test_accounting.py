"""Compares parameters, FLOPs and KV bytes with real arrays, the count of XLA and brute force."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import yocou_1b
from tests import tiny
from yocou_jax import accounting
from yocou_jax.config import Config
from yocou_jax.mixers import MIXERS
from yocou_jax.model import abstract_params, empty_memory, logits
from yocou_jax.program import ARCHITECTURES

ROOT = Path(__file__).parent.parent
LENGTHS = {k: k * 1024 for k in (8, 16, 32, 64, 128, 256)}

# Table 10 of arXiv 2604.01220: KV cache, MiB per sequence, at 8K to 256K.
TABLE_10 = {
    "transformer": (320, 640, 1280, 2560, 5120, 10240),
    "rins": (640, 1280, 2560, 5120, 10240, 20480),
    "yoco": (26, 42, 74, 138, 266, 522),
    "yoco_u": (46, 62, 94, 158, 286, 542),
}


def paper(architecture):
    return Config.from_dict(yocou_1b.get_config(architecture)).model


# --- KV cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TABLE_10)
def test_the_kv_cache_is_table_10_exactly(architecture):
    config = accounting.sibling(paper("yoco_u"), architecture)
    found = [accounting.kv_bytes(config, n) / accounting.MIB for n in LENGTHS.values()]
    assert tuple(found) == TABLE_10[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kv_cache_is_the_bytes_of_the_arrays(architecture):
    for config in (paper(architecture), tiny.model(architecture, num_kv_heads=1)):
        for length in (8192, 262144):
            described = jax.eval_shape(lambda n=length, c=config: empty_memory(c, 1, n))
            assert described.nbytes == accounting.kv_bytes(config, length)
    described = jax.eval_shape(lambda: empty_memory(config, 3, 64, jnp.float32))
    assert described.nbytes == 3 * accounting.kv_bytes(config, 64, bytes_per_value=4)


# --- Parameters -----------------------------------------------------------------------------------

OPTIONS = {
    "dense": {},
    "experts": tiny.MOE | {"num_shared_experts": 2},
    "experts alone": tiny.MOE | {"num_shared_experts": 0},
    "tied, qk_norm": {"tie_embeddings": True, "qk_norm": True},
    "cross_rope, MQA": {"cross_rope": True, "num_kv_heads": 1},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parameters_are_those_of_the_tree(architecture, options):
    config = tiny.model(architecture, **options)
    tree = abstract_params(config)

    def size(part):
        return sum(math.prod(x.shape) for x in jax.tree.leaves(part))

    found = accounting.parameters(config)
    assert found.total == size(tree)
    assert found.parts["embedding"] == size(tree["embedding"])
    assert found.parts.get("global_kv", 0) == size(tree.get("global_kv", ()))
    assert found.non_embedding == size(tree) - size(tree["embedding"]) - size(tree.get("head", ()))
    for name in tree:
        if name.startswith("stage_"):
            layers = tree[name]["layers"]
            assert found.parts[f"{name}.feed_forward"] == size(layers["feed_forward"])
            norms = size(layers["attention_norm"]) + size(layers["feed_forward_norm"])
            attention = found.parts[f"{name}.attention"] + found.parts[f"{name}.norms"]
            assert attention == size(layers["attention"]) + norms


def test_active_parameters_count_only_the_chosen_experts():
    config = tiny.model("yoco_u", **tiny.MOE)
    found = accounting.parameters(config)
    idle_experts = config.num_experts - config.experts_per_token
    expert = 3 * config.d_model * config.expert_width
    assert found.total - found.active == 4 * idle_experts * expert
    dense = accounting.parameters(tiny.model())
    assert dense.active == dense.total


@pytest.mark.parametrize("architecture", [n for n, t in ARCHITECTURES.items() if "@" in t])
def test_loops_add_no_parameters(architecture):
    counts = [accounting.parameters(tiny.model(architecture, num_loops=n)) for n in (1, 3, 8)]
    assert counts[0] == counts[1] == counts[2]
    trees = [
        jax.tree.map(lambda x: x.shape, abstract_params(tiny.model(architecture, num_loops=n)))
        for n in (1, 8)
    ]
    assert trees[0] == trees[1]


def test_the_paper_sizes():
    """1.3B without embeddings in both layouts; about 10.5B, 1.5 to 1.7B active, with experts."""
    for name in ("yocou_1b", "yocou_1b_deep"):
        module = __import__(f"configs.{name}", fromlist=["get_config"])
        found = accounting.parameters(Config.from_dict(module.get_config()).model)
        assert found.non_embedding == pytest.approx(1.3e9, rel=0.04)
    from configs import yocou_10b_moe

    found = accounting.parameters(Config.from_dict(yocou_10b_moe.get_config()).model)
    assert found.non_embedding == pytest.approx(10.5e9, rel=0.02)
    embeddings = found.total - found.non_embedding
    assert 1.45e9 < found.active - embeddings < 1.75e9


# --- FLOPs ----------------------------------------------------------------------------------------

# Much wider than the text is long, so that attention, norms and softmax are a small share.
WIDE = {
    "d_model": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "d_ff": 640,
    "vocab_size": 512,
    "num_layers": 2,
    "window": 8,
    "prefix_length": 2,
}


@pytest.mark.parametrize("architecture", ["yoco_u", "universal_transformer", "upper_loop"])
def test_forward_flops_are_those_that_xla_counts(architecture):
    """XLA counts the body of a scan once, so the model is unrolled. XLA does not know masks, so
    the share of attention is small."""
    config, n = tiny.model(architecture, **WIDE), 32
    dense = tiny.compute(scan=False, attention="reference")
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), _unboxed(abstract_params(config))
    )
    tokens = jax.ShapeDtypeStruct((1, n), jnp.int32)
    compiled = jax.jit(lambda p, t: logits(p, config, t, dense)).lower(shapes, tokens).compile()
    counted = compiled.cost_analysis()["flops"]
    ours = accounting.train_flops_per_token(config, n) * n / 3
    attention = 4 * config.num_heads * config.head_dim * n * n * config.program.depth
    assert attention < 0.1 * ours
    assert counted == pytest.approx(ours, rel=0.03)


def _unboxed(tree):
    import flax.linen as nn

    return nn.unbox(tree)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("mixer", ["window", "full", "cross"])
def test_attention_flops_are_the_unmasked_pairs(mixer, length):
    config = tiny.model("yoco_u", window=4)
    i, j = np.mgrid[:length, :length]
    mask = (j <= i) & ((i - j < 4) | (mixer != "window"))
    assert MIXERS[mixer].pairs(config, length) == mask.sum()
    assert MIXERS[mixer].keys(config, length) == mask[-1].sum()


def test_a_prefix_is_seen_by_every_query():
    config = tiny.model("parscale")  # a prefix of 3
    assert MIXERS["full"].pairs(config, 5) == 15 + 5 * 3
    assert MIXERS["full"].keys(config, 5) == 5 + 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_share_of_the_flops(architecture):
    """Without 4 H per pair, query head and layer, the FLOPs do not depend on the length."""
    config = tiny.model(architecture)
    n, stages, streams = 24, config.program.stages, config.program.streams
    pairs = sum(s.depth * MIXERS[s.mixer].pairs(config, n) for s in stages)
    attention = 3 * 4 * 4 * 8 * pairs * streams / n
    matmul = accounting.train_flops_per_token(config, n) - attention
    blind = sum(s.depth * MIXERS[s.mixer].pairs(config, 2 * n) for s in stages)
    longer = 3 * 4 * 4 * 8 * blind * streams / (2 * n)
    assert accounting.train_flops_per_token(config, 2 * n) - longer == pytest.approx(matmul)


def test_training_flops_by_hand():
    """One window layer: 6 FLOPs per matrix entry, 12 H per visible pair and head."""
    config = tiny.model("window*1")
    d, f, v, q, k, h, w, n = 16, 24, 32, 4, 2, 8, 4, 10
    matrices = d * h * (2 * q + 2 * k) + 3 * d * f + d * v
    pairs = 1 + 2 + 3 + 4 * (n - 3)
    assert w == config.window
    expected = 6 * matrices + 12 * h * q * pairs / n
    assert accounting.train_flops_per_token(config, n) == pytest.approx(expected)


def test_training_flops_of_loops():
    """From those of a model with one and with three loops, without a loss after every loop."""
    n = 16

    def flops(architecture="window*2@3 | cross*2", num_loops=None, **optimizer):
        config = tiny.config(architecture, num_loops=num_loops, optimizer=optimizer)
        return accounting.run_flops_per_token(config)

    one, three = flops(num_loops=1), flops(num_loops=3)
    loop = (three - one) / 2
    assert three == accounting.train_flops_per_token(tiny.model(num_loops=3), n)
    assert flops(num_loops="1,3") == pytest.approx((one + three) / 2)
    # Of three loops, two have no backward pass, which is 2/3 of their cost.
    assert flops(backprop_loops=1) == pytest.approx(three - 2 * loop * 2 / 3)
    assert flops(backprop_loops=3) == three
    # The global K, V, the cross stage and the head run twice.
    assert flops(loop_loss="1,0,1") == pytest.approx(three + one - loop)
    # Here it is only the head (32 x 16).
    upper = "window*2 | cross*2@3"
    assert flops(upper, loop_loss="1,1,1") == pytest.approx(flops(upper) + 2 * 6 * 32 * 16)


def test_prefill_of_yoco_u_costs_the_same_per_token_at_every_length():
    config = paper("yoco_u")
    costs = [accounting.prefill_flops_per_token(config, n) for n in LENGTHS.values()]
    assert max(costs) < 1.02 * min(costs)
    transformer = [
        accounting.prefill_flops_per_token(paper("transformer"), n) for n in LENGTHS.values()
    ]
    assert transformer[-1] > 5 * transformer[0]
    # At length 1 prefill, decode and a third of training are the same forward pass.
    for name in ARCHITECTURES:
        c = tiny.model(name)
        one = accounting.decode_flops_per_token(c, 1)
        assert accounting.prefill_flops_per_token(c, 1) == one
        assert accounting.train_flops_per_token(c, 1) == 3 * one


def test_decode_adds_up_to_a_forward_pass():
    """All decode steps of a sequence together cost the same as its forward pass."""
    for name in ARCHITECTURES:
        config, n = tiny.model(name), 11
        steps = sum(accounting.decode_flops_per_token(config, i) for i in range(1, n + 1))
        assert steps == pytest.approx(accounting.train_flops_per_token(config, n) * n / 3)


def test_the_looped_model_costs_about_twice_the_plain_one():
    ratio = accounting.train_flops_per_token(paper("yoco_u"), 8192) / (
        accounting.train_flops_per_token(paper("yoco"), 8192)
    )
    assert 1.6 < ratio < 2.0


def test_bytes_of_a_decode_step_by_hand():
    B, N = 8, 262_144
    feed_forward, attention = 3 * 2560 * 6656, 2 * 2560 * 20 * 128
    writer = 2560 * 4 * 128 * 2
    head = 2560 * 32_768
    position = 2 * 4 * 128 * 2  # bytes of a key and a value
    weights = {
        "transformer": 20 * (feed_forward + attention + writer),
        "yoco": 20 * (feed_forward + attention) + 10 * writer + writer,
        "yoco_u": 40 * (feed_forward + attention) + 30 * writer + writer,
        "rins": 40 * (feed_forward + attention + writer),
    }
    positions = {
        "transformer": 20 * N,
        "yoco": 10 * 512 + 10 * N,
        "yoco_u": 30 * 512 + 10 * N,
        "rins": 40 * N,
    }
    for name in TABLE_10:
        by_hand = 2 * (weights[name] + head) + B * positions[name] * position
        assert accounting.decode_bytes_per_step(paper(name), B, N) == by_hand
        wide = accounting.decode_bytes_per_step(paper(name), B, N, bytes_per_value=4)
        assert wide == 2 * by_hand
    # So bytes alone do not explain a decode that is 2.2 times as fast as that of the transformer.
    step = {name: accounting.decode_bytes_per_step(paper(name), 32, N) for name in TABLE_10}
    assert round(step["transformer"] / step["yoco_u"], 2) == 1.94
    assert round(step["yoco"] / step["yoco_u"], 2) == 0.98


def test_bytes_of_a_decode_step_count_the_experts_that_are_chosen():
    config = tiny.model("transformer", **tiny.MOE)
    one, longer, two = (
        accounting.decode_bytes_per_step(config, rows, context)
        for rows, context in ((1, 8), (1, 9), (2, 8))
    )
    position = 4 * 2 * 2 * 8 * 2  # four layers, a key and a value, two heads of 8
    assert longer - one == position
    # One row reads 2 of 4 experts. Two rows read 3 of them on average.
    expert = 4 * 3 * 16 * 12 * 2
    assert two - one == expert + 8 * position


# --- FLOPs and bytes by counting ------------------------------------------------------------------

# The same figures from the matrices of a tree, counted position by position and key by key.
COUNTED = {
    **{name: name for name in ARCHITECTURES},
    "two cross stages": "window*1@2 | cross*2 | cross*1@2",
    "three streams": "full*1@2, streams=3",
}
EXPERTS = tiny.MOE | {"window": 6, "qk_norm": True, "cross_rope": True}
COUNTED_OPTIONS = {
    "yoco": {"window": 5},
    "parscale": {"tie_embeddings": True},
    "two cross stages": EXPERTS | {"num_shared_experts": 0, "tie_embeddings": True, "window": 7},
}


@functools.cache
def _matrices(config) -> dict[str, list[tuple[int, float]]]:
    """For each part of the tree: the size of every matrix of a layer, and the share of it that
    multiplies one token (of routed experts, only the chosen ones)."""

    def is_matrix(path):
        return path.endswith(("['kernel']", "['head']", "['gate']", "['up']", "['down']"))

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(_unboxed(abstract_params(config))):
        part, path = path[0].key, jax.tree_util.keystr(path)
        if is_matrix(path):
            size = math.prod(leaf.shape[1:] if part.startswith("stage_") else leaf.shape)
            routed = "['feed_forward']" in path and not path.endswith("['kernel']")
            share = config.experts_per_token / config.num_experts if routed else 1
            # The matrices of a stage are stacked. All of its layers have the same shapes.
            found.setdefault(part, []).append((size, share))
    if config.tie_embeddings:
        found["head"] = [(config.vocab_size * config.d_model, 1)]
    return found


def _sees(config, mixer, i, j) -> bool:
    return j <= i and (mixer != "window" or j > i - config.window)


def _keys_seen(config, mixer, i) -> int:
    prefix = config.prefix_length if config.program.streams > 1 else 0
    return prefix + sum(_sees(config, mixer, i, j) for j in range(i + 1))


def _visits(program):
    """(name of the stage, mixer) of every run of a layer in every stream."""
    for i, stage in enumerate(program.stages):
        for _ in range(stage.loops or 1):
            for _ in range(stage.layers):
                for _ in range(program.streams):
                    yield f"stage_{i}_{stage.mixer}", stage.mixer


def _flops(config, positions, only_last=()) -> int:
    """Forward FLOPs of these positions. Mixers (and "head") in only_last run for the last one."""
    matrices = _matrices(config)

    def products(part):
        return sum(2 * size * share for size, share in matrices.get(part, ()))

    total = len(positions) * products("global_kv")
    ends = positions[-1:] if "head" in only_last else positions
    total += len(ends) * (products("head") + products("stream_gate"))
    for name, mixer in _visits(config.program):
        for i in positions[-1:] if mixer in only_last else positions:
            scores = config.num_heads * _keys_seen(config, mixer, i)
            total += products(name) + 2 * (2 * config.head_dim) * scores
    return total


def _bytes_read(config, batch, context) -> float:
    """Bytes that one decode step reads: every matrix of every run of a layer and of the two ends,
    once for all streams and rows; and every key and value that a row sees."""
    matrices = _matrices(config)
    unchosen = 1 - config.experts_per_token / max(1, config.num_experts)

    def entries(part):
        # An expert is not read if no row of any stream chooses it.
        rows = batch * config.program.streams
        return sum(n if s == 1 else n * (1 - unchosen**rows) for n, s in matrices.get(part, ()))

    total = entries("head") + entries("global_kv") + entries("stream_gate")
    for name, mixer in _visits(config.program):
        total += entries(name) / config.program.streams
        keys = _keys_seen(config, mixer, context - 1)
        total += 2 * batch * keys * config.num_kv_heads * config.head_dim
    return 2 * total


@pytest.mark.parametrize("name", COUNTED)
def test_flops_and_bytes_are_those_counted_one_by_one(name):
    """Lengths below, equal to and above the window."""
    config = tiny.model(COUNTED[name], num_kv_heads=1, **COUNTED_OPTIONS.get(name, EXPERTS))
    for n in (1, 5, 6, 7, 11):
        whole = range(n)
        trained = accounting.train_flops_per_token(config, n) * n
        assert trained == pytest.approx(3 * _flops(config, whole), rel=1e-12)
        prefilled = accounting.prefill_flops_per_token(config, n) * n
        assert prefilled == pytest.approx(_flops(config, whole, ("cross", "head")), rel=1e-12)
        decoded = accounting.decode_flops_per_token(config, n)
        assert decoded == pytest.approx(_flops(config, whole[-1:]), rel=1e-12)
        for batch in (1, 3):
            read = accounting.decode_bytes_per_step(config, batch, n)
            assert read == pytest.approx(_bytes_read(config, batch, n), rel=1e-12)
    idle = sum(
        stage.layers * size * (1 - share)
        for part, stage in config.program.named_stages
        for size, share in _matrices(config)[part]
    )
    found = accounting.parameters(config)
    assert found.active == pytest.approx(found.total - idle)


# --- Siblings and the command ---------------------------------------------------------------------


def test_siblings_keep_the_sizes_and_the_loops():
    config = dataclasses.replace(tiny.model("yoco_u"), num_loops=5)
    assert str(accounting.sibling(config, "rins").program) == "full*2@5 | full*2"
    assert str(accounting.sibling(config, "transformer").program) == "full*4"
    assert str(accounting.sibling(tiny.model("yoco_u"), "rins").program) == "full*2@3 | full*2"


def account(*flags) -> tuple[str, str]:
    """What the command writes to stdout and stderr."""
    line = (sys.executable, "-m", "experiments.account", *flags)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_the_account_command_names_what_it_leaves_out():
    output, said = account(
        "--config=configs/yocou_small.py:transformer", "--config.model.num_layers=3", "--json"
    )
    found = json.loads(output)["architectures"]
    assert set(found) == {"transformer", "universal_transformer", "parscale"}
    assert said == (
        "Left out, because 3 layers have no two equal halves: yoco_u, yoco, rins, upper_loop, "
        "upper_loop_unshared.\n"
    )


def test_the_account_command_prints_the_promised_keys():
    output, said = account("--config=configs/yocou_1b.py", "--json")
    found = json.loads(output)["architectures"]
    assert set(found) == set(ARCHITECTURES)
    assert not said
    lengths = {str(n) for n in LENGTHS.values()}
    for name, report in found.items():
        assert report["params"] == accounting.parameters(paper(name)).rows()
        assert set(report["kv_mib"]) == lengths
        assert set(report["flops_per_token"]) == {"train", "prefill", "decode"}
        for figures in report["flops_per_token"].values():
            assert set(figures) == lengths
    for name, row in TABLE_10.items():
        assert tuple(found[name]["kv_mib"].values()) == row
