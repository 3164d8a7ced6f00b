"""The command as a user types it: the texts that it writes, a sentence for each mistake."""

import dataclasses
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from experiments import generate as command
from experiments.writer import note_loops
from tests.trained import model, workdir
from yocou_jax import inference
from yocou_jax.checkpoint import Checkpointer
from yocou_jax.errors import UserError
from yocou_jax.inference import Sampling, generate, generation, prepare
from yocou_jax.model import resolve_compute
from yocou_jax.pretrained import export
from yocou_jax.training.step import TrainState

ROOT = Path(__file__).parent.parent.parent


def run(*flags, typed="", code=0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.generate", *map(str, flags)]
    result = subprocess.run(
        command, cwd=ROOT, input=typed, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == code, result.stderr
    return result


def here(*given) -> None:
    """Runs the command in this process, which is much faster."""
    with flagsaver.flagsaver():
        absl_flags.FLAGS(["generate", *map(str, given)])
        command.main([])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model in both kinds of folders."""
    path, one = tmp_path_factory.mktemp("trained"), model(step=3)
    export(path / "exported", one)
    return one, workdir(path / "run", one, 3), path / "exported"


def texts(one, prompts, count, **options):
    """The texts that the library generates. options: those of `generate`."""
    ids = [[one.tokenizer.eot_id, *one.tokenizer.encode(text)] for text in prompts]
    stop = [one.tokenizer.eot_id]
    run = prepare(one.params, one.config, one.compute)
    out = generate(run, ids, max_new_tokens=count, stop_tokens=stop, **options)
    return [one.tokenizer.decode(row[row >= 0]) for row in out.tokens]


@pytest.mark.slow
def test_a_workdir_and_an_exported_folder_generate_the_same_text(trained):
    one, source, exported = trained
    (expected,) = texts(one, ["ab"], 12, sampling=Sampling(1.0, top_k=50), seeds=4)
    options = ["--prompt=ab", "--max_new_tokens=12", "--temperature=1", "--top_k=50", "--seed=4"]
    for folder in (source, exported):
        result = run(f"--workdir={folder}", *options)
        assert result.stdout == f"ab{expected}\n"
        about, speed = result.stderr.splitlines()
        assert about == f"{folder}: window*2@3 | cross*2, step 3"
        for part in ("prefill 3 tokens in", "tokens/s); decode ", "KV cache", "compiled in"):
            assert part in speed


@pytest.mark.slow
def test_many_prompts_samples_files_and_another_loop_count(trained, tmp_path):
    one, source, _ = trained
    (tmp_path / "prompt.txt").write_text("from a file")
    flags = ["--prompt=x", f"--prompt_file={tmp_path}/prompt.txt", "--num_samples=2"]
    result = run(f"--workdir={source}", *flags, "--max_new_tokens=9", "--num_loops=2")
    two_loops = dataclasses.replace(one, config=dataclasses.replace(one.config, num_loops=2))
    prompts = ["x", "from a file"]
    written = texts(two_loops, prompts, 9, num_samples=2, sampling=Sampling(0.8))
    pieces = [
        f"--- prompt {i}, sample {j} ---\n{prompt}{written[2 * i + j]}\n"
        for i, prompt in enumerate(prompts)
        for j in range(2)
    ]
    assert len(result.stdout) == sum(map(len, pieces))  # texts may end in any order
    assert all(piece in result.stdout for piece in pieces)
    assert "window*2@2 | cross*2" in result.stderr


@pytest.mark.slow
def test_a_dialogue_compiles_once(trained):
    _, source, _ = trained
    flags = ["--interactive", "--max_new_tokens=4", "--temperature=0"]
    result = run(f"--workdir={source}", *flags, typed="ab\n\nab\n")
    first, second = result.stdout.removeprefix("> ab").split("> > ab")
    assert second.startswith(first.rstrip("\n"))
    about, one, two = result.stderr.splitlines()
    assert "step 3" in about
    assert "compiled in" in one
    assert "compiled in" not in two


@pytest.mark.slow
def test_a_closed_pipe_ends_the_command(trained):
    command = [sys.executable, "-m", "experiments.generate", f"--workdir={trained[1]}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--prompt=a"], cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(timeout=120) == 141


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt=a"], "The flag --workdir is missing."),
        (["--workdir=nowhere", "--prompt=a"], "The path nowhere does not exist."),
        (
            ["--workdir=x"],
            "Give --prompt or --prompt_file (or several of them), or --interactive.",
        ),
        (["--workdir=x", "--prompt=", "--step=-1"], "The value of '--step=-1' is not possible"),
        (
            ["--workdir=x", "--prompt_file=missing.txt"],
            "The prompt file missing.txt cannot be read: No such file or directory.",
        ),
        (["--workdir=x", "--prompt=\udcff"], "Prompt 0 is not UTF-8 text."),
        (["--workdir=x", "--prompt=a", "--tensor=0"], "The value of '--tensor=0' is not possible"),
        (["--workdir=x", "--prompt=a", "--temperature=-1"], "sampling.temperature=-1.0 must be"),
    ],
)
def test_mistakes_give_sentences(flags, sentence):
    result = run(*flags, code=2)
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


# --- The end of a row -----------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_that_the_host_ends_are_no_longer_computed():
    one = model()
    run, prompts = prepare(one.params, one.config, one.compute), [[1, 2], [3]]
    options = {"max_new_tokens": 12, "block": 3, "sampling": Sampling(1.0)}
    whole = generate(run, prompts, on_tokens=lambda _: None, **options)
    compiled = generation._generate_block._cache_size()
    calls = []

    def first_row_ends(tokens):
        calls.append(tokens)
        return [True, False] if len(calls) == 2 else None

    out = generate(run, prompts, on_tokens=first_row_ends, **options)
    assert out.lengths.tolist() == [6, 12]
    np.testing.assert_array_equal(out.tokens[0, 6:], -1)
    np.testing.assert_array_equal(out.tokens[0, :6], whole.tokens[0, :6])
    np.testing.assert_array_equal(out.tokens[1], whole.tokens[1])
    assert generation._generate_block._cache_size() == compiled
    out = generate(run, prompts, on_tokens=lambda _: np.array([True, True]), **options)
    assert out.tokens.shape == (2, 3)


@pytest.mark.slow
def test_stop_texts_of_the_command(trained, capsys):
    one, _, exported = trained
    prompts = ["ab", "c"]
    first, second = texts(one, prompts, 24, sampling=Sampling(1.0), seeds=4)
    stop = first[2:4]
    options = [f"--workdir={exported}", "--max_new_tokens=24", "--temperature=1", "--seed=4"]
    here(*options, "--prompt=ab", f"--stop={stop}", "--stop=never")
    out, err = capsys.readouterr()
    assert out == f"ab{first[: first.index(stop)]}\n"
    assert "decode 8 tokens" in err  # one block, and not all 24 tokens
    here(*options, "--prompt=ab", "--prompt=c", f"--stop={stop}")
    out = capsys.readouterr().out
    for i, text in enumerate((first, second)):
        cut = text.index(stop) if stop in text else None
        assert f"--- prompt {i} ---\n{prompts[i]}{text[:cut]}\n" in out


# --- The prompt and the step of the model ---------------------------------------------------------


def test_an_empty_prompt_starts_a_new_text(trained, capsys):
    one, _, exported = trained
    (expected,) = texts(one, [""], 6)
    here(f"--workdir={exported}", "--prompt=", "--max_new_tokens=6", "--temperature=0")
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize("stdin", [False, True])
def test_a_prompt_file_is_read_as_training_reads_text(tmp_path, monkeypatch, stdin):
    """Line ends stay. One byte-order mark is removed."""
    data = "\ufeff\ufeffé\r\nb\rc\n".encode()
    (tmp_path / "p.txt").write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with flagsaver.flagsaver():
        absl_flags.FLAGS(
            ["generate", "--workdir=x", f"--prompt_file={'-' if stdin else '~/p.txt'}"]
        )
        assert command.prompts() == ["\ufeffé\r\nb\rc\n"]


def test_a_step_other_than_the_newest(tmp_path, capsys):
    old, new = model(step=1), model(seed=1, step=2)
    path = workdir(tmp_path / "run", old, 1)
    with Checkpointer(path / "checkpoints") as checkpointer:
        params = jax.tree.map(jnp.asarray, new.params)
        checkpointer.save(2, TrainState(jnp.int32(2), params, params))
    options = [f"--workdir={path}", "--prompt=a", "--max_new_tokens=5", "--temperature=0"]
    for one, given in ((old, ["--step=1"]), (new, ["--step=2"]), (new, [])):
        here(*options, *given)
        assert capsys.readouterr().out == f"a{texts(one, ['a'], 5)[0]}\n"
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*; the steps there: 1, 2\.$"):
        here(*options, "--step=3")


# --- Terminals ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminal_that_lacks_a_character_gets_its_escape(trained):
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
    flags = ["--workdir", trained[2], "--prompt=日é", "--prompt=\u0085", "--max_new_tokens=9"]
    result = subprocess.run(
        [sys.executable, "-m", "experiments.generate", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert b"\\u65e5\xe9" in result.stdout


# --- Mistyped flags -------------------------------------------------------------------------------

VALUES = {
    "prompt": ["", "a", "\udcff", "\0"],
    "prompt_file": ["", "/", "missing", "~", "~no-such-user/x", "/dev/null", "x" * 5000],
    "stop": ["", "a", "\n", "\udcff"],
    "step": ["-1", "0", "3", "99", "x", "1.5", str(10**20)],
    "max_new_tokens": ["0", "-1", "2", str(10**12), "x", "1e3", "nan"],
    "num_samples": ["0", "2", "-3", str(10**12), "x"],
    "temperature": ["nan", "inf", "-inf", "-1", "1e999", "1e-50", "0", "x", ""],
    "top_k": ["-1", "0", "1", str(10**12), str(10**30), "x", "1.5"],
    "top_p": ["nan", "0", "-1", "1.5", "1e-300", "inf", "x"],
    "min_p": ["nan", "-1", "1", "0.99", "inf", "x"],
    "repetition_penalty": ["nan", "0", "-1", "inf", "1e300", "1e-300", "x"],
    "seed": ["-1", str(2**31), str(2**32), str(10**20), "x", "nan"],
    "num_loops": ["0", "-1", "x", "1.5", "none"],
    "attention": ["", "x", "pallas_tpu", "cudnn", "auto", "reference"],
    "chunk": ["0", "-1", "7", str(10**12), "x"],
    "tensor": ["0", "-1", "3", "1000", str(10**12), "x"],
    "context": ["0", "-1", "3", "1000", str(10**12), "x"],
    "workdir": ["", "/", "~no-such-user", "missing", "x\udcff"],
    "interactive": ["true", "maybe"],
}


WORKED = [  # these are not mistakes
    *("prompt=", "prompt=a", "prompt=\0", "prompt_file=/dev/null", "stop=a", "stop=\n", "step=3"),
    *("max_new_tokens=2", "num_samples=2", "temperature=1e-50", "temperature=0"),
    *("top_k=0", "top_k=1", f"top_k={10**12}", "min_p=0.99", f"seed={2**31}"),
    *("attention=auto", "attention=reference", "chunk=7", "tensor=3", "context=3"),
]


def mistyped(folder, seed) -> list[str]:
    rng = random.Random(seed)
    names = rng.sample(sorted(VALUES), rng.randint(1, 3))
    return [
        f"--workdir={folder}",
        "--prompt=a",
        "--max_new_tokens=2",
        *(f"--{name}={rng.choice(VALUES[name])}" for name in names),
    ]


class Reached(Exception):
    """All checks have passed, and the model would run now."""


@pytest.fixture
def no_model(monkeypatch, typed):
    def reached(*_, **__):
        raise Reached

    typed(b"a")

    def prepare(params, config, compute):  # nothing is compiled
        return inference.PreparedModel(params, config, resolve_compute(compute))

    monkeypatch.setattr(inference, "prepare", prepare)
    monkeypatch.setattr(generation, "run_prefill", reached)


def answer(given) -> str:
    """The sentence at the end of a command, or "" if the model would run."""
    try:
        here(*given)
    except Reached:
        return ""
    except UserError as error:
        return str(error)
    except absl_flags.Error as error:  # `cli` turns it into a sentence
        return f"{error}."
    return ""


def test_every_wrong_value_gives_a_sentence(trained, no_model):
    given = [f"--workdir={trained[2]}", "--prompt=a", "--max_new_tokens=2"]
    worked = []
    for name, values in VALUES.items():
        for value in values:
            sentence = answer([*given, f"--{name}={value}"])
            assert sentence == "" or sentence.endswith(".")
            if sentence == "":
                worked.append(f"{name}={value}")
    assert worked == WORKED


def test_several_mistyped_flags_give_no_stack_trace(trained, no_model):
    for seed in range(150):
        sentence = answer(mistyped(trained[2], seed))
        assert sentence == "" or sentence.endswith(".")


def test_another_loop_count_than_the_trained_one_gives_a_notice(trained, no_model, capsys):
    def told(*given):
        assert answer([f"--workdir={trained[2]}", "--prompt=a", *given]) == ""
        return [x for x in capsys.readouterr().err.splitlines() if x.startswith("trained with")]

    for loops in (5, 1):
        assert told(f"--num_loops={loops}") == [
            f"trained with 3 loops, now running with {loops}: the model was not trained "
            "for this number, so its text may be worse"
        ]
    assert told("--num_loops=3") == told() == []
    several = model(num_loops="1,3").config
    note_loops(several, 1)
    assert capsys.readouterr().err == ""
    note_loops(several, 2)
    assert capsys.readouterr().err.startswith("trained with 1,3 loops, now running with 2: ")
