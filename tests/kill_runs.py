"""Kills small training runs at random moments, until all of them have finished.

    python -m tests.kill_runs --count=100 --seed=0

Each run starts in a pseudo-terminal. SIGKILL, SIGTERM, SIGHUP, Ctrl-C, or two Ctrl-C end it while
it starts, tokenizes, trains, saves or finishes. Then the same command starts again, until a run
ends by itself. It must end with the parameters of a run that was not killed, and restore its
terminal, and no start may be refused. After a failure, prints the output and exits with 1.
"""

import argparse
import collections
import contextlib
import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 40, 10
FIELDS = {
    "model.num_layers": 2, "model.num_loops": "1,2", "model.vocab_size": 400, "model.d_model": 32,
    "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 16, "model.d_ff": 64,
    "model.window": 8, "optimizer.warmup_steps": 5, "data.batch_size": 8,
    "data.sequence_length": 32, "data.validation_sequences": 8, "run.steps": STEPS,
    "run.log_every": 1, "run.eval_every": 20, "run.sample_every": 20, "run.sample_tokens": 4,
    "run.checkpoint_every": EVERY,
}  # fmt: skip
SIGNALS = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGHUP": (signal.SIGHUP,),
    "SIGHUP twice": (signal.SIGHUP, signal.SIGHUP),  # from the kernel and from the shell
    "Ctrl-C": (signal.SIGINT,),
    "Ctrl-C at once twice": (signal.SIGINT, signal.SIGINT),
    "Ctrl-C again": (signal.SIGINT, None, signal.SIGINT),
}
MOMENTS = ("start", "tokenize", "train", "save", "finish")
STOPPED, INTERRUPTED = 75, 130


def as_in_a_terminal() -> None:
    """Resets signals: nohup, and a shell that starts a command in the background, ignore some."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """A pseudo-terminal: what was written to it, and whether its settings were restored."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.text = b""

    def read(self, seconds: float = 0.0) -> None:
        while select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            if not data:
                return
            self.text, seconds = self.text + data, 0.0

    def restored(self) -> bool:
        cursor = self.text.rfind(b"\x1b[?25h") >= self.text.rfind(b"\x1b[?25l")
        return cursor and termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


class Game:
    """A folder of runs, a text, and the parameters of a run that was not killed."""

    def __init__(self, home: Path, rng: random.Random):
        self.home, self.rng = home, rng
        words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "def", "return", "if"]
        text = "\n".join(" ".join(random.Random(0).choices(words, k=12)) for _ in range(20_000))
        (home / "text.txt").write_text(text, encoding="utf-8")
        self.counts: collections.Counter = collections.Counter()
        code, terminal = self.run("whole", None, ())
        if code:
            raise SystemExit(f"The undisturbed run failed:\n{terminal.text.decode()}")
        self.wanted = self.sha("whole")

    def command(self, workdir: str) -> list[str]:
        fields = FIELDS | {"data.source": self.home / "text.txt", "data.cache_dir": self.cache}
        return [
            *(sys.executable, "-m", "experiments.train", "--config=configs/yocou_small.py"),
            *(f"--config.{name}={value}" for name, value in fields.items()),
            f"--workdir={self.home / workdir}",
        ]

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def sha(self, workdir: str) -> str:
        summary = (self.home / workdir / "summary.json").read_text(encoding="utf-8")
        return json.loads(summary)["final_params_sha256"]

    def run(self, workdir: str, moment: str | None, signals) -> tuple[int, Terminal]:
        """Starts a run, sends the signals at the moment, and waits for its end."""
        if moment == "tokenize":
            shutil.rmtree(self.cache, ignore_errors=True)
        terminal = Terminal()
        flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(self.home / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TERM": "xterm",
        }
        process = subprocess.Popen(
            self.command(workdir),
            cwd=ROOT,
            env=environment,
            stdin=terminal.slave,
            stdout=terminal.slave,
            stderr=terminal.slave,
            start_new_session=True,
            preexec_fn=as_in_a_terminal,
        )
        deadline = time.monotonic() + 300
        due = self.due(moment, self.home / workdir)
        pending = list(signals)
        while process.poll() is None:
            terminal.read(0.002)
            if pending and due():
                number = pending.pop(0)
                time.sleep(self.rng.uniform(0, 0.05) if number else 0.6)
                if number:
                    process.send_signal(number)
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                terminal.text += b"\n(It did not end within 300 s.)"
                return 1, terminal
        terminal.read()
        return process.returncode, terminal

    def due(self, moment: str | None, workdir: Path):
        """Returns a function that is called every few milliseconds: whether this is the moment."""
        rng, start = self.rng, time.monotonic()
        checkpoints = workdir / "checkpoints"
        at = start + rng.uniform(0, 6)
        row, step = rng.randrange(1, STEPS), EVERY * rng.randrange(1, STEPS // EVERY + 1)
        wait: list[float] = []

        def rows() -> int:
            with contextlib.suppress(OSError):
                return (workdir / "metrics.jsonl").read_bytes().count(b"\n")
            return 0

        def saving() -> bool:
            with contextlib.suppress(OSError):
                return any(p.name.startswith(f"{step}") for p in checkpoints.iterdir())
            return False

        happens = {
            "start": lambda: time.monotonic() > at,
            "tokenize": lambda: self.cache.exists() and any(self.cache.iterdir()),
            "train": lambda: rows() >= row,
            "save": saving,
            "finish": lambda: rows() >= STEPS,
        }

        def due() -> bool:
            if moment is None or not happens[moment]():
                return False
            if not wait:  # a random time later, because the moment takes some time
                wait.append(time.monotonic() + rng.uniform(0, 0.3))
            return time.monotonic() >= wait[0]

        return due

    def disturb(self, workdir: str, kills: int) -> int:
        """Kills a run up to `kills` times and lets it finish. Returns how often it was killed."""
        done = 0
        while True:
            moment, name = self.rng.choice(MOMENTS), self.rng.choice(list(SIGNALS))
            signals = SIGNALS[name] if done < kills else ()
            code, terminal = self.run(workdir, moment, signals)
            text = terminal.text.decode("utf-8", "replace")
            numbers = set(filter(None, signals))
            ended = {-s for s in numbers} | {0, STOPPED, INTERRUPTED}
            # Before the first line of the command, Python prints a stack trace after Ctrl-C.
            trace = "Traceback" in text and "KeyboardInterrupt" not in text
            if code not in ended or trace or not terminal.restored():
                raise SystemExit(f"{name} at {moment}: exit code {code}, and this output:\n{text}")
            terminal.close()
            if code:
                done += 1
                self.counts[moment, name, code] += 1
                continue
            if self.sha(workdir) != self.wanted:
                raise SystemExit(f"{workdir} ended with other parameters, after:\n{text}")
            return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, killed, runs, start = random.Random(options.seed), 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        game = Game(Path(home), rng)
        while killed < options.count:
            killed += game.disturb(f"run{runs}", min(rng.randint(1, 8), options.count - killed))
            runs += 1
            print(f"{killed} kills, {runs} runs, {time.monotonic() - start:.0f} s", flush=True)
        for (moment, name, code), count in sorted(game.counts.items()):
            print(f"{moment:<9} {name:<20} exit {code:>4}: {count}")
    print(f"{killed} kills, {runs} runs: all ended with the parameters {game.wanted[:12]}.")


if __name__ == "__main__":
    main()
