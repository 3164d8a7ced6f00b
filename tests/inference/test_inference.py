"""Prefill and decode equal the forward pass of training; generation, forks, refused arguments."""

import collections
import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from yocou_jax import accounting, inference
from yocou_jax.config import MeshConfig
from yocou_jax.errors import UserError
from yocou_jax.inference import (
    Sampling,
    fork,
    generate,
    generate_from,
    generation,
    prefill,
    prepare,
    score,
)
from yocou_jax.inference.request import bucket
from yocou_jax.model import logits as forward
from yocou_jax.sharding import make_mesh

# The window is 4. Prompts: shorter, as long, one position longer, and several windows long.
LENGTHS = np.array([3, 4, 5, 17])
TEXT = 24  # positions of the longest prompt and of what is decoded after it

full_logits = jax.jit(
    functools.partial(forward, compute=tiny.compute()),
    static_argnames=("config", "num_loops", "compute"),
)


@functools.cache
def model(config):
    return prepare(tiny.params(config), config, tiny.compute())


@functools.cache
def expected(config, batch=4, length=TEXT):
    tokens = tiny.tokens(batch, length)
    return np.asarray(full_logits(tiny.params(config), config, tokens))


def assert_equal(got, want, scale, tolerance=1e-5):
    worst = np.abs(np.asarray(got) - want).max()
    assert worst <= tolerance * scale, f"differs by {worst}, the largest logit is {scale}"


def check_against_the_forward_pass(config, chunk, capacity=TEXT, steps=7):
    """Checks the logits after each prompt of a ragged prefill, and after every decode step."""
    tokens, want = np.asarray(tiny.tokens(len(LENGTHS), TEXT)), expected(config)
    scale, rows = np.abs(want).max(), np.arange(len(LENGTHS))
    prompts = np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens[:, : LENGTHS.max()], 7)
    cache, logits = prefill(model(config), prompts, LENGTHS, capacity=capacity, chunk=chunk)
    assert_equal(logits, want[rows, LENGTHS - 1], scale)
    for step in range(steps):
        cache, logits = inference.decode_step(model(config), cache, tokens[rows, LENGTHS + step])
        assert_equal(logits, want[rows, LENGTHS + step], scale)
    np.testing.assert_array_equal(cache.lengths, LENGTHS + steps)
    assert cache.nbytes == len(LENGTHS) * accounting.kv_bytes(config, capacity, 4)


# --- Prefill and decode are the forward pass ------------------------------------------------------


@pytest.mark.parametrize("name", tiny.quick(tiny.FOUR, "yoco_u", "rins", "parscale"))
def test_a_ragged_prefill_and_decode_are_the_forward_pass(name):
    check_against_the_forward_pass(tiny.model(name), chunk=5)


@pytest.mark.parametrize("name", tiny.quick(tiny.FOUR, "yoco_u"))
def test_scores_are_the_forward_pass_at_every_position(name):
    """For rows of different lengths, and for continuations of a prompt that was forked."""
    config = tiny.model(name)
    tokens, want = np.asarray(tiny.tokens(len(LENGTHS), TEXT)), expected(config)
    scale, logps = np.abs(want).max(), tiny.logprobs(want, tokens)
    memory, logits, found, likeliest = score(
        model(config), tokens[:, :17], LENGTHS, capacity=TEXT, chunk=5
    )
    assert found.shape == likeliest.shape == (4, 17)
    for row, length in enumerate(LENGTHS):
        best = want[row, : length - 1].argmax(-1) == tokens[row, 1:length]
        np.testing.assert_array_equal(likeliest[row], np.pad(best, (1, 17 - length)))
    for row, length in enumerate(LENGTHS):
        assert_equal(found[row, 1:length], logps[row, : length - 1], scale)
        assert np.isnan(found[row, 0])
        assert np.isnan(found[row, length:]).all()
        assert_equal(logits[row], want[row, length - 1], scale)
    np.testing.assert_array_equal(memory.lengths, LENGTHS)

    prompt, rows = tokens[:1, :6], np.array([0, 0])
    memory, logits = prefill(model(config), prompt, capacity=TEXT, chunk=5)
    endings = np.stack([tokens[0, 6:11], tokens[1, 6:11]])
    _, _, found, likeliest = score(
        model(config), endings, memory=fork(memory, rows), logits=logits[rows]
    )
    texts = np.concatenate([np.repeat(prompt, 2, axis=0), endings], axis=1)
    whole = full_logits(tiny.params(config), config, jnp.asarray(texts))
    assert_equal(found, tiny.logprobs(whole, texts)[:, 5:], scale)
    np.testing.assert_array_equal(likeliest, whole.argmax(-1)[:, 5:-1] == endings)


