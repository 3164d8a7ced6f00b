"""The manifest of a run: what it was started with, so that a resume is refused when it differs."""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import jax

from yocou_jax.errors import UserError
from yocou_jax.files import write_atomically

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")

log = logging.getLogger(__name__)


def write_or_check_manifest(
    workdir: str | os.PathLike,
    config: Mapping,
    *,
    resuming: bool,
    corpus: str | None = None,
    free: tuple[str, ...] = (),
    **extra,
) -> dict:
    """Writes workdir/manifest.json (config, code, versions, device, corpus); a resume checks it.

    Args:
      resuming: there is a checkpoint to go on from; without one nothing is compared.
      corpus: fingerprint of the training text.
      free: dotted names of fields that may change on resume, such as "run.log_every".
      extra: anything else worth keeping, as JSON values.

    Raises:
      UserError: on resume, if the config (outside `free`) or the corpus is another one.
    """
    path = Path(workdir) / "manifest.json"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    device = jax.devices()[0].device_kind
    manifest = {
        "created": now,
        "config": json.loads(json.dumps(config)),  # tuples become lists, as they will be when read
        "corpus": corpus,
        "git": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": {"kind": device, "count": jax.device_count(), "processes": jax.process_count()},
        **extra,
    }
    if resuming:
        try:
            before = json.loads(path.read_text())
            _check(before, manifest, free, path.parent)
            manifest |= {"created": before["created"], "resumed": now}
        except (OSError, KeyError, json.JSONDecodeError) as error:
            log.warning("%s cannot be read (%s), so the config is not compared.", path, error)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _check(before: dict, now: dict, free: tuple[str, ...], workdir: Path) -> None:
    differing = differences(flat(before["config"]), flat(now["config"]), ignore=free)
    if differing:
        raise UserError(
            f"The run in {workdir} was started with another config, so it cannot be resumed: "
            f"{'; '.join(differing)}. Give the old values, or choose another workdir."
        )
    if before["corpus"] != now["corpus"]:
        raise UserError(
            f"The training text has changed since the run in {workdir} was started (fingerprint "
            f"{before['corpus']} -> {now['corpus']}), so a resume would see other batches. Bring "
            "the old text (or Python) back, or choose another workdir."
        )
    old, new = ({k: m[k] for k in ("git", "python", "packages", "device")} for m in (before, now))
    if changed := differences(flat(old), flat(new)):
        log.warning(
            "This resume may not be bit-for-bit the run that was begun: %s.", "; ".join(changed)
        )


def flat(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with dotted names."""
    result = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        result |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result


def differences(old: Mapping, new: Mapping, ignore: tuple[str, ...] = ()) -> list[str]:
    """`name: old -> new` for every name whose value differs or is absent on one side."""
    shown = {}
    for name in sorted((old.keys() | new.keys()) - set(ignore)):
        if name not in old or name not in new or old[name] != new[name]:
            shown[name] = [repr(side[name]) if name in side else "absent" for side in (old, new)]
    return [f"{name}: {a} -> {b}" for name, (a, b) in shown.items()]


def _git_revision() -> str | None:
    """The commit of this code, "+dirty" if a tracked file was edited; None outside a checkout."""
    command = ("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+dirty")
    here = Path(__file__).parent
    try:
        answer = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
