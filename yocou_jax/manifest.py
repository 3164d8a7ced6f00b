"""The manifest of a run says what it was started with. A resume with other settings is an error."""

import datetime
import importlib.metadata
import json
import logging
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import jax

from yocou_jax.config import migrated_fields
from yocou_jax.errors import UserError
from yocou_jax.files import write_atomically
from yocou_jax.trees import differences, flat

FILE = "manifest.json"
CODE = ("git", "python", "packages", "device")  # if one changes, the last bits may change
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")

log = logging.getLogger(__name__)


def describe(
    config: Mapping, *, corpus: str | None = None, tokenizer: str | None = None, **extra
) -> dict:
    """What a run is started with: config, code, versions and device.

    corpus, tokenizer: fingerprints. extra: other JSON values to store.
    """
    device = jax.devices()[0].device_kind
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": json.loads(json.dumps(config)),  # tuples become lists, as in the file
        "corpus": corpus,
        "tokenizer": tokenizer,
        "git": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": {"kind": device, "count": jax.device_count(), "processes": jax.process_count()},
        **extra,
    }


def read(workdir: Path) -> dict | None:
    """The manifest of a run. If it cannot be read, logs a warning and returns None."""
    path = workdir / FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["config"] = migrated_fields(manifest["config"])
        flat(manifest["config"])
        return manifest | {key: manifest[key] for key in ("created", "corpus")}
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        log.warning("%s cannot be read (%s), so the config is not compared.", path, error)
        return None


def write(workdir: Path, manifest: Mapping) -> None:
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / FILE, json.dumps(manifest, indent=1) + "\n")


def check_resume(workdir: Path, before: dict, now: dict, free: tuple[str, ...]) -> None:
    """Checks that a run with the manifest `before` can be resumed with the manifest `now`.

    `free` names the fields of the config that may change. Raises UserError if another field, the
    training text or the tokenizer has changed. Warns of other versions and devices.
    """
    differing = differences(flat(before["config"]), flat(now["config"]), ignore=free)
    if differing:
        words = "another config"
        if (flat(before["config"]).keys() ^ flat(now["config"]).keys()) - set(free):
            words = "another version of this code, with other config fields"
        raise UserError(
            f"The run in {workdir} was started with {words}, so it cannot be resumed: "
            f"{'; '.join(differing)}. Give the old values, or give this run a new workdir: "
            f"--workdir={workdir}{_suffix(before, now, free)}."
        )
    for what, words in (("corpus", "training text"), ("tokenizer", "tokenizer")):
        if before.get(what, now[what]) != now[what]:
            raise UserError(
                f"The {words} has changed since the run in {workdir} was started (fingerprint "
                f"{before[what]} -> {now[what]}), so a resume would see other batches. Bring "
                "the old text (or Python) back, or choose another workdir."
            )
    old, new = ({k: m.get(k) for k in CODE} for m in (before, now))
    if changed := differences(flat(old), flat(new)):
        log.warning(
            "The resumed run may differ in the last bits from an uninterrupted run, because its "
            "code, versions or device have changed: %s.",
            "; ".join(changed),
        )


def _suffix(before: dict, now: dict, free: tuple[str, ...]) -> str:
    """A suffix for the workdir of a new run: the first field that differs, as in -window=9."""
    old, new = flat(before["config"]), flat(now["config"])
    names = sorted(k for k in old.keys() & new.keys() if k not in free and old[k] != new[k])
    suffix = f"-{names[0].rpartition('.')[2]}={new[names[0]]}" if names else ""
    return suffix if re.fullmatch(r"[\w.=+-]{1,40}", suffix) else "-2"


def _git_revision() -> str | None:
    """The commit of this code, with "+dirty" if a tracked file outside of results/ has changed: a
    comparison writes there itself. None without git."""
    commands = (
        ("git", "describe", "--always", "--abbrev=40", "--exclude=*"),
        ("git", "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)results"),
    )
    try:
        commit, changes = (
            subprocess.run(
                command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
            )
            for command in commands
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    dirty = "+dirty" if changes.returncode == 1 else ""
    return commit.stdout.strip() + dirty if commit.returncode == 0 else None
