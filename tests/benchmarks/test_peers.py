"""What is compared with a peer, how the two take turns, and that both compute the same.

The last part needs PyTorch and transformers: here, or in the environment whose Python the variable
YOCOU_PEER names.
"""

import ast
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import inference as profile
from benchmarks.peers import inference, process, turns, weights
from benchmarks.peers import training as peers
from benchmarks.peers.process import CHILD, Peer
from experiments import peer as peer_flag
from tests import tiny
from yocou_jax import accounting
from yocou_jax.errors import UserError

PYTHON = os.environ.get("YOCOU_PEER", sys.executable)


def script(folder, text) -> str:
    """An executable file that stands for the Python of some environment."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_package_is_one_sentence(tmp_path):
    bare = script(tmp_path, f'exec {sys.executable} -I -S "$@"')  # without site-packages
    with pytest.raises(UserError, match=r"--peer needs torch, .*\(pip install torch numpy\)"):
        Peer(bare, ("torch", "numpy"), threads=1)
    with pytest.raises(UserError, match=r"--peer=/no/python cannot be run: No such file"):
        Peer("/no/python", ("torch",), threads=1)


def test_an_error_of_the_other_side_is_shown(tmp_path):
    echo = 'import json, sys\nprint("noise", file=sys.stderr)\n'
    fails = script(tmp_path, f"exec {sys.executable} -c '{echo}sys.exit(3)'")
    with pytest.raises(RuntimeError, match=r"has ended: exit code 3\. Its last words: noise"):
        Peer(fails, (), threads=1)
    packages, words = ("json",), r"(?s)use failed .*KeyError: 'nobody'"
    with Peer(sys.executable, packages, 1) as peer, pytest.raises(RuntimeError, match=words):
        peer.ask("use", name="nobody", method="step")


def test_a_peer_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "LIMIT_S", 0.5)
    hangs = script(tmp_path, "exec sleep 99")
    with pytest.raises(RuntimeError, match=r"has ended: no answer to start in 0\.5 s"):
        Peer(hangs, (), threads=1)


@pytest.mark.parametrize("name", ["child", "torch_twin", "llama"])
def test_the_other_side_imports_nothing_of_this_repository(name):
    tree = ast.parse(CHILD.with_name(f"{name}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    assert found - sys.stdlib_module_names <= {"torch", "numpy", "transformers"}


def test_the_two_sides_take_turns(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE_S", 0)
    ran = []

    def timed(name, seconds):
        return lambda: ran.append(name) or seconds

    pair = timed("ours", 2.0), timed("theirs", 4.0)
    assert [turns.take(pair, number) for number in range(3)] == [(2.0, 4.0)] * 3
    assert ran == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_the_ratio_is_that_of_pairs_and_not_of_medians():
    pairs = [(1.0, 1.0), (2.0, 1.0), (12.0, 4.0), (4.0, 1.0), (50.0, 10.0)]
    found = turns.summary(pairs)
    assert (found["ours_s"], found["theirs_s"], found["pairs"]) == (4.0, 1.0, 5)
    assert (found["time_ratio"], found["time_ratio_quartiles"]) == (3.0, [2.0, 4.0])
    assert turns.cells(found) == ["4,000", "1,000", "3.00", "2.00 to 4.00", "0.33x", "5"]


def test_other_values_are_another_model():
    assert turns.close([1.0, 100.0], [1.0, 100.001], "losses", 1e-4) == pytest.approx(1e-5)
    for theirs in ([1.0, 101.0], [1.0, float("nan")]):
        with pytest.raises(RuntimeError, match="is not the same model: losses differ by"):
            turns.close([1.0, 100.0], theirs, "losses", 1e-4)


def test_the_twin_has_the_stages_of_the_program():
    config = tiny.config("window*2@3 | full*1 | cross*2@2", num_loops=None)
    kind = {"window": None, "reads_global": False, "layers": 2, "loops": 1}
    assert weights.twin_sizes(config)["stages"] == [
        kind | {"window": tiny.MODEL["window"], "loops": 3},
        kind | {"layers": 1},
        kind | {"reads_global": True, "loops": 2},
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (tiny.MOE, r"experts \(model.num_experts\)"),
        ({"architecture": "parscale"}, "parallel streams"),
        ({"data": {"packing": True}}, "packed documents"),
        ({"optimizer": {"z_loss": 0.1}}, "z-loss"),
        ({"optimizer": {"accumulation_steps": 2}}, "microbatches"),
    ],
)
def test_what_the_twin_does_not_have_is_refused(changes, words):
    config = tiny.config(**changes)
    with pytest.raises(UserError, match=f"because the PyTorch twin has no {words}"):
        weights.twin_sizes(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "window*1@2 | full*1 | cross*2", "qk_norm": True},
        {"architecture": "transformer", "tie_embeddings": True},
    ],
)
def test_every_parameter_is_copied(changes):
    config = tiny.model(**changes)
    arrays = weights.twin_arrays(tiny.params(config), config)
    assert sum(x.size for x in arrays.values()) == accounting.parameters(config).total
    if not config.qk_norm:
        untied = dataclasses.replace(config, tie_embeddings=False)
        arrays = weights.llama_arrays(tiny.params(config), config)
        assert sum(x.size for x in arrays.values()) == accounting.parameters(untied).total


def test_the_flag_names_a_python():
    for word, value in (
        ([], None),
        (["--peer"], sys.executable),
        (["--peer=/env/bin/python"], "/env/bin/python"),
        (["--nopeer"], None),
    ):
        flag_values = peer_flag.flags.FlagValues()
        holder = peer_flag.flag("Compare.", flag_values)
        flag_values(["command", *word])
        assert holder.value == value


# --- With PyTorch ---------------------------------------------------------------------------------


def installed(package: str) -> bool:
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    return not subprocess.run([PYTHON, "-c", code], check=False).returncode


def needs(package: str):
    return pytest.mark.skipif(not installed(package), reason=f"{PYTHON} has no {package}.")


@pytest.fixture
def random_scales(monkeypatch):
    """Both sides begin with norm scales that are not 1."""
    usual = peers.Ours.__init__

    def begin(self, config):
        usual(self, config)
        self.state = tiny.fresh_state(self.setup, tiny.params(config.model))

    monkeypatch.setattr(peers.Ours, "__init__", begin)


@needs("torch")
@pytest.mark.slow
@pytest.mark.usefixtures("random_scales")
@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "yoco_u", "qk_norm": True, "tie_embeddings": True},
        {"architecture": "window*1@2 | cross*2@2", "cross_rope": True, "qk_norm": True},
        {"architecture": "rins"},
    ],
)
def test_the_twin_trains_as_our_model_does(changes):
    """`Pair` compares the losses, before updates and after."""
    config = tiny.config(**changes, optimizer=peers.ADAMW)
    with Peer(PYTHON, ("torch", "numpy"), threads=1) as peer:
        pair = peers.Pair(peer, "tiny", config, compile=False)
        assert pair.difference < peers.LOSS_TOLERANCE
        times = turns.summary([pair.take(number) for number in range(3)])
        assert min(times["ours_s"], times["theirs_s"]) > 0


@needs("torch")
@pytest.mark.slow
@pytest.mark.usefixtures("random_scales")
@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"rope_theta": 5.0}, "losses differ"),
        ({"optimizer": {"learning_rate": 0.01}}, "losses after updates differ"),
    ],
)
def test_a_twin_that_is_another_model_is_refused(wrong, what, monkeypatch):
    config, usual = tiny.config(optimizer=peers.ADAMW), weights.twin_sizes

    def sizes(config, compile):
        made = usual(config, compile)
        return made | wrong | {"optimizer": made["optimizer"] | wrong.get("optimizer", {})}

    monkeypatch.setattr(weights, "twin_sizes", sizes)
    refused = pytest.raises(RuntimeError, match=f"not the same model: {what}")
    with Peer(PYTHON, ("torch", "numpy"), threads=1) as peer, refused:
        peers.Pair(peer, "tiny", config, compile=False)


@needs("transformers")
@pytest.mark.slow
def test_llama_has_the_logits_of_our_transformer():
    sizes = profile.CPU._replace(lengths=(8, 16), batch=2, chunk_tokens=8, steps=2)
    config = tiny.model("yoco_u", num_kv_heads=2, tie_embeddings=True)
    said = []
    report = inference.measure(config, sizes, tiny.compute(), 2, 1000, PYTHON, said.append)
    report = json.loads(json.dumps(report, allow_nan=False))
    assert report["logits_difference"] < inference.LOGITS_TOLERANCE
    assert [(r["kind"], r["length"], r["batch"], r["pairs"]) for r in report["rows"]] == [
        *(("prefill", 8, 1, 2), ("decode", 8, 2, 2)),
        *(("prefill", 16, 1, 2), ("decode", 16, 2, 2)),
    ]
    for row in report["rows"]:
        tokens = row["length"] if row["kind"] == "prefill" else 2 * 2
        assert np.isclose(row["tokens_per_s"] * row["ours_s"], tokens)
    assert len(said) == 2