def test_two_cross_stages_read_one_cache():
    config = tiny.model("window*1 | cross*1 | cross*1@2", cross_rope=True, qk_norm=True)
    check_against_the_forward_pass(config, chunk=5, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 17, 40])
def test_the_chunk_size_does_not_matter(chunk):
    """Chunks are shorter or longer than the window, the prompt and the cache (24 positions)."""
    check_against_the_forward_pass(tiny.model("yoco_u", num_layers=2), chunk)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["full*2", "window*1@2 | full*1", pytest.param("full*2, streams=2", id="streams")]
)
@pytest.mark.parametrize("chunk", [8, 24])
def test_the_chunk_size_does_not_matter_for_full_layers(program, chunk):
    check_against_the_forward_pass(tiny.model(program), chunk, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        tiny.MOE,
        {"qk_norm": True, "cross_rope": True},
        {"tie_embeddings": True, "num_kv_heads": 4},
        {"window": 1},
        {"window": 64},
    ],
    ids=["experts", "norms and rope", "tied", "window of one", "window beyond the text"],
)
def test_a_ragged_prefill_and_decode_with_options_are_the_forward_pass(fields):
    check_against_the_forward_pass(tiny.model("yoco_u", num_layers=2, **fields), chunk=6, steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("num_loops", [1, 2, 4, 5])
def test_a_model_runs_at_other_loop_counts_than_its_own(num_loops):
    trained = tiny.model("yoco_u", num_layers=2)
    config = dataclasses.replace(trained, num_loops=num_loops)
    tokens = np.asarray(tiny.tokens(2, 15))
    want = np.asarray(
        full_logits(tiny.params(trained), trained, jnp.asarray(tokens), num_loops=num_loops)
    )
    run = prepare(tiny.params(trained), config, tiny.compute())
    cache, logits, found, _ = score(run, tokens[:, :13], capacity=15, chunk=4)
    assert_equal(found[:, 1:], tiny.logprobs(want, tokens[:, :13]), np.abs(want).max())
    assert_equal(logits, want[:, 12], np.abs(want).max())
    assert cache.nbytes == 2 * accounting.kv_bytes(config, 15, 4)
    for at in (13, 14):
        cache, logits = inference.decode_step(run, cache, tokens[:, at])
        assert_equal(logits, want[:, at], np.abs(want).max())


@pytest.mark.parametrize("name", tiny.quick(["yoco_u", "transformer", "parscale"], "yoco_u"))
def test_a_second_text_is_appended_to_a_first(name):
    """The rows have different lengths, and the second texts too."""
    config = tiny.model(name, num_layers=2)
    tokens, want = np.asarray(tiny.tokens(len(LENGTHS), TEXT)), expected(config)
    more = np.array([6, 1, 7, 4])
    cache, logits = prefill(model(config), tokens[:, :17], LENGTHS, capacity=TEXT, chunk=8)
    second = np.stack([np.roll(row, -n)[:7] for row, n in zip(tokens, LENGTHS, strict=True)])
    cache, logits, found, _ = score(
        model(config), second, more, memory=cache, logits=logits, chunk=3
    )
    np.testing.assert_array_equal(cache.lengths, LENGTHS + more)
    for row, (n, m) in enumerate(zip(LENGTHS, more, strict=True)):
        logps = tiny.logprobs(want, tokens)[row, n - 1 : n + m - 1]
        assert_equal(found[row, :m], logps, np.abs(want).max())
        assert_equal(logits[row], want[row, n + m - 1], np.abs(want).max())


def test_rows_that_are_not_active_stay_as_they_are():
    config = tiny.model("yoco_u", num_layers=2)
    tokens, want = np.asarray(tiny.tokens(len(LENGTHS), TEXT)), expected(config)
    rows = np.arange(len(LENGTHS))
    cache, _ = prefill(model(config), tokens[:, :17], LENGTHS, capacity=TEXT)
    active = np.array([True, False, True, False])
    for _ in range(5):  # enough steps to overwrite the rings of window 4
        cache, _ = inference.decode_step(model(config), cache, np.full(4, 9), active & False)
    cache, _ = inference.decode_step(model(config), cache, tokens[rows, LENGTHS], active)
    np.testing.assert_array_equal(cache.lengths, LENGTHS + active)
    cache, logits = inference.decode_step(model(config), cache, tokens[rows, LENGTHS + active])
    assert_equal(logits, want[rows, LENGTHS + active], np.abs(want).max())


@pytest.mark.parametrize("name", ["yoco_u", "parscale"])
@pytest.mark.slow
def test_inference_in_bfloat16_is_as_exact_as_training(name):
    """The error against float32 is at most 1.5 times that of the forward pass of training."""
    config = tiny.model(name, num_layers=2, **(tiny.MOE if name == "yoco_u" else {}))
    half = tiny.compute(dtype="bfloat16")
    want, tokens = expected(config), tiny.tokens(len(LENGTHS), TEXT)
    training = np.asarray(full_logits(tiny.params(config), config, tokens, compute=half))
    run = prepare(tiny.params(config), config, half)
    assert {str(x.dtype) for x in jax.tree.leaves(run.params)} == {"bfloat16", "float32"}
    cache, _, found, _ = score(run, tokens, chunk=7)
    kept = jax.tree.leaves((cache.stages, cache.global_kv))
    assert {str(x.dtype) for x in kept} == {"bfloat16"}
    want, trained = tiny.logprobs(want, tokens), tiny.logprobs(training, tokens)
    error = np.abs(np.asarray(found)[:, 1:] - want).mean()
    assert error <= 1.5 * np.abs(trained - want).mean()


@pytest.mark.parametrize(
    ("name", "fields"),
    [("parscale", {}), ("yoco_u", tiny.MOE), ("yoco", {"tie_embeddings": True, "qk_norm": True})],
)
def test_prepared_parameters_are_what_training_computes_with(name, fields):
    """They are rounded like in the forward pass: with them, its result does not change."""
    config, half = tiny.model(name, num_layers=2, **fields), tiny.compute(dtype="bfloat16")
    params = tiny.params(config)
    prepared = dict(prepare(params, config, half).params)
    head = prepared.pop("head")
    if "head" in params:
        prepared["head"] = head
    for stage, _ in config.program.named_stages:
        prepared[stage] = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *prepared[stage])}
    back = jax.tree.map(lambda x: np.asarray(x, np.float32), prepared)
    tokens = tiny.tokens(2, 9)
    np.testing.assert_array_equal(
        *(full_logits(p, config, tokens, compute=half) for p in (back, params))
    )
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (back, params)), strict=True))


