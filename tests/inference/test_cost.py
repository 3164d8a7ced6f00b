"""The FLOPs and the memory of the compiled programs of inference, from the output of XLA."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from yocou_jax import accounting, inference
from yocou_jax.inference import forward, generation, prepare
from yocou_jax.inference.sampling import Sampling, check
from yocou_jax.model import empty_memory

# --- Matrix products in compiled HLO --------------------------------------------------------------

SHAPE = re.compile(r"%([\w.\-]+) = \w+\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def _size(dims: str) -> list[int]:
    return [int(n) for n in dims.split(",")] if dims else []


def product_flops(hlo: str) -> int:
    """FLOPs of all matrix products of a compiled module. A loop counts as often as it runs."""
    own, calls, shapes, name, entry = collections.Counter(), {}, {}, None, None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            name, calls[header[2]] = header[2], []
            entry = name if header[1] else entry
            shapes.update(
                (f"{name}/{n}", _size(dims))
                for n, dims in re.findall(r"([\w.\-]+): \w+\[([\d,]*)\]", header[0])
            )
        elif name and (result := SHAPE.search(line)):
            shapes[f"{name}/{result[1]}"] = _size(result[2])
            if product := re.search(
                r" dot\(.*?%([\w.\-]+), .*lhs_contracting_dims=\{(\d+)\}", line
            ):
                depth = shapes[f"{name}/{product[1]}"][int(product[2])]
                own[name] += 2 * math.prod(_size(result[2])) * depth
        if name and not line.startswith("ENTRY"):
            times = 1
            if " while(" in line:
                known = TRIPS.search(line)
                times = int(known[1]) if known else None
            calls[name] += [(called, times) for called in CALLED.findall(line)]

    @functools.cache
    def total(name):
        flops = own[name]
        for called, times in calls[name]:
            inner = total(called)
            assert times is not None or not inner, f"a loop of unknown length has products: {name}"
            flops += inner * (times or 0)
        return flops

    assert entry is not None
    return total(entry)


def test_products_in_loops_are_counted_as_often_as_they_run():
    def f(x, w):
        def step(x, _):
            return jnp.tanh(x @ w), ()

        return jax.lax.scan(step, x, length=7)[0] @ w

    shapes = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
    assert product_flops(jax.jit(f).lower(*shapes).compile().as_text()) == 8 * 2 * 3 * 5 * 5


# --- Prefill --------------------------------------------------------------------------------------


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def described(config, capacity, batch=1, attention="auto"):
    """A model, and the shapes and types of a memory and a residual stream."""
    model = prepare(tiny.params(config), config, tiny.compute(attention=attention))
    cache = jax.eval_shape(lambda: empty_memory(config, batch, capacity, jnp.float32))
    return model, cache, jax.ShapeDtypeStruct((batch, 1, config.d_model), jnp.float32)


def chunk_flops(config, chunk, capacity, program="prefill_chunk", attention="auto"):
    model, _, _ = described(config, capacity, attention=attention)
    lower = inference.programs(model, 1, capacity, chunk)[program]
    return product_flops(lower().compile().as_text())


def next_flops(config, capacity, attention="reference"):
    return chunk_flops(config, 1, capacity, "next_logits", attention)


def test_prefill_runs_the_cross_decoder_for_one_position_only():
    """To the last FLOP, with dense attention, because it is easy to count: it has all keys."""
    N, S = 48, 64
    c = tiny.model("window*2@3 | cross*2")
    window, cross = c.program.stages
    heads = c.num_heads * c.head_dim
    self_decoder = 2 * N * accounting._layer_matmul_params(c, window) + 4 * N * heads * (
        c.window + N
    )
    global_kv = 2 * N * accounting._kv_projection_params(c)
    chunk = chunk_flops(c, N, S, attention="reference")
    assert chunk == 6 * self_decoder + global_kv
    one_position = 2 * accounting._layer_matmul_params(c, cross) + 4 * heads * S
    assert next_flops(c, S) == 2 * one_position + 2 * c.d_model * c.vocab_size
    everywhere = chunk_flops(c, N, S, "score_chunk", "reference") - chunk
    assert everywhere > N * next_flops(c, S)


def exponent(lengths, costs):
    return np.polyfit(np.log(lengths), np.log(costs), 1)[0]


@pytest.mark.parametrize(
    ("name", "attention", "low", "high"),
    [
        ("yoco_u", "xla", 0.95, 1.05),
        pytest.param("yoco", "xla", 0.95, 1.05, marks=pytest.mark.slow),
        ("transformer", "reference", 1.5, 2.0),  # a causal kernel would need half of it
    ],
)
def test_how_the_cost_of_prefill_grows_with_the_prompt(name, attention, low, high):
    config = tiny.model(name, num_layers=2, window=16)
    lengths = [256, 512, 1024, 2048]
    # For the last position, dense attention: the loop of "xla" ends at the end of the prompt.
    costs = [
        chunk_flops(config, n, n, attention=attention) + next_flops(config, n) for n in lengths
    ]
    assert low <= exponent(lengths, costs) <= high
    assert np.all(
        np.asarray(costs) > [n * accounting.prefill_flops_per_token(config, n) for n in lengths]
    )


def test_the_cost_of_a_chunk_does_not_depend_on_the_prompt():
    """This is true for a YOCO. A chunk of a full layer attends to all positions before it."""
    yoco, full = (tiny.model(name, num_layers=2, window=16) for name in ("yoco_u", "transformer"))
    flops = functools.partial(chunk_flops, attention="reference")
    assert flops(yoco, 64, 256) == flops(yoco, 64, 4096)
    assert flops(full, 64, 4096) > 5 * flops(full, 64, 256)


def test_the_memory_of_a_chunk_does_not_grow_with_the_prompt():
    config = tiny.model("yoco_u", num_layers=2, window=16)

    def temporary(capacity):
        model, cache, last = described(config, capacity)
        lowered = forward.prefill_chunk.lower(
            model, cache, last, i32(1, 64), i32(1), i32(), fits=True
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) <= temporary(256) + 1024
    one_cache = 8192 * config.num_kv_heads * config.head_dim * 4
    assert temporary(8192) < one_cache  # so there is no copy of the cache


def test_a_chunk_of_fresh_prompts_is_written_in_one_piece():
    """Only rows of different lengths need a scatter."""
    model, cache, last = described(tiny.model("yoco_u", num_layers=2), 64, batch=2)

    def scatters(start, fits):
        args = model, cache, last, i32(2, 16), i32(2), start
        lowered = forward.prefill_chunk.lower(*args, fits=fits)
        return lowered.as_text().count("stablehlo.scatter")

    assert scatters(i32(), True) == 0
    assert scatters(i32(), False) > 0
    assert scatters(None, False) > 0


def test_every_program_writes_to_the_given_cache_in_place():
    config = tiny.model("yoco_u", num_layers=2, window=64)
    model, cache, last = described(config, 256, batch=2)
    seeds = jax.ShapeDtypeStruct((2,), jnp.uint32)
    logits = jax.ShapeDtypeStruct((2, config.vocab_size), jnp.float32)
    begin = generation._begin.lower(cache, logits, None, seeds, i32(2))
    state = jax.eval_shape(generation._begin, cache, logits, None, seeds, i32(2))
    sampling = jax.eval_shape(lambda: check(Sampling(), 2))
    block = generation._generate_block.lower(
        model, state, sampling, i32(0), block=8, sort=False, logprobs=False
    )
    args = model, cache, last, i32(2, 16), i32(2), i32()
    chunk = forward.prefill_chunk.lower(*args, fits=True)
    for lowered in (begin, block, chunk):
        assert lowered.compile().memory_analysis().alias_size_in_bytes >= cache.nbytes


# --- Decode ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loop_adds_only_its_rings_to_the_memory_of_a_decode_step():
    config = tiny.model("window*2@1 | cross*2", window=64, head_dim=32)
    ring = 2 * 2 * config.window * config.num_kv_heads * config.head_dim * 4  # K and V, two layers

    def memory(loops):
        model, cache, _ = described(dataclasses.replace(config, num_loops=loops), 256)
        compiled = inference.decode_step.lower(model, cache, i32(1), None).compile()
        found = compiled.memory_analysis()
        assert found.alias_size_in_bytes >= cache.nbytes  # written in place
        return found.temp_size_in_bytes, cache.nbytes

    (one, base), (three, kept3), (five, kept5) = (memory(loops) for loops in (1, 3, 5))
    assert (kept3 - base, kept5 - base) == (2 * ring, 4 * ring)
    assert three <= one + 1024
    assert five <= one + 1024
    assert one < base / 2  # no copy of the caches
