"""One run a workdir: who owns it, who is refused, and what a dead owner leaves behind."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from yocou_jax import lock
from yocou_jax.errors import UserError
from yocou_jax.lock import WorkdirLock

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from yocou_jax.lock import WorkdirLock
with WorkdirLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def owner(folder: Path) -> dict:
    return json.loads((folder / lock.FILE).read_text())


def test_the_second_is_refused_until_the_first_is_dead(tmp_path, holder):
    run = tmp_path / "run"
    with pytest.raises(UserError) as error, WorkdirLock(run):
        pass
    said = owner(run)
    for word in (f"process {holder.pid}", said["host"], said["started"], f"--workdir={run}-2."):
        assert word in str(error.value)
    assert owner(run) == said  # the refused one has changed nothing
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert owner(run)["pid"] == holder.pid  # a kill leaves the file, but no lock
    with WorkdirLock(run):
        assert owner(run)["pid"] == os.getpid()
    assert not (run / lock.FILE).exists()
    with WorkdirLock(run):  # and again
        pass


def test_a_folder_made_for_nothing_is_removed_again(tmp_path):
    with pytest.raises(ZeroDivisionError), WorkdirLock(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with WorkdirLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"workdir .*file/run cannot be written to: Not a dir"):
        WorkdirLock(tmp_path / "file" / "run").__enter__()


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without locks, or whose locks do not reach another host."""

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "BEAT_S", 0.05)


def claim(folder: Path, **fields) -> Path:
    folder.mkdir()
    said = {"host": "elsewhere", "pid": 1, "started": "2026-01-01T00:00:00+00:00"} | fields
    (folder / lock.FILE).write_text(json.dumps(said))
    return folder


def test_without_locks_a_living_process_of_this_host_counts(tmp_path, no_flock):
    here = lock.socket.gethostname()
    with pytest.raises(UserError, match=f"process {os.getppid()} on"):
        WorkdirLock(claim(tmp_path / "a", host=here, pid=os.getppid())).__enter__()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with WorkdirLock(claim(tmp_path / "b", host=here, pid=ended.pid)):
        assert owner(tmp_path / "b")["pid"] == os.getpid()


@pytest.mark.parametrize("beats", [True, False])
def test_an_owner_on_another_host_lives_as_long_as_its_heart_beats(tmp_path, monkeypatch, beats):
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    with WorkdirLock(tmp_path / "run") as first:
        if not beats:
            first._ended.set()
        monkeypatch.setattr(lock.socket, "gethostname", lambda: "another")
        monkeypatch.setattr(lock, "_flock", lambda file: True)  # its locks do not reach us
        if beats:
            with pytest.raises(UserError, match="in use"):
                WorkdirLock(tmp_path / "run").__enter__()
        else:
            with WorkdirLock(tmp_path / "run"):
                assert owner(tmp_path / "run")["host"] == "another"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": 1}', "\x00"])
def test_a_file_that_says_nothing_is_no_owner(tmp_path, text):
    (tmp_path / lock.FILE).write_text(text)
    with WorkdirLock(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
