"""The command as a user types it: texts as they come, and what a mistake is answered with."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.generate import Printer
from tests.test_pretrained import model, workdir
from yocou_jax.data.tokenizer import load_tokenizer
from yocou_jax.inference import Sampling, generate, prepare
from yocou_jax.pretrained import export

ROOT = Path(__file__).parent.parent.parent


def run(*flags, typed="", code=0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.generate", *map(str, flags)]
    result = subprocess.run(
        command, cwd=ROOT, input=typed, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model in both kinds of folder."""
    path, one = tmp_path_factory.mktemp("trained"), model(step=3)
    export(path / "exported", one)
    return one, workdir(path / "run", one, 3), path / "exported"


def texts(one, prompts, count, **options):
    """What the library says, the options of `generate` given."""
    ids = [[one.tokenizer.eot_id, *one.tokenizer.encode(text)] for text in prompts]
    stop = [one.tokenizer.eot_id]
    run = prepare(one.params, one.config)
    out = generate(run, ids, max_new_tokens=count, stop_tokens=stop, **options)
    return [one.tokenizer.decode(row[row >= 0]) for row in out.tokens]


def test_a_workdir_and_an_exported_folder_say_the_same(trained):
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
    assert len(result.stdout) == sum(map(len, pieces))  # in whatever order they ended
    assert all(piece in result.stdout for piece in pieces)
    assert "window*2@2 | cross*2" in result.stderr


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


def test_a_reader_who_has_had_enough(trained):
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
            "Give --prompt or --prompt_file (several are fine), or --interactive.",
        ),
        (["--workdir=x", "--prompt="], "Prompt 0 is empty; it needs at least one character."),
        (
            ["--workdir=x", "--prompt_file=missing.txt"],
            "The prompt file missing.txt cannot be read: No such file or directory.",
        ),
        (["--workdir=x", "--prompt=\udcff"], "Prompt 0 is not UTF-8 text."),
        (["--workdir=x", "--prompt=a", "--tensor=0"], "The value of --tensor=0 is not possible"),
        (["--workdir=x", "--prompt=a", "--temperature=-1"], "sampling.temperature=-1.0 must be"),
    ],
)
def test_mistakes_are_sentences(flags, sentence):
    result = run(*flags, code=2)
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


# --- Text as it comes -----------------------------------------------------------------------------


def blocks(*rows, steps):
    """Rows of ids as blocks of `steps` columns, with -1 behind the end of each."""
    width = -(-max(map(len, rows)) // steps) * steps
    tokens = np.array([list(row) + [-1] * (width - len(row)) for row in rows])
    return np.split(tokens, width // steps, axis=1)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_character_is_shown_when_all_of_its_bytes_are_there(capsys, steps):
    text = "é日🙂!"
    printer = Printer(load_tokenizer("bytes"), [">"], 1, limit=len(text.encode()))
    shown = []
    for block in blocks(text.encode(), steps=steps):
        printer(block)
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == f">{text}\n"
    assert "\ufffd" not in "".join(shown)


def test_half_a_character_at_the_end_is_shown_as_such(capsys):
    printer = Printer(load_tokenizer("bytes"), [">"], 1, limit=3)
    for block in blocks("ab🙂".encode()[:3], steps=2):
        printer(block)
    assert capsys.readouterr().out == ">ab\ufffd\n"


def test_a_row_of_several_is_shown_when_it_ends(capsys):
    tokenizer = load_tokenizer("bytes")
    printer = Printer(tokenizer, ["1", "2"], 1, limit=6)
    first, second, third = blocks(b"abcdef", [*b"xy", tokenizer.eot_id], steps=2)
    printer(first)
    assert capsys.readouterr().out == ""
    printer(second)
    assert capsys.readouterr().out == "--- prompt 1 ---\n2xy\n"
    printer(third)
    assert capsys.readouterr().out == "--- prompt 0 ---\n1abcdef\n"
