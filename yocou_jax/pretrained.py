"""A trained model: parameters, sizes and tokenizer, read from one of two kinds of folders.

    training workdir     manifest.json    tokenizer.json    checkpoints/
    exported folder      config.json      tokenizer.json    model.safetensors

An exported folder has only what inference needs. Other frameworks can read safetensors files too;
the name of each parameter is its dotted path. Hashes show whether the tokenizer is that of the
model, and whether the parameters are unchanged.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from yocou_jax.checkpoint import load_params
from yocou_jax.config import ComputeConfig, ModelConfig, migrated_fields
from yocou_jax.data.tokenizer import Tokenizer, load_tokenizer
from yocou_jax.errors import UserError
from yocou_jax.files import expand_path
from yocou_jax.model import abstract_params
from yocou_jax.progress import progress
from yocou_jax.sharding import check_split, tree_shardings
from yocou_jax.trees import check_arrays, named_leaves
from yocou_jax.typing import PyTree

FORMAT, VERSION = "yocou_jax", 3  # of an exported folder; raise it if a field changes its meaning
READABLE = (2, 3)  # in version 2, the fields of "compute" were in "model"
CONFIG, WEIGHTS, TOKENIZER = FILES = ("config.json", "model.safetensors", "tokenizer.json")
CONFIG_FIELDS = {
    *("format", "version", "program", "step", "model", "compute"),
    *("tokenizer", "end_of_text", "weights"),  # fingerprint; name; sha256 of the file
}
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors: jax

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model to run.

    params: unboxed, for `LanguageModel(config, ...).apply({"params": params}, ...)`. From a workdir
        they are float32. From an exported folder they have any type of DTYPES.
    compute: as in training, but with attention="auto".
    step: number of training steps; None if it is not known.
    """

    params: PyTree = dataclasses.field(repr=False)
    config: ModelConfig
    compute: ComputeConfig
    tokenizer: Tokenizer
    step: int | None

    def __post_init__(self):
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"The tokenizer has {self.tokenizer.vocab_size} entries, but "
                f"model.vocab_size={self.config.vocab_size}: it is not the tokenizer of this model."
            )


def load(path: str | os.PathLike, mesh: Mesh | None = None, step: int | None = None) -> Pretrained:
    """Reads an exported folder, or a training workdir: the checkpoint of `step`, or the newest
    undamaged one.

    The parameters are split over `mesh` as in training, and each device reads its part. Without a
    mesh they are on the first device. Nothing on disk is changed.

    Raises UserError if the folder is of neither kind, is not complete, cannot be read, has no such
    step, or contains another model or tokenizer than its config says.
    """
    path = expand_path(path)
    if not path.exists():
        raise UserError(f"The path {path} does not exist.")
    if (path / "manifest.json").exists():
        return _load_workdir(path, mesh, step)
    if (path / CONFIG).exists():
        return _load_exported(path, mesh, step)
    raise UserError(
        f"{path} is neither a training workdir (it has no manifest.json) nor an exported folder "
        f"(it has no {CONFIG})."
    )


def export(folder: str | os.PathLike, pretrained: Pretrained) -> None:
    """Writes an exported folder. The same model gives the same bytes. Call it in a single process.

    The folder appears when it is complete; after a kill, a hidden folder may remain next to it.
    Raises UserError if the folder exists and is not empty, if it cannot be written, or if the
    parameters do not fit the config.
    """
    folder, config = expand_path(folder).resolve(), pretrained.config
    found = {name: (list(x.shape), x.dtype.name) for name, x in named_leaves(pretrained.params)}
    _check_parameters("The model to export", found, abstract_params(config))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is not an empty folder: an export overwrites nothing, so remove "
            "it or choose another name."
        )
    description = {
        "format": FORMAT,
        "version": VERSION,
        "program": str(config.program),
        "step": pretrained.step,
        "model": dataclasses.asdict(config),
        "compute": dataclasses.asdict(pretrained.compute),
        "tokenizer": pretrained.tokenizer.fingerprint,
        "end_of_text": pretrained.tokenizer.end_of_text,
    }
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        scratch.mkdir(parents=True)
        (scratch / TOKENIZER).write_bytes(pretrained.tokenizer.to_json().encode())
        # safetensors writes the bytes in the order in which they are in memory, and arrays from an
        # accelerator may have another order than C. On a CPU these arrays are views.
        arrays = {n: np.asarray(x, order="C") for n, x in named_leaves(pretrained.params)}
        save_file(arrays, scratch / WEIGHTS)
        description["weights"] = _sha256(scratch / WEIGHTS)
        (scratch / CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        # safetensors makes files that only their owner can read.
        (scratch / WEIGHTS).chmod((scratch / CONFIG).stat().st_mode)
        for name in FILES:  # on the disk before the rename, in case the power fails
            with (scratch / name).open("rb") as file:
                os.fsync(file.fileno())
        scratch.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UserError(f"The export could not be written to {folder}: {reason}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _load_workdir(path: Path, mesh: Mesh | None, step: int | None) -> Pretrained:
    file = path / "manifest.json"
    manifest = _read_json(file)
    try:
        fields, program = migrated_fields(manifest["config"]), manifest["program"]
        model, compute = fields["model"], fields["compute"]
        end_of_text = manifest["config"]["data"].get("end_of_text", "")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not the manifest of a training run: it lacks config.model, config.data or "
            "program."
        ) from error
    config, compute = _settings(file, model, compute, program)
    tokenizer = _read_tokenizer(file, end_of_text, manifest.get("tokenizer"))
    params, step = load_params(path / "checkpoints", _placed(config, mesh), step)
    return Pretrained(params, config, compute, tokenizer, step)


def _load_exported(path: Path, mesh: Mesh | None, asked: int | None) -> Pretrained:
    file = path / CONFIG
    stored = _read_json(file)
    kind = stored.get("format"), stored.get("version")
    if kind[0] != FORMAT or kind[1] not in READABLE:
        raise UserError(
            f"{file} is of format {kind[0]!r}, version {kind[1]!r}; only format {FORMAT!r}, "
            f"version {' or '.join(map(str, READABLE))} can be read, so export the model again."
        )
    if kind[1] == 2 or "compute" in stored:
        stored = migrated_fields(stored)
    if stored.keys() != CONFIG_FIELDS:
        raise UserError(
            f"{file} has the fields {', '.join(sorted(stored))}, but should have "
            f"{', '.join(sorted(CONFIG_FIELDS))}."
        )
    step = stored["step"]
    if step is not None and type(step) is not int:
        raise UserError(f"{file} has step={step!r}, which must be a whole number or null.")
    if asked not in (None, step):
        raise UserError(f"There is no step {asked} in {path}: an export has one, here {step}.")
    config, compute = _settings(file, stored["model"], stored["compute"], stored["program"])
    tokenizer = _read_tokenizer(file, stored["end_of_text"], stored["tokenizer"])
    params = _read_arrays(_file_of(path, WEIGHTS), _placed(config, mesh), stored["weights"])
    return Pretrained(params, config, compute, tokenizer, step)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{file} cannot be read: {str(error).rstrip('.')}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} does not contain a JSON object.")
    return value


