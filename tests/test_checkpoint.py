"""Checkpoints and manifests are saved, killed, damaged and resumed."""

import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from yocou_jax import checkpoint, manifest
from yocou_jax.checkpoint import Checkpointer, load_params, params_sha256
from yocou_jax.errors import UserError
from yocou_jax.manifest import check_resume, describe, read, write
from yocou_jax.training.preemption import EXIT_PREEMPTED, STOP_SIGNALS, StopRequest

ROOT = Path(__file__).parent.parent


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def mesh(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(
        devices, ("x", "y")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape)
    )


def place(state, mesh):
    """Shards matrices over the first axis of the mesh, and copies the rest to all devices."""

    def sharding(x):
        return NamedSharding(mesh, PartitionSpec("x") if x.ndim == 2 else PartitionSpec())

    return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)


def make_state(step=0):
    # From NumPy: a child process must make the same numbers, also with other flags for XLA.
    rng = np.random.default_rng(step)
    params = {
        "layer": {
            "w": jnp.asarray(rng.standard_normal((64, 32), np.float32)),
            "b": jnp.ones(32, jnp.bfloat16),
        },
        "embed": jnp.asarray(rng.standard_normal((128, 64), np.float32)),
    }
    return place(State(jnp.int32(step), params, TX.init(params)), mesh(8))


def abstract(state, on=None):
    target = place(state, on) if on is not None else state
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save(directory, *steps, **options):
    with Checkpointer(directory, **options) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, make_state(step))


def restore(directory, **options):
    with Checkpointer(directory, **options) as checkpointer:
        return checkpointer.restore_latest(abstract(make_state()))


def folders(directory):
    return sorted(p.name for p in Path(directory).iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (10, 20, 30):
            assert checkpointer.save(step, make_state(step))
        assert checkpointer.save(34, make_state(34))
        assert not checkpointer.save(34, make_state(34))  # it exists already
    assert [int(f) for f in folders(tmp_path) if f.isdigit()] == [30, 34]
    state, step = restore(tmp_path)
    assert step == 34
    assert_same(state, make_state(34))


def test_restore_without_a_checkpoint(tmp_path):
    assert restore(tmp_path / "new") is None
    with pytest.raises(UserError, match="no checkpoint to read"):
        load_params(tmp_path / "new", abstract(make_state()).params)


def test_keep_must_be_at_least_two(tmp_path):
    with pytest.raises(UserError, match="2 or more"):
        Checkpointer(tmp_path, keep=1)


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 4)])
def test_restore_on_another_mesh(tmp_path, shape):
    save(tmp_path, 10)
    target = abstract(make_state(), on=mesh(*shape))
    with Checkpointer(tmp_path) as checkpointer:
        state, _ = checkpointer.restore_latest(target)
    assert_same(state, make_state(10))
    jax.tree.map(
        lambda x, t: (
            x.sharding.is_equivalent_to(t.sharding, x.ndim) or pytest.fail("another sharding")
        ),
        state,
        target,
    )


def test_restore_of_the_parameters_only(tmp_path):
    save(tmp_path, 10, 20)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), make_state().params
    )
    before = folders(tmp_path)
    params, step = load_params(tmp_path, wanted)
    assert step == 20
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(20).params))
    assert folders(tmp_path) == before


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state):
        return jax.tree.map(lambda x: x * 2 + 1, state)

    with Checkpointer(tmp_path, keep=5) as checkpointer:
        state, expected = make_state(), {}
        for step in range(1, 5):
            state = advance(state)
            expected[step] = jax.tree.map(lambda x: np.array(x, copy=True), state.params)
            checkpointer.save(step, state)
    for step in (4, 3, 2):
        params, found = load_params(tmp_path, abstract(make_state()).params)
        assert found == step
        assert_same(params, expected[step])
        shutil.rmtree(tmp_path / str(step))


