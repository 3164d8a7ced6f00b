"""Two kinds of folders give the same model, bit for bit. Everything else gives a sentence."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.trained import BYTES, assert_same, model, workdir
from yocou_jax import pretrained
from yocou_jax.checkpoint import Checkpointer, params_sha256
from yocou_jax.config import MeshConfig
from yocou_jax.data.tokenizer import Tokenizer, train_bpe
from yocou_jax.errors import UserError
from yocou_jax.model import logits
from yocou_jax.pretrained import export, load
from yocou_jax.sharding import make_mesh
from yocou_jax.training.step import TrainState

ROOT = Path(__file__).parent.parent
FILES = ["config.json", "model.safetensors", "tokenizer.json"]
MODELS = {
    "yoco_u": {},
    "yoco": {"tie_embeddings": True, "qk_norm": True},
    "rins": {"num_loops": "1,2"},
    "transformer": tiny.MOE,
    "parscale": {"prefix_length": 5},
    "window*1@2 | full*1 | cross*2": {},
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- What is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", MODELS)
def test_an_export_has_the_model_and_a_second_export_the_same_bytes(tmp_path, architecture):
    one = model(architecture, **MODELS[architecture])
    export(tmp_path / "a", one)
    again = load(tmp_path / "a")
    assert_same(one, again)
    export(tmp_path / "b", again)
    assert list(contents(tmp_path / "a")) == FILES
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("architecture", MODELS)
def test_a_workdir_gives_its_newest_checkpoint(tmp_path, architecture):
    one = model(architecture, step=2, **MODELS[architecture])
    found = load(workdir(tmp_path, one, 1, 2))
    assert_same(one, found)
    export(tmp_path / "exported", found)
    assert_same(one, load(tmp_path / "exported"))


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path):
    one = model(step=1)
    path = workdir(tmp_path, one, 1, 2)
    (path / "checkpoints/2/inventory.json").write_text("{")
    assert_same(one, load(path))


def test_a_loaded_model_runs(tmp_path):
    one = model("parscale", tie_embeddings=True)
    export(tmp_path / "a", one)
    found, tokens = load(tmp_path / "a"), tiny.tokens(2, 6)
    np.testing.assert_array_equal(
        *(logits(m.params, m.config, tokens, tiny.compute()) for m in (found, one))
    )


def test_loading_sets_the_attention_kernel_to_auto(tmp_path):
    one = model(attention="reference")  # not "auto"; kernels for a TPU cannot be traced here
    path = workdir(tmp_path / "run", one, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["config"]["compute"]["attention"] = "pallas_tpu"
    (path / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):
        loaded = load(path)
        assert loaded.config == one.config
        assert loaded.compute == dataclasses.replace(one.compute, attention="auto")
        assert params_sha256(loaded.params) == params_sha256(one.params)
        path = tmp_path / "exported"
        if not path.exists():
            export(path, loaded)


# The fields of `compute` in files of the past, written down here because the code has newer ones.
COMPUTE_BEFORE_UNROLL = ("attention", "dtype", "remat", "scan")


def older(fields: dict, version: int) -> None:
    """Makes settings of version 3 before `compute.unroll`, or of version 2 without the group."""
    compute = fields.pop("compute")
    compute = {name: compute[name] for name in COMPUTE_BEFORE_UNROLL}
    fields["model" if version == 2 else "compute"] = (
        fields["model"] | compute if version == 2 else compute
    )


@pytest.mark.parametrize("version", [2, 3])
def test_files_of_older_versions_are_read(version, tmp_path):
    """Exported folders, and workdirs of the same age."""
    one = model(dtype="bfloat16", step=1)
    export(tmp_path / "exported", one)
    edit(
        tmp_path / "exported/config.json", lambda c: older(c, version) or c.update(version=version)
    )
    path = workdir(tmp_path / "run", one, 1)
    edit(path / "manifest.json", lambda m: older(m["config"], version))
    for folder in (tmp_path / "exported", path):
        loaded = load(folder)
        assert (loaded.config, loaded.compute) == (one.config, one.compute)
        assert params_sha256(loaded.params) == params_sha256(one.params)


def test_the_names_in_the_file_are_paths_and_the_config_is_readable(tmp_path):
    one = model(step=None)
    export(tmp_path / "a", one)
    arrays = load_file(tmp_path / "a/model.safetensors")
    scale = arrays["stage_1_cross.layers.attention_norm.scale"]
    np.testing.assert_array_equal(
        scale, one.params["stage_1_cross"]["layers"]["attention_norm"]["scale"]
    )
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (config["format"], config["version"], config["step"]) == ("yocou_jax", 3, None)
    assert config["program"] == "window*2@3 | cross*2"
    assert config["model"] == dataclasses.asdict(one.config)
    assert config["compute"] == dataclasses.asdict(one.compute)
    weights = (tmp_path / "a/model.safetensors").read_bytes()
    assert config["weights"] == hashlib.sha256(weights).hexdigest()
    assert config["tokenizer"] == one.tokenizer.fingerprint
    assert config["end_of_text"] == "<|endoftext|>"


def test_other_dtypes_are_kept_and_the_memory_layout_does_not_matter(tmp_path):
    one = model()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), one.params)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].astype(jnp.float16)
    params["embedding"] = np.asfortranarray(one.params["embedding"])
    mixed = dataclasses.replace(one, params=params)
    export(tmp_path / "a", mixed)
    found = load(tmp_path / "a")
    assert_same(mixed, found)
    assert found.params["final_norm"]["scale"].dtype == jnp.float16
    assert found.params["head"].dtype == jnp.bfloat16


def test_a_trained_tokenizer_is_kept(tmp_path):
    tokenizer = train_bpe(["def naïve():\n    return '日本 🙂'\n"] * 9, 280)
    one = dataclasses.replace(model(vocab_size=300), tokenizer=tokenizer)
    one = dataclasses.replace(one, params=tiny.params(one.config))
    export(tmp_path / "a", one)
    found = load(tmp_path / "a")
    assert_same(one, found)
    assert found.tokenizer.encode("return 日本") == tokenizer.encode("return 日本")
    export(tmp_path / "b", found)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("kind", ["workdir", "exported"])
def test_on_a_mesh_each_device_has_its_part(tmp_path, kind):
    one = model(step=1, **tiny.MOE)
    if kind == "workdir":
        workdir(tmp_path / kind, one, 1)
    else:
        export(tmp_path / kind, one)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found = load(tmp_path / kind, mesh)
    assert_same(one, found)
    D = one.config.d_model
    assert found.params["head"].addressable_shards[0].data.shape == (D // 2, BYTES.vocab_size // 2)
    export(tmp_path / "again", found)
    assert_same(one, load(tmp_path / "again"))
    alone = load(tmp_path / "again")
    assert {x.sharding for x in jax.tree.leaves(alone.params)} == {
        jax.sharding.SingleDeviceSharding(jax.devices()[0])
    }


def test_the_file_may_change_after_it_is_loaded(tmp_path):
    one = model()
    export(tmp_path / "a", one)
    found = load(tmp_path / "a")
    file = tmp_path / "a/model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert_same(one, found)


# --- How a folder is written ----------------------------------------------------------------------


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(UserError, match=rf"{name} exists and is not an empty folder: .*\.$"):
            export(tmp_path / name, model())
    export(tmp_path / "empty", model())
    export(tmp_path / "new/er/folder", model())
    assert (tmp_path / "full/notes").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full", "new"]
    assert_same(load(tmp_path / "empty"), load(tmp_path / "new/er/folder"))


def test_all_files_of_an_export_have_the_same_permissions(tmp_path):
    export(tmp_path / "a", model())
    assert len({(tmp_path / "a" / name).stat().st_mode for name in FILES}) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit()])
def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(arrays, file):
        Path(file).write_text("half")
        raise error

    monkeypatch.setattr(pretrained, "save_file", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else SystemExit) as raised:
        export(tmp_path / "a", model())
    assert list(tmp_path.iterdir()) == []
    if raised.type is UserError:
        assert str(raised.value) == (
            f"The export could not be written to {tmp_path}/a: No space left on device."
        )


def test_an_unwritable_folder_gives_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be written to .*/file/a: Not a directory\.$"):
        export(tmp_path / "file/a", model())


def run(code: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_killed_export_leaves_no_folder_of_its_name(tmp_path):
    code = """
        import os, signal, sys
        from tests.trained import model
        from yocou_jax.pretrained import export
        from yocou_jax import pretrained
        save = pretrained.save_file
        def save_and_die(arrays, file):
            save(arrays, file)
            os.kill(os.getpid(), signal.SIGKILL)
        pretrained.save_file = save_and_die
        export(sys.argv[1], model())
    """
    result = run(code, tmp_path / "a")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert [p.name[:3] for p in tmp_path.iterdir()] == [".a."]
    export(tmp_path / "a", model())
    assert_same(model(), load(tmp_path / "a"))


def test_a_full_disk_gives_a_sentence(tmp_path):
    """A limit on the size of files replaces the full disk: the writer in Rust fails there."""
    code = """
        import resource, signal, sys
        from tests.trained import model
        from yocou_jax.pretrained import export
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            export(sys.argv[1], model())
        except ValueError as error:
            print(error)
    """
    result = run(code, tmp_path / "a")
    assert result.stdout.startswith(f"The export could not be written to {tmp_path}/a: ")
    assert "File too large" in result.stdout, result.stdout
    assert result.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_another_config_are_not_exported(tmp_path):
    one, other = model(), model(d_ff=32)
    with pytest.raises(UserError, match=r"model to export has other arrays .*\(6 differ\): .*24"):
        export(tmp_path / "a", dataclasses.replace(one, config=other.config))
    params = {**one.params, "embedding": np.zeros((BYTES.vocab_size, 16), np.int32)}
    with pytest.raises(UserError, match=r"has embedding in int32; parameters are float32, bfloat"):
        export(tmp_path / "a", dataclasses.replace(one, params=params))
    assert list(tmp_path.iterdir()) == []


# --- Folders that cannot be read ------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load(path)
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "a"
    export(path, model())
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return workdir(tmp_path_factory.mktemp("trained") / "run", model(), 1)


@pytest.fixture
def folder(tmp_path, exported) -> Path:
    """An exported folder to damage."""
    return shutil.copytree(exported, tmp_path / "a")


@pytest.fixture
def run_folder(tmp_path, trained) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def edit(file: Path, change) -> None:
    value = json.loads(file.read_text())
    file.write_text(json.dumps(change(value) or value))


def test_a_path_that_is_neither_a_workdir_nor_an_export(tmp_path):
    assert refused(tmp_path / "no") == f"The path {tmp_path / 'no'} does not exist."
    neither = (
        " is neither a training workdir (it has no manifest.json) nor an exported folder (it has "
        "no config.json)."
    )
    assert refused(tmp_path) == f"{tmp_path}{neither}"
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file") == f"{tmp_path / 'file'}{neither}"


def test_a_workdir_without_a_finished_checkpoint(run_folder):
    expected = f"There is no checkpoint to read in {run_folder}/checkpoints."
    for name in ("inventory.json", "_CHECKPOINT_METADATA"):
        (run_folder / "checkpoints/1" / name).unlink()
    assert refused(run_folder) == expected
    shutil.rmtree(run_folder / "checkpoints")
    assert refused(run_folder) == expected


def test_a_folder_without_a_tokenizer(folder, run_folder):
    for path in (folder, run_folder):
        (path / "tokenizer.json").unlink()
        assert (
            refused(path) == f"The folder {path} has no tokenizer.json, which belongs to its model."
        )


def test_a_file_that_is_not_a_tokenizer_and_one_of_another_model(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json' is not a tokenizer.json: " in refused(folder)
    with pytest.raises(UserError, match=r"model.vocab_size=258: it is not the token"):
        dataclasses.replace(model(), tokenizer=train_bpe(["text"] * 9, 261))


@pytest.mark.parametrize("size", [258, 261])
def test_another_tokenizer_than_the_models_own_is_refused(folder, run_folder, size):
    """A tokenizer of the same size, where no other check fails, and a larger one."""
    other = train_bpe(["text"] * 9, size)
    for path, described in ((folder, "config.json"), (run_folder, "manifest.json")):
        (path / "tokenizer.json").write_text(other.to_json(), encoding="utf-8")
        assert refused(path) == (
            f"{path / 'tokenizer.json'} is not the tokenizer of this model: its fingerprint is "
            f"{other.fingerprint}, but {path / described} has {BYTES.fingerprint}. Put the "
            "tokenizer of the model there; with another one, the model writes garbage."
        )


def test_a_smaller_or_slightly_different_tokenizer_is_refused(tmp_path):
    texts = ["def naïve():\n    return '日本 🙂'\n"] * 9
    one = dataclasses.replace(model(vocab_size=300), tokenizer=train_bpe(texts, 300))
    export(tmp_path / "a", one)
    file, own = tmp_path / "a/tokenizer.json", one.tokenizer.to_json()
    swapped = json.loads(own)
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    fewer = train_bpe(texts, 280).to_json()
    for text in (fewer, json.dumps(swapped), own + " "):
        file.write_text(text, encoding="utf-8")
        assert "is not the tokenizer of this model" in refused(tmp_path / "a")
    file.write_text(own, encoding="utf-8")
    assert_same(one, load(tmp_path / "a"))


def test_an_old_manifest_that_names_no_tokenizer_is_read_with_a_warning(run_folder, caplog):
    edit(run_folder / "manifest.json", lambda m: m.pop("tokenizer") and None)
    assert_same(model(step=1), load(run_folder))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "yocou_jax.pretrained"]
    assert "does not say which tokenizer the model has" in line


@pytest.mark.parametrize("kind", ["workdir", "exported"])
def test_the_end_of_text_and_a_lossy_tokenizer_belong_to_the_model(tmp_path, kind):
    backend = tokenizers.Tokenizer.from_str(train_bpe(["text"] * 9, 260).to_json())
    backend.add_special_tokens(["<fin>"])
    backend.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer = Tokenizer.from_json(backend.to_str(), "t", "<fin>", allow_lossy=True)
    one = dataclasses.replace(model(vocab_size=300, step=1), tokenizer=tokenizer)
    path = tmp_path / kind
    described = path / ("config.json" if kind == "exported" else "manifest.json")
    if kind == "workdir":
        workdir(path, one, 1)
        edit(described, lambda m: m["config"]["data"].update(end_of_text="<fin>"))
    else:
        export(path, one)
    found = load(path)
    assert_same(one, found)
    assert found.tokenizer.end_of_text == "<fin>"
    assert found.tokenizer.loss
    end = {"end_of_text": "<|endoftext|>"}
    edit(described, lambda m: (m if kind == "exported" else m["config"]["data"]).update(end))
    assert "is not the tokenizer of this model" in refused(path)


# --- One step of several --------------------------------------------------------------------------


def test_a_step_can_be_chosen(tmp_path):
    path = workdir(tmp_path, model(step=1), 1)
    newer = model(seed=1, step=3)
    with Checkpointer(path / "checkpoints") as checkpointer:
        params = jax.tree.map(jnp.asarray, newer.params)
        checkpointer.save(3, TrainState(jnp.int32(3), params, params))
    assert_same(model(step=1), load(path, step=1))
    assert_same(newer, load(path, step=3))
    assert_same(newer, load(path))
    with pytest.raises(UserError, match=r"no checkpoint of step 2 in .*; the steps there: 1, 3\.$"):
        load(path, step=2)
    (path / "checkpoints/3/inventory.json").write_text("{")
    with pytest.raises(UserError, match=r"The checkpoint of step 3 in .* cannot be read: its inv"):
        load(path, step=3)
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(UserError, match=r"no checkpoint of step 0 in .*; the steps there: none\.$"):
        load(path, step=0)


def test_an_export_has_one_step(folder):
    assert load(folder, step=7).step == 7
    with pytest.raises(UserError, match=r"no step 0 in .*/a: an export has one, here 7\.$"):
        load(folder, step=0)


def test_a_path_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export("~/a", model())
    assert_same(model(), load("~/a"))
    assert refused("~no-such-user/a") == "The path ~no-such-user/a does not exist."


def test_a_file_that_is_not_a_manifest(run_folder):
    file = run_folder / "manifest.json"
    for change in (
        lambda m: m.pop("program") and None,
        lambda m: m.update(config=[]),
        lambda m: m["config"].pop("data") and None,
        lambda m: m["config"].update(data=3),
    ):
        before = file.read_text()
        edit(file, change)
        assert refused(run_folder).endswith("it lacks config.model, config.data or program.")
        file.write_text(before)
    edit(file, lambda m: [m])
    assert refused(run_folder) == f"{file} does not contain a JSON object."
    file.write_bytes(b"\xff{")
    assert refused(run_folder).startswith(f"{file} cannot be read: ")


def test_a_manifest_of_another_model(run_folder):
    edit(run_folder / "manifest.json", lambda m: m["config"]["model"].update(d_ff=25))
    assert "has other arrays than this model (" in refused(run_folder)
    edit(run_folder / "manifest.json", lambda m: m["config"]["model"].pop("d_ff") and None)
    assert refused(run_folder).endswith("cannot be used: The config lacks the fields model.d_ff.")


CONFIGS = [
    (
        lambda c: c.update(format="torch"),
        "is of format 'torch', version 3; only format 'yocou_jax'",
    ),
    (
        lambda c: c.update(version=1),
        "is of format 'yocou_jax', version 1; only format 'yocou_jax', version 2 or 3 can be read, "
        "so export the model again.",
    ),
    (lambda c: {"model_type": "llama"}, "is of format None, version None; only format 'yocou_jax'"),
    (
        lambda c: c.update(more=1),
        "has the fields compute, end_of_text, format, model, more, program, step, tokenizer, "
        "version, weights, but should have compute, ",
    ),
    (
        lambda c: c.pop("step") and None,
        "has the fields compute, end_of_text, format, model, program, tokenizer, version, weights,",
    ),
    (lambda c: c.update(end_of_text=7), "has end_of_text=7 and tokenizer="),
    (lambda c: c.update(tokenizer=[]), "and tokenizer=[], which must be texts."),
    (lambda c: c.update(step=1.5), "has step=1.5, which must be a whole number or null."),
    (lambda c: c.update(model=3), "has no fields under 'model', but 3."),
    (lambda c: c.update(compute=3), "has no fields under 'compute', but 3."),
    (lambda c: c["compute"].update(dtype="x"), "cannot be used: compute.dtype='x' is not one of"),
    (
        lambda c: c["model"].update(windw=3),
        "cannot be used: The config has no field 'model.windw'. Did you mean 'model.window'?",
    ),
    (
        lambda c: c["model"].pop("window") and None,
        "cannot be used: The config lacks the fields model.window.",
    ),
    (
        lambda c: c["model"].update(window="8"),
        "cannot be used: model.window='8' must be of type int",
    ),
    (
        lambda c: c.update(program="window*2@4 | cross*2"),
        "is of the program 'window*2@4 | cross*2', but here model.architecture='yoco_u' means "
        "'window*2@3 | cross*2'.",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), CONFIGS, ids=[s for _, s in CONFIGS])
def test_a_config_that_cannot_be_used(folder, change, sentence):
    edit(folder / "config.json", change)
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'} ")
    assert sentence in str(error.value)


def test_a_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    assert refused(folder).startswith(f"{folder / 'config.json'} cannot be read: ")


def test_a_folder_without_parameters(folder):
    (folder / "model.safetensors").unlink()
    assert refused(folder).endswith("has no model.safetensors, which belongs to its model.")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_parameters(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert refused(folder).startswith(f"{file} cannot be read: ")


@pytest.mark.parametrize("at", [0.01, 0.5, 1.0])
def test_a_flipped_bit_in_the_parameters(folder, at):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")  # after the header
    data[begin + int(at * (len(data) - begin - 1))] ^= 1
    file.write_bytes(data)
    sentence = refused(folder)
    assert sentence.startswith(
        f"{file} is damaged: its sha256 is {hashlib.sha256(data).hexdigest()}"
    )
    assert sentence.endswith("Copy the folder or export the model again.")


def test_parameters_of_another_model_of_the_same_sizes(folder, tmp_path):
    export(tmp_path / "b", model(seed=1))
    shutil.copy(tmp_path / "b/model.safetensors", folder / "model.safetensors")
    assert "model.safetensors is damaged: its sha256 is" in refused(folder)


def test_parameters_that_are_not_safetensors(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"PK" * 1000)
    assert refused(folder).startswith(f"{file} cannot be read: ")


ARRAYS = [
    (lambda a: a.pop("head") is None, "(1 differ): head: absent -> [16, 258]."),
    (lambda a: a.update(tail=np.zeros(3, np.float32)), "(1 differ): tail: [3] -> absent."),
    (
        lambda a: a.update(head=np.zeros((258, 16), np.float32)),
        "(1 differ): head: [258, 16] -> [16, 258].",
    ),
    (lambda a: a.clear(), "differ): embedding: absent -> [258, 16]; final_norm.scale: "),
    (
        lambda a: a.update(head=np.zeros((16, 258), np.float64)),
        "has head in F64; parameters are float32, bfloat16, float16.",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), ARRAYS, ids=[s for _, s in ARRAYS])
def test_other_arrays_than_the_config_says(folder, change, sentence):
    file = folder / "model.safetensors"
    arrays = {name: np.array(array) for name, array in load_file(file).items()}
    change(arrays)
    save_file(arrays, file)
    found = refused(folder)
    assert found.startswith(str(file))
    assert sentence in found


def test_nothing_on_disk_is_changed_by_loading(folder, run_folder):
    for path in (folder, run_folder):
        before = {p: os.stat(p).st_mtime_ns for p in path.rglob("*")}
        load(path)
        assert {p: os.stat(p).st_mtime_ns for p in path.rglob("*")} == before
