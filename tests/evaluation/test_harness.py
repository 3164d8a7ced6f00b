"""The likelihoods are those of a full forward pass in numpy, prompt by prompt."""

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest

from tests import oracle, tiny
from tests.trained import model
from yocou_jax.config import MeshConfig
from yocou_jax.data.tokenizer import train_bpe
from yocou_jax.errors import UserError
from yocou_jax.evaluation import harness, python_docs
from yocou_jax.evaluation.options import Options
from yocou_jax.inference import generate, prepare
from yocou_jax.pretrained import Pretrained
from yocou_jax.sharding import make_mesh

WORDS = train_bpe(["hello world, hello worlds"] * 9, 270)
LONG = "hello world, " * 20  # the window is 4, and sequences in training have 16 tokens


@pytest.fixture(scope="module")
def one():
    config = tiny.config(vocab_size=WORDS.vocab_size)
    return Pretrained(tiny.params(config.model), config.model, config.compute, WORDS, 7)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        yield mesh


def by_oracle(one, ids, count):
    """log p of the last `count` ids, and whether each of them is the most likely one."""
    params = oracle.to_float64(one.params)
    logits, _ = oracle.logits(params, one.config, np.array([ids[:-1]]))
    logps = (logits - oracle.logsumexp(logits)[..., None])[0, -count:]
    return logps[np.arange(count), ids[-count:]].sum(), list(logps.argmax(-1)) == ids[-count:]


def test_a_token_has_letters_of_both_texts():
    """For test_likelihoods: "hello" is one token, and "hel" is not its beginning."""
    assert WORDS.decode(WORDS.encode("hello world")[:1]) == "hello"
    assert WORDS.encode("hello world")[: len(WORDS.encode("hel"))] != WORDS.encode("hel")


# Context, continuation, and the texts that are encoded alone: those before, and the continuation.
PROMPTS = [
    ("hello", " world", ["hello"], " world"),
    ("hello ", "world", ["hello"], " world"),
    ("", "hello world", [], "hello world"),
    (LONG + "hello", " worlds", [LONG + "hello"], " worlds"),
    ("hel", "lo world", ["hel"], "lo world"),
]


@pytest.mark.parametrize("end_of_text", [True, False])
def test_likelihoods(one, mesh, end_of_text):
    scorer = harness.Scorer(one, mesh, end_of_text)
    got = scorer.loglikelihood([(context, ending) for context, ending, *_ in PROMPTS])
    for (logp, greedy), (_, _, before, ending) in zip(got, PROMPTS, strict=True):
        first = [WORDS.eot_id] if end_of_text or not before else []
        counted = WORDS.encode(ending)
        ids = [*first, *(i for text in before for i in WORDS.encode(text)), *counted]
        expected, best = by_oracle(one, ids, len(counted))
        assert logp == pytest.approx(expected, rel=1e-4)
        assert greedy == best
    assert scorer.longest == len(WORDS.encode(LONG + "hello worlds")) + end_of_text
    assert scorer.longest > 16


def test_a_greedy_continuation_and_one_that_is_not(one, mesh):
    ids = WORDS.encode("hello world")
    params = oracle.to_float64(one.params)
    logits, _ = oracle.logits(params, one.config, np.array([ids]))
    best = int(logits[0, -1].argmax())
    other = (best + 1) % WORDS.vocab_size
    scorer = harness.Scorer(one, mesh)
    found = scorer._likelihoods([([*ids, best], 1), ([*ids, other], 1), ([*ids, other, best], 2)])
    assert [greedy for _, greedy in found] == [True, False, False]
    # The first token is the likeliest one, and the second is not.
    logits, _ = oracle.logits(params, one.config, np.array([[*ids, best]]))
    worst = int(logits[0, -1].argmin())
    assert scorer._likelihoods([([*ids, best, worst], 2)])[0][1] is False


def test_a_context_is_run_once_for_all_its_continuations(one, mesh, monkeypatch):
    """Also if the continuations come in another order, have different lengths, or need more than
    one batch. The first two contexts have one token in common."""
    endings = [" worlds", ",", "lo", " hello world, hello", ""]
    pairs = [(context, ending) for ending in endings for context in ("hello,", "hello", LONG, "")]
    scorer = harness.Scorer(one, mesh)
    together = scorer.loglikelihood(pairs)
    assert scorer.prefilled == 4
    monkeypatch.setattr("yocou_jax.evaluation.perplexity.TOKENS_AT_ONCE", 2 * len(LONG))
    small = scorer.loglikelihood(pairs)
    for pair, (logp, greedy), other in zip(pairs, together, small, strict=True):
        ids, count = harness.split(WORDS, *pair, True)
        expected, best = by_oracle(one, ids, count) if count else (0.0, True)
        assert logp == pytest.approx(expected, rel=1e-4)
        assert other[0] == pytest.approx(expected, rel=1e-4)
        assert greedy == other[1] == best


def test_texts_as_a_whole(one, mesh):
    (got, empty) = harness.Scorer(one, mesh, False).loglikelihood_rolling([LONG, ""])
    ids = WORDS.encode(LONG)
    assert got == pytest.approx(by_oracle(one, [WORDS.eot_id, *ids], len(ids))[0], rel=1e-4)
    assert empty == 0


