"""Whether two trees of this project compute the same, by their own commands."""

import concurrent.futures
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from yocou_jax.errors import UserError
from yocou_jax.program import ARCHITECTURES

ROOT = Path(__file__).parent.parent
SIZES = {
    **{"model.num_layers": 4, "model.vocab_size": 258, "model.d_model": 32, "model.d_ff": 48},
    **{"model.num_heads": 4, "model.num_kv_heads": 2, "model.head_dim": 8, "model.window": 8},
    **{"model.prefix_length": 3, "optimizer.warmup_steps": 3, "data.tokenizer": "bytes"},
    **{"data.batch_size": 4, "data.sequence_length": 32, "data.validation_sequences": 4},
    **{"data.validation_fraction": 0.2, "run.log_every": 1, "run.sample_tokens": 4},
}
EXPERTS = {
    **{"model.num_experts": 4, "model.experts_per_token": 2, "model.num_shared_experts": 1},
    "model.expert_width": 16,
}
VARIANTS = {
    "two of each": {"model.architecture": "window*1@2 | full*1@2 | cross*1@2 | cross*1"},
    "other loop count": {"model.architecture": "yoco_u", "model.num_loops": 2},
    "experts": {"model.architecture": "yoco_u", **EXPERTS},
    "experts with accumulation": {
        **{"model.architecture": "transformer", **EXPERTS},
        **{"optimizer.accumulation_steps": 2, "optimizer.z_loss": 0.01},
    },
    "packing": {"model.architecture": "yoco_u", "data.packing": "true"},
    "muon": {"model.architecture": "yoco_u", "optimizer.name": "muon"},
    "options": {
        **{"model.architecture": "yoco_u", "model.tie_embeddings": "true"},
        **{"model.qk_norm": "true", "model.cross_rope": "true"},
    },
    "bfloat16": {"model.architecture": "yoco_u", "compute.dtype": "bfloat16"},
    "python": {"model.architecture": "yoco_u", "compute.scan": "false"},
    "remat": {"model.architecture": "yoco_u", "compute.remat": "attention"},
}
ALL = {name: {"model.architecture": name} for name in ARCHITECTURES} | VARIANTS
CLOCK = {"tokens_per_s", "data_wait_fraction", "mfu", "elapsed_s"}  # metrics that never repeat
PROMPTS = ("def alpha", "one two three return if one two three delta", "")


def checkout(revision: str, folder: Path) -> None:
    """Unpacks the files of a revision. A git worktree would stay registered after a kill."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", f"{revision}^{{commit}}"]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        words = archive.stderr.decode(errors="replace").strip().removeprefix("fatal: ")
        raise UserError(f"git has no revision '{revision}' here: {words}.")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


def write_text(path: Path) -> None:
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "def", "return", "if"]
    path.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(1500)))


def overrides(case: str, tree: Path, home: Path, steps: int) -> list[str]:
    """The flags of a case, with the field names of this tree."""
    fields = SIZES | ALL[case] | {"data.source": home / "text.txt", "run.steps": steps}
    fields |= {"run.checkpoint_every": steps, "run.sample_every": steps}
    fields |= {"run.eval_every": max(steps // 2, 1), "data.cache_dir": home / "tokens"}
    if "c.compute" not in (tree / "configs/base.py").read_text():  # before it was a group
        fields = {re.sub("^compute", "model", name): value for name, value in fields.items()}
    return ["--config=configs/base.py", *(f"--config.{k}={v}" for k, v in fields.items())]


def run(tree: Path, home: Path, module: str, *arguments: str) -> tuple[str, str]:
    """What a command of the tree writes to stdout and stderr. Raises UserError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments],
        cwd=tree,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(home / "compiled"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"experiments.{module} of {'this tree' if tree == ROOT else 'the revision'} ends with "
            f"{done.returncode}: {' '.join(arguments)}\n{done.stdout}{done.stderr}"
        )
    return done.stdout, done.stderr


def figures(case: str, tree: Path, home: Path, steps: int) -> dict:
    """Every number of a case that must not change, by name; or how the case fails."""
    try:
        return _figures(case, tree, home, steps)
    except UserError as error:
        return {"fails": str(error)}


def _figures(case: str, tree: Path, home: Path, steps: int) -> dict:
    workdir, given = home / case.replace(" ", "_"), overrides(case, tree, home, steps)
    report, _ = run(tree, home, "account", *given, "--json", "--lengths=7,64,1000")
    run(tree, home, "train", *given, f"--workdir={workdir}")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {
        f"{name} of step {row['step']}": value
        for row in rows
        for name, value in row.items()
        if name not in CLOCK
    }
    summary = json.loads((workdir / "summary.json").read_text())
    found |= {name: summary[name] for name in ("final_params_sha256", "val_loss", "val_bpb")}
    options = [f"--prompt={prompt}" for prompt in PROMPTS]
    options += ["--temperature=0", "--max_new_tokens=24", "--chunk=16"]
    text, notes = run(tree, home, "generate", f"--workdir={workdir}", *options)
    found["greedy text"] = text
    found["KV cache, bytes"] = re.search(r"KV cache ([\d,]+) bytes", notes)[1]
    accounting = json.loads(report)
    accounting.pop("command", None)  # it names the file of the config
    return found | {"accounting report": accounting}


def differences(here: dict, there: dict) -> dict[str, tuple]:
    """name -> (here, there), in order, for each figure that differs or that one tree lacks."""
    nothing = "(none)"
    pairs = {name: (here.get(name, nothing), there.get(name, nothing)) for name in here | there}
    # Through repr: NaN is NaN, and 1 is not 1.0.
    return {name: pair for name, pair in pairs.items() if repr(pair[0]) != repr(pair[1])}


def both(here: dict, there: dict) -> bool:
    return "fails" in here and "fails" in there


def compare(revision: str, cases: list[str], steps: int) -> dict[str, dict]:
    """For each case how many figures were compared, and which of them differ."""
    with tempfile.TemporaryDirectory(prefix="same_numbers-") as temporary:
        homes = [Path(temporary) / name for name in ("here", "there")]
        trees = [ROOT, Path(temporary) / "revision"]
        checkout(revision, trees[1])
        for home in homes:
            home.mkdir()
            write_text(home / "text.txt")
        jobs = [
            (case, tree, home) for case in cases for tree, home in zip(trees, homes, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            here_and_there = list(pool.map(lambda job: figures(*job, steps), jobs))
    pairs = zip(here_and_there[::2], here_and_there[1::2], strict=True)
    return {
        # If a case fails in both trees, nothing was compared. So it is reported as a difference.
        case: {"compared": len(here | there), "differ": differences(here, there)}
        | ({"differ": {"fails": (here["fails"], there["fails"])}} if both(here, there) else {})
        for case, (here, there) in zip(cases, pairs, strict=True)
    }