# --- Forks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", tiny.quick(["yoco_u", "upper_loop_unshared", "parscale"], "yoco_u")
)
def test_a_forked_cache_equals_that_of_separate_prefills(name):
    config = tiny.model(name, num_layers=2)
    tokens = np.asarray(tiny.tokens(2, 12))
    rows = np.array([1, 0, 1])
    cache, logits = prefill(model(config), tokens, np.array([12, 7]), capacity=16, chunk=5)
    forked, logits = fork(cache, rows), logits[rows]
    apart, want = prefill(model(config), tokens[rows], np.array([7, 12, 7]), capacity=16, chunk=5)
    assert_equal(logits, np.asarray(want), np.abs(want).max())
    tiny.assert_close(forked, apart)
    for step in range(3):  # each row continues in another way
        forked, logits = inference.decode_step(model(config), forked, rows + 3 * step)
        apart, want = inference.decode_step(model(config), apart, rows + 3 * step)
        assert_equal(logits, np.asarray(want), np.abs(want).max())


# --- Generation -----------------------------------------------------------------------------------

# The last prompt has another bucket than the others, and so other chunks.
PROMPTS = [[5, 9, 2], [1], [8, 8, 3, 1, 30, 11, 4, 6, 2, 19, 7, 7, 25, 3, 14, 0, 31, 5]]


