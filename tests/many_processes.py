"""Trains one small model in several processes, and stops, kills and slows some of them.

    python -m tests.many_processes [split] [moved] [killed] [first_killed] [full] [slow]

Processes are joined by jax.distributed on this machine, with gloo. The data is a mixture of two
sources with packed documents. Each scenario must end with the losses of a run of one process
(relative 1e-5 at every step, validation too):

* split: two processes with two devices each, over which fsdp=4 splits the parameters. One gets
  SIGTERM, and both must save and end with code 75. Then one process, also until SIGTERM; then two
  again. One process that reads the last checkpoint must find the hash that they noted.
* moved: the same two processes until SIGTERM; then four processes with one device each (two parts
  of parameters and batch, and two of the positions) until SIGTERM; then one.
* killed: the second of two gets SIGKILL. The other must end within LIMIT seconds with code 69, and
  say what to do. Then two processes resume.
* first_killed: the same for the first one, which the others are joined by. The other must end
  within LIMIT seconds, with code 69 or by an abort of jax's runtime.
* full: the first of two cannot write any more. It must end with code 2 and a sentence, and the
  other one within LIMIT seconds. Then two processes resume.
* slow: one of two is suspended for some seconds in the middle of the run.

Prints a line for each, and exits with 1 if one fails. `split` and `killed` run in .ci/run.
"""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import kill_runs

STEPS = 40
FIELDS = kill_runs.FIELDS | {
    "data.tokenizer": "bytes",
    "data.packing": True,
    "model.vocab_size": 258,
    "run.steps": STEPS,
}
STOPPED, LOST, LIMIT = 75, 69, 60
SUSPENDED = 15  # seconds
Group = list[subprocess.Popen]
STARTED: Group = []