def _settings(
    file: Path, model: Any, compute: Any, program: Any
) -> tuple[ModelConfig, ComputeConfig]:
    """Both groups of settings. Raises UserError if this code makes another program of the sizes
    than training did."""
    for name, fields in (("model", model), ("compute", compute)):
        if not isinstance(fields, Mapping):
            raise UserError(f"{file} has no fields under '{name}', but {fields!r}.")
    try:
        config, compute = ModelConfig.from_dict(model), ComputeConfig.from_dict(compute)
    except UserError as error:
        raise UserError(f"{file} cannot be used: {error}") from error
    if program != str(config.program):
        raise UserError(
            f"{file} is of the program {program!r}, but here model.architecture="
            f"'{config.architecture}' means '{config.program}'."
        )
    # The choice of a kernel is a property of the device that trained, not of the model.
    return config, dataclasses.replace(compute, attention="auto")


def _file_of(path: Path, name: str) -> str:
    if not (path / name).is_file():
        raise UserError(f"The folder {path} has no {name}, which belongs to its model.")
    return str(path / name)


def _placed(config: ModelConfig, mesh: Mesh | None) -> PyTree:
    """Shapes of the parameters, with the shardings that they will get."""
    boxed = abstract_params(config)
    params = nn.unbox(boxed)
    if mesh is not None:
        check_split(boxed, mesh)
        shardings = tree_shardings(boxed, mesh)
    else:
        first = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: first, params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        shardings,
    )


def _check_parameters(owner: str, found: dict[str, tuple[list[int], str]], wanted: PyTree) -> None:
    """Raises UserError if names, shapes or types are not those that `wanted` may have."""
    shapes = {name: list(x.shape) for name, x in named_leaves(nn.unbox(wanted))}
    check_arrays(owner, {name: shape for name, (shape, _) in found.items()}, "its config", shapes)
    for name, (_, dtype) in found.items():
        if dtype not in DTYPES.values():
            raise UserError(
                f"{owner} has {name} in {dtype}; parameters are {', '.join(DTYPES.values())}."
            )


def _read_tokenizer(described: Path, end_of_text: Any, fingerprint: Any) -> Tokenizer:
    """The tokenizer in the folder of `described`. Raises UserError if its fingerprint differs.

    A lossy tokenizer is possible here, because training has allowed it.
    """
    if not isinstance(end_of_text, str) or not isinstance(fingerprint, str | None):
        raise UserError(
            f"{described} has end_of_text={end_of_text!r} and tokenizer={fingerprint!r}, which "
            "must be texts."
        )
    file = _file_of(described.parent, TOKENIZER)
    tokenizer = load_tokenizer(file, end_of_text, allow_lossy=True)
    if fingerprint is None:
        log.warning("%s does not say which tokenizer the model has; %s is used.", described, file)
    elif tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{file} is not the tokenizer of this model: its fingerprint is "
            f"{tokenizer.fingerprint}, but {described} has {fingerprint}. Put the tokenizer "
            "of the model there; with another one, the model writes garbage."
        )
    return tokenizer


def _sha256(file: str | os.PathLike) -> str:
    with progress(f"Hashing {file}"), open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read_arrays(file: str, wanted: PyTree, sha256: str) -> PyTree:
    """The arrays of a safetensors file, as a tree like `wanted`. Each device reads its own part."""
    try:
        with safe_open(file, framework="numpy") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            found = {
                name: (part.get_shape(), DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
            _check_parameters(file, found, wanted)
            if (found := _sha256(file)) != sha256:
                raise UserError(
                    f"{file} is damaged: its sha256 is {found}, but {CONFIG} has {sha256}. Copy "
                    "the folder or export the model again."
                )
            leaves = [
                jax.make_array_from_callback(x.shape, x.sharding, slices[name].__getitem__)
                for name, x in named_leaves(wanted)
            ]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {str(error).rstrip('.')}.") from error
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)