def checkpoint_files():
    """The kinds of files in a checkpoint. Names of OCDBT data files are random."""
    return ["inventory.json", "_CHECKPOINT_METADATA", "layout/metadata", "state/_METADATA",
            "state/array_metadatas/*", "state/manifest.ocdbt", "state/d/*",
            "state/ocdbt.process_0/d/*"]  # fmt: skip


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "halved":
        path.write_bytes(data[: len(data) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:  # one flipped bit, which neither Orbax nor TensorStore notices in an array
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save(directory, 10, 20)
    return directory


UNVERIFIED = "is complete, but was not verified"


def test_a_committed_checkpoint_without_an_inventory_is_used(tmp_path, saved, caplog):
    directory = shutil.copytree(saved, tmp_path / "c")
    (directory / "20/inventory.json").unlink()
    state, step = restore(directory)
    assert step == 20
    assert_same(state, make_state(20))
    assert load_params(directory, abstract(make_state()).params)[1] == 20
    assert load_params(directory, abstract(make_state()).params, step=20)[1] == 20
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("yocou_jax")]
    assert len(warnings) == 3  # one for each that was read
    assert all(w.startswith(f"Checkpoint 20 in {directory} {UNVERIFIED}") for w in warnings)
    assert folders(directory) == ["10", "20"]


@pytest.mark.parametrize("how", ["deleted", "halved", "emptied"])
@pytest.mark.parametrize("pattern", checkpoint_files()[1:])
def test_a_part_of_a_checkpoint_without_an_inventory_is_skipped(
    tmp_path, saved, caplog, pattern, how
):
    directory = shutil.copytree(saved, tmp_path / "c")
    (directory / "20/inventory.json").unlink()
    damage(max((directory / "20").glob(pattern), key=lambda p: p.stat().st_size), how)
    params, step = load_params(directory, abstract(make_state()).params)
    assert step == 10
    assert_same(params, make_state(10).params)
    assert "Checkpoint 20 was skipped: " in caplog.text
    assert UNVERIFIED not in caplog.text


@pytest.mark.parametrize("how", ["deleted", "halved", "emptied", "flipped"])
@pytest.mark.parametrize("pattern", checkpoint_files())
def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, saved, caplog, pattern, how):
    directory = shutil.copytree(saved, tmp_path / "c")
    victim = max((directory / "20").glob(pattern), key=lambda p: p.stat().st_size)
    damage(victim, how)
    if pattern == "inventory.json" and how == "deleted":
        (directory / "20/_CHECKPOINT_METADATA").unlink()
    if pattern == "inventory.json" and how == "flipped":
        victim.write_text(victim.read_text().replace("layout", "layouu"))
    with Checkpointer(directory) as checkpointer:
        state, step = checkpointer.restore_latest(abstract(make_state()))
        assert step == 10
        assert_same(state, make_state(10))
        warnings = [r.getMessage() for r in caplog.records if r.name.startswith("yocou_jax")]
        assert len(warnings) == 1
        assert warnings[0].startswith(f"Checkpoint 20 in {directory} was skipped: it")
        assert warnings[0].endswith(("; step 10 is used instead.", "it was never finished."))
    assert folders(directory) == ["10", "passed-over-20"]


def test_the_steps_after_a_damaged_checkpoint_can_be_saved_again(tmp_path, saved):
    directory = shutil.copytree(saved, tmp_path / "c")
    damage(directory / "20/layout/metadata", "halved")
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.restore_latest(abstract(make_state()))[1] == 10
        assert checkpointer.save(15, make_state(15))
        assert checkpointer.save(20, make_state(20))
    assert folders(directory) == ["15", "20", "passed-over-20"]
    state, step = restore(directory)
    assert step == 20
    assert_same(state, make_state(20))


def test_a_folder_that_was_never_finished_is_skipped(tmp_path, saved, caplog):
    directory = shutil.copytree(saved, tmp_path / "c")
    (directory / "30").mkdir()
    shutil.copytree(directory / "20", directory / f"40{TMP_DIR_SUFFIX}-1")
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.restore_latest(abstract(make_state()))[1] == 20
        assert checkpointer.save(50, make_state(50))
    assert f"Checkpoint 30 in {directory} was skipped: it was never finished" in caplog.text
    assert folders(directory) == ["20", "50", "passed-over-30"]