def start(home: Path, name: str, count: int, devices: int = 1, **fields) -> Group:
    """One run in `count` processes with `devices` virtual devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mixture = f"0.7*{home}/first.jsonl + 0.3*{home}/second.jsonl"
    settings = FIELDS | {"data.source": mixture, "data.cache_dir": home / "cache"}
    settings |= {key.replace("__", "."): value for key, value in fields.items()}
    words = [sys.executable, "-m", "experiments.train", "--config=configs/yocou_small.py"]
    words += [f"--config.{key}={value}" for key, value in settings.items()]
    words += [f"--workdir={home / name}"]
    if count > 1:
        words += ["--distributed", f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    group = [
        subprocess.Popen(
            words + ([f"--process_id={rank}"] if count > 1 else []),
            cwd=kill_runs.ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=kill_runs.as_in_a_terminal,
        )
        for rank in range(count)
    ]
    STARTED.extend(group)
    return group


def finish(group: Group, code: int | None = 0) -> list[str]:
    """The outputs. All must end with `code`; None: any."""
    outputs = []
    for process in group:
        try:
            output, _ = process.communicate(timeout=600)
        finally:
            process.kill()
        outputs.append(output)
        assert code is None or process.returncode == code, f"{process.returncode}: {output}"
    return outputs


def losses(folder: Path) -> dict[int, dict[str, float]]:
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["step"]] = {k: row[k] for k in ("loss", "grad_norm", "val_loss") if k in row}
    return found


def wait_for(group: Group, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            if max(losses(folder), default=0) >= step:
                return
        assert all(process.poll() is None for process in group), "A process ended too early."
        time.sleep(0.02)
    raise AssertionError(f"The run did not reach step {step}.")


def compare(home: Path, name: str) -> str:
    """Every step once, with the values of the run of one process."""
    expected, found, worst = losses(home / "whole"), losses(home / name), 0.0
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, values in expected.items():
        assert values.keys() == found[step].keys(), step
        for key, value in values.items():
            difference = abs(found[step][key] / value - 1)
            assert difference <= 1e-5, f"{name} differs by {difference:.1e} in step {step}: {key}"
            worst = max(worst, difference)
    return f"{STEPS} steps, largest difference {worst:.1e}"


def stop(group: Group, folder: Path) -> None:
    """SIGTERM to the last process, some steps after the last one: all must save and stop."""
    begin = 0
    with contextlib.suppress(FileNotFoundError):  # it has not begun
        begin = max(losses(folder))
    wait_for(group, folder, begin + 6)
    group[-1].send_signal(signal.SIGTERM)
    finish(group, STOPPED)


def split(home: Path) -> str:
    folder = home / "split"
    stop(start(home, "split", 2, devices=2, mesh__fsdp=4), folder)
    stop(start(home, "split", 1), folder)
    finish(start(home, "split", 2, devices=2, mesh__fsdp=4))
    summary = json.loads((folder / "summary.json").read_text())
    code = """if 1:
        import sys
        from yocou_jax import checkpoint, pretrained
        print(checkpoint.params_sha256(pretrained.load(sys.argv[1]).params))
    """
    reader = subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=kill_runs.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert reader.stdout.strip() == summary["final_params_sha256"]
    return f"2 processes of 2 devices, 1, and 2 again: {compare(home, 'split')}"


def moved(home: Path) -> str:
    folder = home / "moved"
    stop(start(home, "moved", 2, devices=2, mesh__fsdp=4), folder)
    stop(start(home, "moved", 4, mesh__fsdp=2, mesh__context=2), folder)
    finish(start(home, "moved", 1))
    return f"2, 4 and 1 processes: {compare(home, 'moved')}"


def ended(group: Group) -> tuple[list[str], str]:
    """The last lines of two processes that have to end soon, and how they ended, in words."""
    begin = time.monotonic()
    outputs = finish(group, code=None)
    seconds = time.monotonic() - begin
    assert seconds <= LIMIT, f"The last process ended after {seconds:.0f} s."
    lines = [[line for line in output.splitlines() if line.strip()] for output in outputs]
    codes = [process.returncode for process in group]
    return [each[-1] if each else "" for each in lines], f"codes {codes} after {seconds:.0f} s"


def killed(home: Path, name: str = "killed", rank: int = 1) -> str:
    group, other = start(home, name, 2), 1 - rank
    wait_for(group, home / name, 15)
    group[rank].kill()
    last, words = ended(group)
    codes = (LOST,) if rank else (LOST, -signal.SIGABRT)  # jax may be the first to notice
    assert group[other].returncode in codes, last[other]
    assert "another one died" in last[other] or group[other].returncode != LOST, last[other]
    finish(start(home, name, 2))
    return f"{words}: {last[other]} Resumed: {compare(home, name)}"


def first_killed(home: Path) -> str:
    return killed(home, "first_killed", rank=0)


def full(home: Path) -> str:
    group = start(home, "full", 2)
    wait_for(group, home / "full", 15)
    resource.prlimit(group[0].pid, resource.RLIMIT_FSIZE, (0, 0))
    last, words = ended(group)
    assert group[0].returncode == 2, last[0]
    assert "What was saved before is intact" in last[0], last[0]
    assert group[1].returncode == LOST, last[1]
    assert "another one died" in last[1], last[1]
    finish(start(home, "full", 2))
    return f"{words}: {last[0]} Resumed: {compare(home, 'full')}"


def slow(home: Path) -> str:
    group = start(home, "slow", 2)
    wait_for(group, home / "slow", 10)
    group[1].send_signal(signal.SIGSTOP)
    time.sleep(SUSPENDED)
    group[1].send_signal(signal.SIGCONT)
    finish(group)
    return f"suspended for {SUSPENDED} s: {compare(home, 'slow')}"


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        rng, words = random.Random(0), ["alpha", "beta", "gamma", "one", "two", "def", "if"]
        for name, count in (("first", 900), ("second", 500)):
            texts = (" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(count))
            rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (home / f"{name}.jsonl").write_text(rows, encoding="utf-8")
        finish(start(home, "whole", 1))
        asked = [globals()[name] for name in sys.argv[1:]] or (
            split,
            moved,
            killed,
            first_killed,
            full,
            slow,
        )
        for scenario in asked:
            begin = time.monotonic()
            try:
                words = scenario(home)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failed += 1
                for process in STARTED:
                    process.kill()
                words = f"FAILED: {error}"
            seconds = time.monotonic() - begin
            print(f"{scenario.__name__}: {words} [{seconds:.0f} s]", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
