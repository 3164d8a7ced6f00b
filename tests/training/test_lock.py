"""One run per workdir: which run owns it, which is refused, and what a dead owner leaves."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from yocou_jax.errors import UserError
from yocou_jax.training import lock
from yocou_jax.training.lock import WorkdirLock

ROOT = Path(__file__).parent.parent.parent
HOLD = """
import sys, time
from pathlib import Path
from yocou_jax.training.lock import WorkdirLock
with WorkdirLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds tmp_path/run."""
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


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, holder):
    run = tmp_path / "run"
    with pytest.raises(UserError) as error, WorkdirLock(run):
        pass
    said = owner(run)
    for word in (f"process {holder.pid}", said["host"], said["started"], f"--workdir={run}-2."):
        assert word in str(error.value)
    assert owner(run) == said  # the refused run has changed nothing
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert owner(run)["pid"] == holder.pid  # a kill leaves the file, but no lock
    with WorkdirLock(run):
        assert owner(run)["pid"] == os.getpid()
    assert not (run / lock.FILE).exists()
    with WorkdirLock(run):  # a second time
        pass


def test_a_new_folder_that_stays_empty_is_removed_again(tmp_path):
    with pytest.raises(ZeroDivisionError), WorkdirLock(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with WorkdirLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_an_unwritable_workdir_gives_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"workdir .*file/run cannot be written to: Not a dir"):
        WorkdirLock(tmp_path / "file" / "run").__enter__()


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without locks."""

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "BEAT_S", 1.0)


def claim(folder: Path, **fields) -> Path:
    folder.mkdir()
    said = {"host": "elsewhere", "pid": 1, "started": "2026-01-01T00:00:00+00:00"} | fields
    (folder / lock.FILE).write_text(json.dumps(said))
    return folder


def test_without_locks_an_owner_without_beats_is_dead(tmp_path, no_flock):
    """Its process id does not count, because another process may have it now."""
    here = lock.socket.gethostname()
    with WorkdirLock(claim(tmp_path / "a", host=here, pid=os.getppid())):
        assert owner(tmp_path / "a")["pid"] == os.getpid()


def test_without_locks_a_beating_owner_is_alive(tmp_path, no_flock):
    with WorkdirLock(tmp_path / "a"), pytest.raises(UserError, match="in use"):
        WorkdirLock(tmp_path / "a").__enter__()


def test_an_owner_on_another_host_is_alive_as_long_as_it_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 1.0)
    with WorkdirLock(tmp_path / "run"):
        monkeypatch.setattr(lock.socket, "gethostname", lambda: "another")
        monkeypatch.setattr(lock, "_flock", lambda file: True)  # the hosts do not share locks
        with pytest.raises(UserError, match="in use"):
            WorkdirLock(tmp_path / "run").__enter__()


def test_an_owner_that_misses_its_beats_loses_the_workdir(tmp_path, monkeypatch):
    """If it runs again later, it raises an error, and leaves the workdir to the new owner."""
    monkeypatch.setattr(lock, "BEAT_S", 0.5)
    with WorkdirLock(tmp_path / "run") as first:
        first.check()
        first._ended.set()  # it has no beats any more
        monkeypatch.setattr(lock.socket, "gethostname", lambda: "another")
        monkeypatch.setattr(lock, "_flock", lambda file: True)
        second = WorkdirLock(tmp_path / "run").__enter__()
        with pytest.raises(UserError, match="Another run has taken it"):
            first.check()
        second.check()
    assert owner(tmp_path / "run")["host"] == "another"
    second.__exit__()
    assert not (tmp_path / "run" / lock.FILE).exists()


def test_a_removed_workdir_is_noticed(tmp_path):
    first = WorkdirLock(tmp_path / "a").__enter__()
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match="was removed"):
        first.check()
    with WorkdirLock(tmp_path / "a"):  # another run in a new folder with this name
        with pytest.raises(UserError, match="Another run has taken it"):
            first.check()
        first.__exit__()
        assert owner(tmp_path / "a")["pid"] == os.getpid()


def test_of_many_runs_that_start_together_one_gets_the_workdir(tmp_path):
    """They are processes, because a process owns a lock of the operating system."""
    line = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(line, cwd=ROOT, **pipes) for _ in range(4)]
    said = []
    for process in processes:
        said.append(process.stdout.readline())
        if said.count(b"held\n") == 1 and said[-1]:
            winner = process.pid
    held = owner(tmp_path / "run")["pid"]
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
    assert sorted(said) == [b"", b"", b"", b"held\n"]
    assert held == winner


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": 1}', "\x00", "[" * 4096])
def test_a_file_that_names_no_owner_is_ignored(tmp_path, text):
    (tmp_path / lock.FILE).write_text(text)
    with WorkdirLock(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