def test_damaged_checkpoints_stop_a_run_and_unfinished_ones_do_not(tmp_path, saved):
    directory = shutil.copytree(saved, tmp_path / "c")
    for step in ("10", "20"):
        damage(directory / step / "state/manifest.ocdbt", "halved")
    with pytest.raises(UserError, match=r"of step 20, its file state/manifest.ocdbt has changed"):
        restore(directory)
    assert folders(directory) == ["10", "20"]
    for step in ("10", "20"):
        (directory / step / "inventory.json").unlink()
        metadata = directory / step / "_CHECKPOINT_METADATA"
        times = json.loads(metadata.read_text()) | {"commit_timestamp_nsecs": None}
        metadata.write_text(json.dumps(times))
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.newest_undamaged() is None
        assert checkpointer.save(10, make_state(10))
    assert folders(directory) == ["10", "passed-over-10", "passed-over-20"]


def test_another_model_is_refused_by_name(saved):
    other = make_state()
    other = other.replace(params={**other.params, "embed": jnp.zeros((128, 65))})
    with (
        Checkpointer(saved) as checkpointer,
        pytest.raises(
            UserError, match=r"params.embed: \[\[128, 64\], 'float32'\] -> \[\[128, 65\]"
        ),
    ):
        checkpointer.restore_latest(abstract(other))
    assert folders(saved) == ["10", "20"]


CHILD = """
    import os, sys, signal, resource, logging
    from tests.test_checkpoint import *
    logging.disable(logging.CRITICAL)
    directory, moment = sys.argv[1], sys.argv[2]
"""


def child(directory, moment, code):
    script = textwrap.dedent(CHILD) + textwrap.dedent(code)
    command = [sys.executable, "-c", script, str(directory), moment]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("moment", ["writing", "sealing"])
def test_killed_while_saving(tmp_path, moment):
    """SIGKILL comes while the arrays are written, and between their commit and the inventory."""
    code = """
        import orbax.checkpoint, yocou_jax.checkpoint
        checkpointer = Checkpointer(directory)
        checkpointer.save(10, make_state(10))
        checkpointer._raise_error_of_last_save(wait=True)
        def kill(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "sealing":
            yocou_jax.checkpoint._inventory = kill
            checkpointer.save(20, make_state(20))
        else:
            from orbax.checkpoint._src.handlers import base_pytree_checkpoint_handler as handler
            handler.BasePyTreeCheckpointHandler.finalize = kill
            checkpointer.save(20, make_state(20))
        checkpointer.close()
    """
    result = child(tmp_path, moment, code)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = folders(tmp_path)
    assert left[0] == "10"
    assert len(left) == 2, left
    assert left[1] == "20" if moment == "sealing" else left[1].startswith("20.")
    state, step = restore(tmp_path)
    assert step == (20 if moment == "sealing" else 10)
    assert_same(state, make_state(step))
    if moment == "writing":
        save(tmp_path, 20)
    assert restore(tmp_path)[1] == 20