@pytest.mark.slow
def test_generated_texts(one, mesh):
    """They are those of `generate`, up to the first stop text."""
    out = generate(
        prepare(one.params, one.config, one.compute),
        [[WORDS.eot_id, *WORDS.encode("hello")], [WORDS.eot_id]],
        max_new_tokens=12,
        stop_tokens=[WORDS.eot_id],
        on_tokens=lambda _: None,
    )
    texts = [WORDS.decode(row[row >= 0]) for row in out.tokens]
    stop = texts[0][2:4]
    requests = [
        ("hello", {"until": ["never", stop], "max_gen_toks": 12, "do_sample": False}),
        ("", {"until": "never", "max_gen_toks": 12, "temperature": 0.0}),
    ]
    scorer = harness.Scorer(one, mesh)
    assert scorer.generate_until(requests) == [texts[0][: texts[0].index(stop)], texts[1]]
    with pytest.raises(UserError, match="The task asks for 'num_beams', but"):
        scorer.generate_until([("", {"num_beams": 3})])


def test_settings_of_a_task_reach_the_sampler(one, mesh, monkeypatch):
    asked = []

    def generate(*args, sampling, **options):
        asked.append(sampling)
        raise UserError("stop")

    monkeypatch.setattr(harness, "generate", generate)
    settings = {"until": [], "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.25}
    with pytest.raises(UserError, match="stop"):
        harness.Scorer(one, mesh).generate_until([("hello", settings | {"max_gen_toks": 3})])
    (sampling,) = asked
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 5, 0.25)


def test_the_package_is_needed(one, mesh, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"needs the package lm_eval .*pip install lm_eval"):
        harness.run(one, mesh, Options(tmp_path))


def test_the_report(one, mesh, tmp_path, monkeypatch):
    """With a package that asks for one likelihood, and says what it was given."""
    package, given = types.ModuleType("lm_eval"), {}

    def simple_evaluate(model, tasks, **options):
        given.update(options, tasks=tasks)
        request = types.SimpleNamespace(args=("hello", " world"))
        ((logp, _),) = model.loglikelihood([request])
        metrics = {"acc,none": logp, "acc_stderr,none": "N/A", "alias": "x"}
        return {"results": {"x": metrics}, "n-shot": {"x": 2}, "versions": {}, "configs": {}}

    package.simple_evaluate, package.__version__ = simple_evaluate, "0"
    api, inner = types.ModuleType("lm_eval.api"), types.ModuleType("lm_eval.api.model")
    inner.LM, tasks = object, types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = lambda: types.SimpleNamespace(all_tasks=["x"])
    for module in (package, api, inner, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    options = Options(tmp_path, loops=(2,), samples=5, few_shot=2, harness=("python_docs", "x"))
    report = harness.run(one, mesh, options)
    two = dataclasses.replace(one, config=dataclasses.replace(one.config, num_loops=2))
    expected, _ = by_oracle(two, [WORDS.eot_id, *WORDS.encode("hello world")], 1)
    (row,) = report["tables"]["lm-evaluation-harness"]
    assert (row["task"], row["metric"]) == ("x", "acc")
    assert row["value"] == report["scalars"]["x/acc"] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(row["stderr"])
    facts = ("loops", "end_of_text_prefix", "few_shot", "template", "longest")
    assert [report[name] for name in facts] == [[2], True, {"x": 2}, None, 3]
    assert (given["limit"], given["num_fewshot"]) == (5, 2)
    assert (given["tasks"][0]["task"], given["tasks"][1]) == ("python_docs", "x")
    with pytest.raises(UserError, match=r"lm_eval has no task of the name y, z\."):
        harness.run(one, mesh, Options(tmp_path, harness=("z", "x", "y")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of other packages
def test_the_real_package(one, mesh, tmp_path):
    """Its accuracy is the share of questions whose answer is the likeliest continuation."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    report = harness.run(one, mesh, Options(tmp_path, samples=6, harness=("python_docs",)))
    asked = python_docs.questions(seed=0)[:6]
    pairs = [(question["question"], end) for question in asked for end in question["choices"]]
    found = harness.Scorer(one, mesh).loglikelihood(pairs)
    best = np.array([logp for logp, _ in found]).reshape(6, 4).argmax(1)
    expected = np.mean(best == [question["answer"] for question in asked])
    assert report["scalars"]["python_docs/acc"] == pytest.approx(expected)
    assert report["tables"]["lm-evaluation-harness"][0]["stderr"] > 0 or expected in (0, 1)


def test_questions_about_the_documentation():
    lines, asked = python_docs.described(), python_docs.questions(seed=0)
    assert len(asked) == len(lines) > 100
    for question in asked:
        code = question["question"].partition("\n")[0]
        assert question["choices"][question["answer"]] == lines[code]
        assert len(set(question["choices"])) == 4
    answers = np.bincount([question["answer"] for question in asked], minlength=4)
    assert answers.min() > len(asked) / 8  # no position is much more often right than others
    assert python_docs.questions(seed=0) == asked != python_docs.questions(seed=1)


def test_another_tokenizer_of_the_tests(mesh):
    """Bytes: every text is a prefix of its tokens."""
    assert harness.split(model().tokenizer, "a b ", "c", True) == ([256, *b"a b c"], 2)