def text_logits(config, text):
    """Logits of every position of one text, from the forward pass."""
    padded = jnp.asarray([[*text, *[0] * (32 - len(text))]])
    return np.asarray(full_logits(tiny.params(config), config, padded)[0, : len(text)])


def recomputed(config, prompt, count):
    """Greedy tokens. The whole text runs again for each of them."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(text_logits(config, text)[-1].argmax()))
    return text[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yoco_u", "transformer"])
def test_greedy_text_does_not_depend_on_the_batch(name):
    config = tiny.model(name, num_layers=2)
    together = generate(model(config), PROMPTS, max_new_tokens=9)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model(config), [prompt], max_new_tokens=9)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_array_equal(alone.tokens[0], recomputed(config, prompt, 9))


@pytest.mark.slow
def test_a_row_is_drawn_by_its_own_seed():
    run, sampling = model(tiny.model("yoco_u", num_layers=2)), Sampling(temperature=1.5, top_p=0.9)
    draw = functools.partial(generate, run, max_new_tokens=8, sampling=sampling)
    together = draw(PROMPTS, seeds=[4, 7, 4])
    np.testing.assert_array_equal(draw([PROMPTS[1]], seeds=[7]).tokens[0], together.tokens[1])
    np.testing.assert_array_equal(draw(PROMPTS, seeds=6).tokens[1], together.tokens[1])
    three = draw([PROMPTS[0]] * 3, seeds=[4, 5, 4]).tokens
    np.testing.assert_array_equal(three[0], three[2])
    assert (three[0] != three[1]).any()
    np.testing.assert_array_equal(three[0], together.tokens[0])


@pytest.mark.slow
def test_streamed_blocks_are_the_result_and_logprobs_those_of_the_model(monkeypatch):
    config = tiny.model("yoco_u", num_layers=2)
    options = {"sampling": Sampling(temperature=1.3, top_k=20), "seeds": 3, "logprobs": True}
    calls, block = [], generation._generate_block
    monkeypatch.setattr(
        generation, "_generate_block", lambda *a, **k: calls.append(k) or block(*a, **k)
    )
    whole = generate(model(config), PROMPTS, max_new_tokens=11, **options)
    assert len(calls) == 1  # tokens do not go to the host one by one
    blocks = []
    streamed = generate(
        model(config), PROMPTS, max_new_tokens=11, on_tokens=blocks.append, block=4, **options
    )
    assert [b.shape for b in blocks] == [(3, 4), (3, 4), (3, 4)]
    assert (blocks[2][:, 3] == -1).all()
    np.testing.assert_array_equal(streamed.tokens, whole.tokens)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1)[:, :11], whole.tokens)
    np.testing.assert_array_equal(streamed.memory.lengths, [len(p) + 11 for p in PROMPTS])
    assert whole.logprobs.shape == whole.tokens.shape
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *whole.tokens[row]]
        logp = np.asarray(jax.nn.log_softmax(text_logits(config, text)))
        want = logp[np.arange(len(prompt) - 1, len(text) - 1), whole.tokens[row]]
        np.testing.assert_allclose(whole.logprobs[row], want, rtol=1e-4, atol=1e-5)


def check_what_comes_next(config, out):
    """Checks that the returned logits are those after the end of every row."""
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *out.tokens[row, : out.lengths[row]]]
        want = text_logits(config, text)[-1]
        assert_equal(out.logits[row], want, np.abs(want).max())
    np.testing.assert_array_equal(out.memory.lengths, [len(p) for p in PROMPTS] + out.lengths)


def test_a_row_ends_with_a_stop_token_and_the_others_go_on():
    config = tiny.model("yoco_u", num_layers=2)
    run = model(config)
    arrays = [np.array(PROMPTS[0]), *map(jnp.array, PROMPTS[1:])]  # as well as lists
    free = generate(run, arrays, max_new_tokens=12).tokens
    stop = int(free[2, 3])
    options = {"max_new_tokens": 12, "stop_tokens": [stop], "logprobs": True}
    out = generate(run, PROMPTS, **options)
    for row in range(3):
        hits = np.flatnonzero(free[row] == stop)
        length = hits[0] + 1 if hits.size else 12
        assert out.lengths[row] == length
        np.testing.assert_array_equal(out.tokens[row, :length], free[row, :length])
        assert (out.tokens[row, length:] == -1).all()
        assert not out.logprobs[row, length:].any()
    assert out.lengths.min() < out.lengths.max() < 12  # some ended, and did not change any more
    check_what_comes_next(config, out)
    streamed = generate(run, PROMPTS, on_tokens=lambda _: None, **options)
    np.testing.assert_array_equal(streamed.tokens, out.tokens)


def test_every_row_may_have_its_own_limit():
    config = tiny.model("yoco_u", num_layers=2)
    free = generate(model(config), PROMPTS, max_new_tokens=9).tokens
    out = generate(model(config), PROMPTS, max_new_tokens=[2, 9, 5])
    assert out.lengths.tolist() == [2, 9, 5]
    for row in range(3):
        np.testing.assert_array_equal(
            out.tokens[row, : out.lengths[row]], free[row][: out.lengths[row]]
        )
    check_what_comes_next(config, out)


@pytest.mark.slow
def test_two_calls_of_generate_give_the_tokens_of_one():
    """A draw depends on seed and position. The penalty also counts tokens of the first call."""
    run = model(tiny.model("yoco_u", num_layers=2))
    options = {"sampling": Sampling(temperature=2.0, repetition_penalty=2.0), "seeds": 5}
    whole = generate(run, PROMPTS, max_new_tokens=9, **options)
    part = generate(run, PROMPTS, max_new_tokens=4, capacity=32, **options)
    rest = generate_from(run, part.memory, part.logits, seen=part.seen, max_new_tokens=5, **options)
    np.testing.assert_array_equal(np.hstack([part.tokens, rest.tokens]), whole.tokens)


@pytest.mark.slow
def test_the_loop_filters_logits_and_draws_new_noise_in_each_step():
    run = model(tiny.model("yoco_u", num_layers=2))
    hot = Sampling(temperature=50.0, top_k=1)
    np.testing.assert_array_equal(
        generate(run, PROMPTS, max_new_tokens=6, sampling=hot).tokens,
        generate(run, PROMPTS, max_new_tokens=6).tokens,
    )
    uniform = Sampling(temperature=1e6)
    tokens = generate(run, [[3]], num_samples=500, max_new_tokens=2, sampling=uniform).tokens
    # 1 in 32 pairs are equal. With the same noise in both steps, all pairs would be.
    assert 0 < (tokens[:, 0] == tokens[:, 1]).mean() < 0.1


def test_a_repetition_penalty_counts_prompt_and_output():
    run = model(tiny.model("yoco_u", num_layers=2))
    tokens = generate(
        run, PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=0.0, repetition_penalty=1e6)
    ).tokens
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        assert len({*prompt, *row.tolist()}) == len({*prompt}) + 12
    plain = generate(run, PROMPTS, max_new_tokens=12).tokens
    assert any(len(set(row.tolist())) < 12 for row in plain)  # without it, tokens repeat


@pytest.mark.slow
def test_samples_of_a_prompt_equal_those_of_copies_of_it():
    run = model(tiny.model("yoco_u", num_layers=2))
    options = {
        "max_new_tokens": 6,
        "seeds": [3, 1, 4, 1, 5, 9],
        "sampling": Sampling(temperature=[1.0, 2.0, 0.0] * 2, repetition_penalty=1.3),
    }
    forked = generate(run, PROMPTS[:2], num_samples=3, **options)
    copies = generate(run, [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3, **options)
    np.testing.assert_array_equal(forked.tokens, copies.tokens)


def test_samples_follow_the_models_distribution():
    """Chi-square of the first token of 2,000 continuations of one prompt. The quantile at p = 0.001
    for 31 degrees of freedom is 61.1."""
    config = tiny.model("yoco_u", num_layers=2)
    cache, logits = prefill(model(config), np.array([PROMPTS[0]]), capacity=8)
    rows = np.zeros(2000, int)
    out = generate_from(
        model(config),
        fork(cache, rows),
        logits[rows],
        max_new_tokens=1,
        sampling=Sampling(temperature=2.0),
    )
    counts = np.bincount(out.tokens[:, 0], minlength=32)
    x = np.asarray(logits[0], np.float64) / 2

    def chi_square(p):
        return ((counts - 2000 * p) ** 2 / (2000 * p)).sum()

    softmax = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    assert chi_square(softmax) < 61.1
    cooler = np.exp(1.4 * (x - x.max())) / np.exp(1.4 * (x - x.max())).sum()
    assert chi_square(cooler) > 61.1


@pytest.fixture
def compiled(caplog):
    """Names of the programs that were compiled so far, from the log of jax."""
    with jax.log_compiles():
        yield lambda: collections.Counter(re.findall(r"Compiling jit\((\w+)\)", caplog.text))


PROGRAMS = {"prefill_chunk": 1, "next_logits": 1, "_generate_block": 1}


def inference_programs(counter):
    return {name: count for name, count in counter.items() if name in PROGRAMS}


@pytest.mark.slow
def test_prompts_of_one_bucket_share_their_programs(compiled):
    run = model(tiny.model("yoco_u", num_layers=2, vocab_size=33))  # only this test has this size
    generate(run, [[1] * 35], max_new_tokens=5, capacity=64)
    assert inference_programs(compiled()) == PROGRAMS
    for length in (33, 37, 40):
        generate(run, [[2] * length], max_new_tokens=7, capacity=64)
        sampling = Sampling(temperature=0.5, min_p=0.1)
        generate(run, [[2] * length], max_new_tokens=5, capacity=64, sampling=sampling)
    assert inference_programs(compiled()) == PROGRAMS | {"_generate_block": 2}  # up to 5, up to 7
    generate(run, [[2] * 41], max_new_tokens=5, capacity=64)
    assert inference_programs(compiled())["prefill_chunk"] == 2


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_chunk_and_every_block_runs_the_same_program(devices, compiled):
    """Also for parameters that were put on a device (like those of a checkpoint) or on a mesh."""
    config = tiny.model("yoco_u", num_layers=2, vocab_size=34)
    mesh = make_mesh(MeshConfig(data=devices, fsdp=1, tensor=1), jax.devices()[:devices])
    options = {"max_new_tokens": 9, "on_tokens": lambda _: None, "block": 3, "chunk": 4}
    with jax.set_mesh(mesh) if devices > 1 else contextlib.nullcontext():
        params = tiny.params(config)
        if devices == 1:
            params = jax.device_put(params, jax.devices()[0])
        run = prepare(params, config, tiny.compute())
        generate(run, [PROMPTS[2]] * 8, **options)
        score(run, np.array([PROMPTS[2]] * 8), chunk=4)
    assert inference_programs(compiled()) == PROGRAMS
    assert compiled()["score_chunk"] == 1


def test_buckets_waste_at_most_a_quarter():
    sizes = [bucket(n) for n in range(1, 3000)]
    assert all(n <= size <= max(16, 1.25 * n) for n, size in enumerate(sizes, 1))
    few = [16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert sorted(set(sizes[:256])) == few


def test_the_chunk_shrinks_with_the_batch_and_the_cache_has_room_for_whole_chunks():
    for batch, chunk in ((1, 2048), (8, 2048), (9, 1792), (32, 512), (128, 128), (5000, 128)):
        assert inference.default_sizes(batch, 10_000)[1] == chunk
    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))):
        assert inference.default_sizes(64, 10_000)[1] == 2048  # 8 rows on each device
        assert inference.default_sizes(100, 10_000)[1] == 640  # only data divides it: 25 on each
        assert inference.default_sizes(101, 10_000)[1] == 128  # nothing divides it: 101 on each
    assert inference.default_sizes(1, 5000, 64) == (6144, 2048)  # without chunks it would be 5120
    assert inference.default_sizes(4, 90, 20) == (112, 96)
    assert inference.default_sizes(4, 90, 20, capacity=111, chunk=7) == (111, 7)


@pytest.mark.parametrize("name", tiny.quick(["yoco_u", "parscale"], "yoco_u"))
def test_eight_devices_generate_what_one_does(name):
    config = tiny.model(name, num_layers=2)
    prompts = [*PROMPTS, [3, 3, 3]]
    options = {"max_new_tokens": 8, "sampling": Sampling(temperature=0.7), "logprobs": True}
    options["num_samples"] = 2
    one = generate(model(config), prompts, **options)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        many = generate(prepare(tiny.params(config), config, tiny.compute()), prompts, **options)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.logprobs, one.logprobs, atol=1e-4)
    entry = jax.tree.leaves(many.memory)[0]
    assert len(entry.sharding.device_set) == 8
    assert entry.addressable_shards[0].data.size == entry.size / 8  # over rows and K/V heads


# --- Arguments that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([], {}, "Prompt 0 is empty; it needs at least one token."),
        ([[1], []], {}, "Prompt 1 is empty; it needs at least one token."),
        ([[1, 32]], {}, "Prompt 0 has the token 32 at position 1, outside the vocabulary of 32."),
        ([[1], [4, -1]], {}, "Prompt 1 has the token -1 at position 1, outside"),
        ([[1], [2, 1.5]], {}, "Prompt 1 is not a list of token ids: encode text first."),
        ([1, 2], {}, "Prompt 0 is not a list of token ids: encode text first."),
        (["def f"], {}, "Prompt 0 is not a list of token ids: encode text first."),
        ([[1] * 9], {"capacity": 12}, "Prompt 0 has 9 positions and 4 new ones, more than the 12"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be between 1 and"),
        (
            [[1]],
            {"max_new_tokens": 2.5},
            "max_new_tokens=2.5 must be a whole number, or one for each of 1 rows, from 1 to",
        ),
        ([[1]], {"max_new_tokens": [[1], [2, 3]]}, "must be a whole number, or one for each"),
        (
            [[1, 1, 1]],
            {"max_new_tokens": 2**31 - 1, "capacity": 16},
            "Prompt 0 has 3 positions and 2147483647 new ones, more than the 16",
        ),
        (
            [[1], [1] * 9],
            {"num_samples": 4, "capacity": 12},
            "Prompt 1 has 9 positions and 4 new ones, more than the 12",
        ),
        ([[1]], {"sampling": Sampling(temperature=-1.0)}, "sampling.temperature=-1.0 must be"),
        ([[1]], {"stop_tokens": [99]}, "stop_tokens=[99] must be between 0 and 31."),
        ([[1]], {"stop_tokens": [1.5]}, "stop_tokens=[1.5] must be a list of token ids from 0 to"),
        ([[1]], {"stop_tokens": 3}, "stop_tokens=3 must be a list of token ids from 0 to 31."),
        (
            [[1], [2]],
            {"seeds": [1]},
            "seeds=[1] must be a whole number, or one for each of 2 rows, from 0",
        ),
        ([[1]], {"seeds": 2**32}, "seeds=4294967296 must be between 0 and 4294967295."),
        ([[1]], {"seeds": "x"}, "seeds='x' must be a whole number"),
        ([[1]], {"block": 0}, "block=0 must be between 1 and"),
        ([[1]], {"chunk": 0}, "chunk=0 must be at least 1 position."),
        ([[1]], {"num_samples": 0}, "num_samples=0 must be between 1 and"),
    ],
)
def test_bad_requests_get_one_clear_sentence(prompts, options, sentence, unchecked):
    run = model(tiny.model("yoco_u", num_layers=2))
    with pytest.raises(UserError) as error:
        generate(run, prompts, **({"max_new_tokens": 4} | options))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def refused(sentence):
    return pytest.raises(UserError, match=re.escape(sentence))


@pytest.mark.parametrize("name", tiny.quick(["yoco_u", "parscale"], "yoco_u"))
def test_a_cache_that_is_full_is_refused_before_it_is_changed(name):
    run = model(tiny.model(name, num_layers=2))
    prompts = np.array([[1, 2, 3], [4, 5, 6]])
    cache, logits = prefill(run, prompts, np.array([3, 1]), capacity=5)
    with refused("more than the 5 that fit into the cache"):
        prefill(run, prompts, memory=cache)
    with refused("Prompt 0 has 3 positions and 3 new ones, more than the 5"):
        generate_from(run, cache, logits, max_new_tokens=3)
    out = generate_from(run, cache, logits, max_new_tokens=[2, 4])
    assert out.memory.lengths.tolist() == [5, 5]
    donated = "This memory was donated to an earlier call and cannot be used again. Call fork()"
    with refused(donated):
        generate_from(run, cache, logits, max_new_tokens=1)
    with refused(donated):
        fork(cache, [0])
    _, logits = inference.decode_step(run, fork(out.memory, [0, 1]), np.array([1, 1]))
    assert np.isnan(logits).all()  # so a loop around decode_step sees the mistake
    cache, _ = prefill(run, prompts)
    with refused("Row 0 has no logits"):
        generate_from(run, cache, np.asarray(logits), max_new_tokens=1)


def test_a_new_cache_has_room_for_more_tokens():
    config = tiny.model("yoco_u", num_layers=2)
    tokens = np.asarray(tiny.tokens(1, 18))
    want = expected(config, 1, 18)
    cache, _ = prefill(model(config), tokens[:, :16])  # exactly one bucket
    for at in (16, 17):
        cache, logits = inference.decode_step(model(config), cache, tokens[:, at])
        assert_equal(logits, want[:, at], np.abs(want).max())


def test_caches_and_rows_that_do_not_fit_are_refused(unchecked):
    config = tiny.model("yoco_u", num_layers=2)
    run, other = (
        model(config),
        prepare(tiny.params(config), dataclasses.replace(config, num_loops=2), tiny.compute()),
    )
    cache, logits = prefill(run, np.array([[1, 2, 3], [4, 5, 6]]))
    with refused("A memory of 2 rows does not fit 1 prompts"):
        prefill(run, np.array([[1]]), memory=cache)
    for stranger in (other, model(tiny.model("transformer"))):
        with refused("The memory does not fit this model"):
            generate_from(stranger, cache, logits, max_new_tokens=1)
    with refused("capacity=9 cannot be given with a memory"):
        prefill(run, np.array([[1], [2]]), memory=cache, capacity=9)
    with refused("logits has the shape (1, 32), but must have (2, 32)."):
        generate_from(run, cache, logits[:1], max_new_tokens=1)
    for rows in ([2], [-1], [], [True], [[0]], [0.0]):
        with refused("must be row numbers from 0 to 1."):
            fork(cache, rows)
    with refused("Prompts are integers"):
        prefill(run, np.array([[1.0]]))
    for lengths in ([3], [1.5], [1, 1]):
        with refused("do not fit 1 prompts of 2 positions"):
            prefill(run, np.array([[1, 2]]), np.array(lengths))


def test_a_program_with_windows_only_has_no_capacity():
    """A ring is never full, so a text of any length fits."""
    config = tiny.model("window*2@2")
    tokens = np.asarray(tiny.tokens(2, 40))
    cache, logits = prefill(model(config), tokens, chunk=16, capacity=8)
    want = expected(config, 2, 40)
    assert_equal(logits, want[:, -1], np.abs(want).max())
    assert cache.nbytes == 2 * accounting.kv_bytes(config, 40, 4)