def test_what_a_killed_save_left_is_gone_when_the_resume_returns(tmp_path, saved, monkeypatch):
    """No thread removes it later, when another run may be saving in the same directory."""
    directory = shutil.copytree(saved, tmp_path / "c")
    shutil.copytree(directory / "20", directory / f"40{TMP_DIR_SUFFIX}")
    (directory / f"50{TMP_DIR_SUFFIX}").write_text("not a checkpoint")
    (directory / f"60{TMP_DIR_SUFFIX}").symlink_to(directory / "20")
    before = folders(directory)
    remove = shutil.rmtree

    def slowly(*args, **kwargs):
        time.sleep(0.5)
        remove(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", slowly)
    assert restore(directory)[1] == 20
    assert folders(directory) == [name for name in before if name != f"40{TMP_DIR_SUFFIX}"]


def test_a_full_disk_gives_one_sentence(tmp_path):
    """A limit on the size of files replaces the full disk: writes fail in the same place."""
    code = """
        checkpointer = Checkpointer(directory)
        checkpointer.save(10, make_state(10))
        checkpointer._raise_error_of_last_save(wait=True)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            checkpointer.save(20, make_state(20))
            checkpointer._finishing.join()
            checkpointer.save(21, make_state(21))
        except UserError as error:
            print(error)
        try:
            with checkpointer:
                checkpointer.save(30, make_state(30))
        except UserError as error:
            print(error)
            sys.exit(2)
    """
    result = child(tmp_path, "", code)
    assert result.returncode == 2, result.stderr
    for step, sentence in zip((20, 30), result.stdout.splitlines(), strict=True):
        assert sentence == (
            f"The checkpoint of step {step} could not be written to {tmp_path}: File too large. "
            "Older ones are not lost: remove the cause, and the same command resumes from step 10."
        )
    assert restore(tmp_path)[1] == 10


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used: Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints").save(10, make_state())


@pytest.fixture
def signals():
    """The handlers of a terminal. A shell starts background commands with SIGINT ignored."""
    before = {s: signal.signal(s, signal.SIG_DFL) for s in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_stops_the_run_after_the_step(number, signals):
    assert EXIT_PREEMPTED not in (0, 1, 2)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), number)
        assert stop.reached(2)
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_prints_a_line_while_a_step_runs(tmp_path, name):
    """The main thread runs C code, as in a step. Another thread prints the line, and a later Ctrl-C
    does not wait either. The same signal twice within a short time is one request."""
    code = """
        import hashlib, time, threading
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        with StopRequest() as stop:
            def send():
                for _ in range(3):
                    os.kill(os.getpid(), getattr(signal, moment))
                    time.sleep(0.005)
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.2)
                print("still there", flush=True)
                os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=send, daemon=True).start()
            # Like XLA, this runs without the GIL, and meanwhile no handler of Python runs.
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
    """
    result = child(tmp_path, name, code)
    assert result.returncode == 128 + signal.SIGINT, result.stderr
    assert result.stdout == "still there\n"
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{name}: the run saves and stops")


