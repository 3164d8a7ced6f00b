"""All that the owner of a device can tell about it in a few minutes, part by part.

A part is a command in a process of its own. It may use its share of the time that is left: so a
part that hangs takes nothing from the others, and one that ends early gives them more. Its result
is written as soon as it has ended, even if it failed; so a run that is cut short still has its
parts.
"""

import functools
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import device
from benchmarks.report import Grid, page, plain_name, write_json
from pallas_kernels import children
from yocou_jax.files import write_atomically

BUDGET_S = 480.0
LEAST_S = 15.0  # a part does not start if its share is less
FIRST = 0.5  # share of the first part: without its answer there are no others
EVERY, STEPS = 40, 160  # of the run that is killed
TEXT = ["--config.data.source=python", "--config.data.tokenizer=bytes"]  # needs no network
SMALL = [
    *("--config.model.num_layers=2", "--config.model.d_model=64", "--config.model.num_heads=2"),
    *("--config.model.num_kv_heads=1", "--config.model.head_dim=64", "--config.model.d_ff=128"),
    *("--config.model.vocab_size=512", "--config.model.window=64", "--config.data.batch_size=8"),
    *("--config.data.sequence_length=256", "--config.data.validation_sequences=8"),
]


class Part(NamedTuple):
    """A command, as the words after `python`. {out} in a word is a folder for its files, of which
    `file` has its result if it was stopped before its end. {budget} is 0.6 of its seconds, because
    a command looks at its budget only before it begins something new. weight: its share of the time
    that is left, compared with those of the parts after it."""

    name: str
    question: str
    words: list[str]
    weight: float = 1.0
    file: str | None = None


def _command(name: str, *words: str) -> list[str]:
    return ["-m", f"experiments.{name}", "--json", *words]


def first_part() -> Part:
    """It says which device this is, on which all others depend."""
    question = "What is this machine, and which kernels are right on odd shapes?"
    # One kernel that hangs must leave time for the others.
    return Part("check", question, _command("check_device", "--quick", "--limit_s=60"))


def parts(report: dict[str, Any]) -> list[Part]:
    """The other parts, the most important first. report: the result of the first one."""
    found = report["machine"]["devices"]
    on_cpu, count = found["platform"] == "cpu", found["count"]
    auto = {o: choice["implementation"] for o, choice in report["auto"].items()}
    kernel = auto["window_attention"]
    kernels_s, inference_s = ("10", "20") if on_cpu else ("{budget}",) * 2
    made = [
        Part(
            "kernels",
            "How accurate and how fast is each kernel at real sizes?",
            _command("benchmark_kernels", "--out={out}", "--budget_s=" + kernels_s),
            100,
            "kernels.json",
        ),
        _resume("resume", "auto", False),
    ]
    if kernel != "xla":  # xla is what a kernel is compared with
        made.insert(
            1,
            Part(
                "parity",
                f"Does a model learn the same with {kernel} as with xla?",
                _command(
                    *("kernel_parity", f"--implementation={kernel}"),
                    *(f"--steps={10 if on_cpu else 100}", "--config.data.source=python"),
                ),
                80,
            ),
        )
    if found["platform"] in ("gpu", "cuda"):
        # By its name, because "auto" would check all kernels again under another flag of XLA.
        both = kernel if set(auto.values()) == {kernel} else "xla"
        made.append(_resume("resume_deterministic", both, True))
    for name, rows in (("yocou_small",) * 2,) if on_cpu else (("yocou_125m", 8), ("yocou_1b", 2)):
        made.append(_training(name, rows, count))
    words = ["--config=configs/yocou_1b.py", "--out={out}/inference.json"]
    words += [f"--budget_s={inference_s}", *(["--lengths=1024"] if on_cpu else [])]
    return [
        *made,
        Part(
            "inference",
            "How fast are prefill and decode, to which length?",
            _command("profile_inference", *words),
            110,
            "inference.json",
        ),
    ]


def _training(name: str, rows: int | str, count: int) -> Part:
    """On `rows` sequences per device."""
    words = [f"--config=configs/{name}.py", "--rounds=1", "--steps=2", *TEXT]
    if isinstance(rows, int):
        words += [f"--config.data.batch_size={rows * count}", f"--config.mesh.fsdp={count}"]
        words += ["--config.optimizer.accumulation_steps=1"]
    else:
        words += SMALL
    question = f"How fast does {name} train?"
    return Part(f"training_{name}", question, _command("benchmark_training", *words), 85)


def _resume(name: str, attention: str, deterministic: bool) -> Part:
    call = f"verify.resume({attention!r}, {deterministic})"
    code = f"import json; from benchmarks import verify; print(json.dumps({call}))"
    flag = " with --xla_gpu_deterministic_ops" if deterministic else ""
    question = f"Does a run that was killed end with the same parameters, bit for bit{flag}?"
    return Part(name, question, ["-c", code], 130)  # 109 s on 2 CPU cores


# --- Kill and resume ------------------------------------------------------------------------------