def test_a_signal_that_was_ignored_stays_ignored(signals):
    """nohup ignores SIGHUP, so that a run continues without its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.reached(1)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_refused_resume_changes_nothing_on_disk(tmp_path, saved):
    """Unfinished files of another run stay too, because all checks come before all writes."""
    directory = shutil.copytree(saved, tmp_path / "c")
    (directory / "30").mkdir()
    (directory / f"40{TMP_DIR_SUFFIX}-1").mkdir()
    other = make_state()
    other = other.replace(params={**other.params, "embed": jnp.zeros((128, 65))})
    before = folders(directory)
    with pytest.raises(UserError), Checkpointer(directory) as checkpointer:
        checkpointer.restore_latest(abstract(other))
    assert folders(directory) == before
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.restore_latest(abstract(other)) is None
    assert not (tmp_path / "new").exists()


CONFIG = {"model": {"window": 64, "loops": 3}, "data": {"mix": (1, 2)}, "run": {"log_every": 10}}
FREE = ("run.log_every",)


def resume(workdir, config=CONFIG, **options):
    check_resume(workdir, read(workdir), describe(config, **{"corpus": "abc"} | options), FREE)


def test_the_revision_says_if_the_code_has_changed(tmp_path, monkeypatch):
    """Files of results/ are no code: a comparison writes there between its runs."""
    files = [
        tmp_path / "yocou_jax/manifest.py",
        tmp_path / "results/a.json",
        tmp_path / "README.md",
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("1")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(manifest, "__file__", str(files[0]))
    clean = manifest._git_revision()
    assert len(clean) == 40
    for file, suffix in zip(files, ("+dirty", "", "+dirty"), strict=True):
        file.write_text("2")
        assert manifest._git_revision() == clean + suffix
        file.write_text("1")


def test_a_manifest_is_written_and_then_accepted(tmp_path, caplog):
    write(tmp_path, describe(CONFIG, corpus="abc", tokenizer="t", note="x"))
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["config"]["model"]["window"] == 64
    assert written["packages"]["jax"] == jax.__version__
    assert written["device"]["count"] == 8
    assert (written["corpus"], written["tokenizer"], written["note"]) == ("abc", "t", "x")
    assert len((written["git"] or "0" * 40).removesuffix("+dirty")) == 40
    resume(tmp_path, tokenizer="t")
    assert not caplog.records


def test_manifest_refuses_another_config_by_name(tmp_path):
    write(tmp_path, describe(CONFIG, corpus="abc"))
    other = {
        "model": {"window": 32, "loops": 3},
        "data": {"mix": (1, 2)},
        "run": {"log_every": 5},
        "new": 1,
    }
    with pytest.raises(UserError) as error:
        resume(tmp_path, other)
    assert "cannot be resumed: model.window: 64 -> 32; new: absent -> 1. Give" in str(error.value)
    assert "another version of this code, with other config fields" in str(error.value)
    # It names a new workdir, quoted for a shell.
    assert str(error.value).endswith(f"--workdir={tmp_path}-window=32.")
    odd = CONFIG | {"model": {"window": "a b;", "loops": 3}}
    with pytest.raises(UserError, match=rf"--workdir={tmp_path}-2\.$"):
        resume(tmp_path, odd)
    resume(tmp_path, CONFIG | {"run": {"log_every": 1}})


def test_manifest_refuses_another_corpus_and_warns_of_another_version(tmp_path, caplog):
    write(tmp_path, describe(CONFIG, corpus="abc", tokenizer="t"))
    with pytest.raises(UserError, match=r"training text has changed .*abc -> abd"):
        resume(tmp_path, corpus="abd", tokenizer="t")
    with pytest.raises(UserError, match=r"tokenizer has changed .*t -> u"):
        resume(tmp_path, tokenizer="u")
    path = tmp_path / "manifest.json"
    written = json.loads(path.read_text())
    written["packages"]["jax"] = "0.0.1"
    path.write_text(json.dumps(written))
    with caplog.at_level(logging.WARNING):
        resume(tmp_path, tokenizer="t")
    assert f"packages.jax: '0.0.1' -> '{jax.__version__}'" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": 3}', '{"config": {}}', "\xff"])
def test_a_manifest_that_cannot_be_read_gives_a_warning(tmp_path, caplog, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    assert read(tmp_path) is None
    assert "cannot be read" in caplog.text


def test_params_sha256_sees_every_bit():
    params = make_state().params
    digest = params_sha256(params)
    # It does not depend on the order of the keys or on the sharding.
    shuffled = {"embed": params["embed"], "layer": dict(reversed(params["layer"].items()))}
    assert params_sha256(place(shuffled, mesh(2))) == digest
    flipped = params["embed"].at[5, 7].set(jnp.nextafter(params["embed"][5, 7], jnp.inf))
    for other in (
        params | {"embed": flipped},
        params | {"embed": params["embed"].reshape(64, 128)},
        params | {"embed": jax.lax.bitcast_convert_type(params["embed"], jnp.int32)},
        {"layer": params["layer"], "embedding": params["embed"]},
    ):
        assert params_sha256(other) != digest


@pytest.mark.parametrize("limit", [4, 100, 1000, 10_000])
def test_params_sha256_reads_large_arrays_in_pieces(limit, monkeypatch):
    """Of rows, or of parts of a row, whatever divides into what."""
    params = {"stack": jnp.arange(2 * 3 * 50.0).reshape(2, 3, 50), "one": jnp.float32(1)}
    whole = params_sha256(params)
    monkeypatch.setattr("yocou_jax.checkpoint.HASHED_AT_ONCE", limit)
    pieces = list(checkpoint._pieces(params["stack"]))
    assert max(piece.nbytes for piece in pieces) <= limit
    assert sum(piece.nbytes for piece in pieces) == params["stack"].nbytes
    assert params_sha256(params) == whole
    split = NamedSharding(mesh(2), PartitionSpec(None, None, "x"))
    wide = {"stack": jnp.arange(4 * 3 * 8.0).reshape(4, 3, 8)}
    assert params_sha256(jax.device_put(wide, split)) == params_sha256(wide)