def resume(attention: str, deterministic: bool) -> dict[str, Any]:
    """Trains a small model twice: once without a stop, and once killed with SIGKILL after its first
    checkpoint, and started again. Compares the parameters at the end."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_gpu_deterministic_ops=true" if deterministic else ""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        env = os.environ | {
            "XLA_FLAGS": flags.strip(),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        train = functools.partial(_train, folder, attention=attention, env=env)
        train("whole").wait()
        run = train("killed")
        checkpoint = folder / "killed" / "checkpoints" / str(EVERY)
        while run.poll() is None and not checkpoint.is_dir():
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        was_killed = run.wait() == -signal.SIGKILL
        train("killed").wait()
        whole, killed = _sha(folder / "whole"), _sha(folder / "killed")
        same = was_killed and whole is not None and whole == killed
        log = (folder / "log").read_text(encoding="utf-8", errors="replace")
    facts = {"xla_flags": flags.strip(), "whole_sha256": whole, "resumed_sha256": killed}
    return facts | {"was_killed": was_killed, "same": same, "log": "" if same else log[-2000:]}


def _train(folder: Path, workdir: str, attention: str, env: dict[str, str]) -> subprocess.Popen:
    words = [
        *("-m", "experiments.train", "--config=configs/yocou_small.py"),
        f"--config.compute.attention={attention}",
        *(f"--workdir={folder / workdir}", f"--config.data.cache_dir={folder / 'cache'}"),
        *(f"--config.run.steps={STEPS}", f"--config.run.checkpoint_every={EVERY}"),
        *(*TEXT, *SMALL, f"--config.data.source={json.__path__[0]}/*.py"),
    ]
    with (folder / "log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(children.bound(words, BUDGET_S), env=env, stdout=log, stderr=log)


def _sha(workdir: Path) -> str | None:
    try:
        summary = (workdir / "summary.json").read_text(encoding="utf-8")
    except OSError:
        return None
    return json.loads(summary)["final_params_sha256"]


# --- The parts, one after the other ---------------------------------------------------------------


def run(part: Part, limit_s: float) -> dict[str, Any]:
    """The result of a part: its command, its seconds, its answer, and a sentence if it did not end
    as it should."""
    words = [word.replace("{budget}", f"{0.6 * limit_s:.0f}") for word in part.words]
    shown = [word.replace("{out}", "OUT") for word in words]
    record: dict[str, Any] = {"part": part.name, "question": part.question, "command": shown}
    record |= {"date": device.today(), "seconds": 0.0, "failure": None, "answer": None}
    if limit_s < LEAST_S:
        return record | {"failure": "It did not start, because the time was over."}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        ended = children.run([word.replace("{out}", out) for word in words], limit_s)
        if ended.rows:
            record["answer"] = ended.rows[-1]
        elif part.file is not None and (Path(out) / part.file).exists():
            record["answer"] = json.loads((Path(out) / part.file).read_text(encoding="utf-8"))
    record["seconds"] = time.monotonic() - start
    if ended.code != 0:
        # Exit code 1 with an answer: the command says what is wrong in it.
        said = ended.code == 1 and bool(ended.rows)
        record["failure"] = (
            "The answer says what is wrong."
            if said
            else f"The command {children.how(ended, round(limit_s))}.".replace("..", ".")
        )
        record["log"] = ended.log
    return record


def write(folder: Path, record: dict[str, Any]) -> None:
    """Writes PART.json and PART.md; each is complete at any time."""
    write_json(folder / f"{record['part']}.json", record)
    facts = [record["question"], f"`python {' '.join(record['command'])}`"]
    facts.append(f"{record['date']}, {record['seconds']:.0f} s. {record['failure'] or ''}".strip())
    rows = [[name, text] for name, text in _scalars("", record["answer"])]
    grids = [Grid("answer", ["what", "value"], rows)] if rows else []
    text = page(f"{record['part']}", facts, grids, ())
    write_atomically(folder / f"{record['part']}.md", text)


def _scalars(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    """The numbers and words of an answer; those in long lists are only in the JSON file."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _scalars(f"{prefix}.{name}".lstrip("."), inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value[:40] if value and isinstance(value[0], dict) else ()):
            yield from _scalars(f"{prefix}[{i}]", inner)
    elif value not in (None, ""):
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        yield prefix, " ".join(text.split())[:300]


def measure(
    results: Path, budget_s: float = BUDGET_S, say: Callable[[str], None] = lambda line: None
) -> tuple[Path, list[str]]:
    """Runs all parts and writes them to a folder of `results` with the name of the device. Returns
    the folder and sentences about what failed. If the first part did not find out which device this
    is, its log is all that there is, in the folder unknown-device."""
    end = time.monotonic() + budget_s

    def done(part: Part, share: float) -> dict[str, Any]:
        left = end - time.monotonic()
        say(f"{budget_s - left:4.0f} s  {part.name}: {part.question}")
        return run(part, share * left)

    first = done(first_part(), FIRST)
    known = (first["answer"] or {}).get("auto")
    kind = first["answer"]["machine"]["devices"]["kind"] if known else "unknown device"
    folder = results / plain_name(kind)
    folder.mkdir(parents=True, exist_ok=True)
    records = [first]
    write(folder, first)
    if not known:
        return folder, [f"check: {first['failure'] or 'jax has no device.'}"]
    others = parts(first["answer"])
    for i, part in enumerate(others):
        records.append(done(part, part.weight / sum(p.weight for p in others[i:])))
        write(folder, records[-1])
    return folder, [f"{r['part']}: {r['failure']}" for r in records if r["failure"]]
