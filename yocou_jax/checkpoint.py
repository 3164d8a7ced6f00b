"""Checkpoints that survive a kill.

Orbax's CheckpointManager writes the arrays in the background. TensorStore, which writes the files,
notices truncated files but not a flipped bit, and its errors have hundreds of lines. So this file
adds an inventory to each checkpoint: the size and the sha256 of every file. A folder that differs
from its inventory is damaged.

The inventory is written last, and for a large model that takes minutes, because process 0 reads all
files again. A run that is killed in between leaves a folder without an inventory. Orbax notes the
time of the commit in the folder, after all processes have written their files. A folder with this
time and without an inventory is not verified: it is used, with a warning, if all its bytes can be
read. A folder without both was never finished. A resume skips what is damaged or was never
finished before Orbax reads it.

    checkpoints/<step>/{state/, layout/, inventory.json}     checkpoints/passed-over-<step>/

The directory is local, or on a file system that all processes share.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from yocou_jax.errors import UserError
from yocou_jax.files import write_atomically
from yocou_jax.foreign import no_room
from yocou_jax.progress import progress
from yocou_jax.trees import check_arrays, named_leaves
from yocou_jax.typing import AnyArray, PyTree

INVENTORY = "inventory.json"
HASHED_AT_ONCE = 2**26
UNFINISHED = "it was never finished"

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves training states and keeps the newest `keep`. The training loop decides when to save.

    The state is a pytree of jax arrays. The same tree of `jax.ShapeDtypeStruct` with shardings
    restores it, onto any mesh. `save` copies the arrays and writes them while training continues.
    The next `save` or `close` raises an error of this write, as a UserError.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        if keep < 2:
            raise UserError(
                f"Keeping {keep} checkpoint is too few: give 2 or more, so that an older one is "
                "left if the newest is damaged."
            )
        self.directory = Path(directory).absolute()
        self._manager: ocp.CheckpointManager | None = None
        self._keep, self._closed = keep, False
        self._newest: tuple[int | None, dict[int, str]] | None = None
        self._finishing: threading.Thread | None = None
        self._saving, self._error = -1, None

    def _open_manager(self) -> ocp.CheckpointManager:
        """Orbax's manager. Before the first call, nothing on disk is changed. The first call comes
        with the first save, or when a resume has found a complete checkpoint."""
        if self._closed:
            raise ValueError("This Checkpointer is closed.")
        if self._manager is None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
                self._put_aside(
                    {s: UNFINISHED for s in _steps(self.directory) if not self._finished(s)}
                )
                self._manager = ocp.CheckpointManager(
                    self.directory,
                    options=ocp.CheckpointManagerOptions(
                        preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
                        enable_async_checkpointing=True,
                        create=False,
                    ),
                )
            except OSError as error:
                raise UserError(
                    f"The checkpoint directory {self.directory} cannot be used: {_reason(error)}."
                ) from error
        return self._manager

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # another process may be dead, and the last save would wait for it
        try:
            self.close()
        except UserError as failure:
            if kind is None:
                raise
            log.warning("%s", failure)  # the error that ended the run is raised

    def save(self, step: int, state: PyTree) -> bool:
        """Begins to save; then `state` may be donated. False if this step has a checkpoint."""
        self._raise_error_of_last_save(wait=False)
        if step in self._open_manager().all_steps():
            return False
        self._raise_error_of_last_save(wait=True)
        self._saving = step
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), layout=ocp.args.JsonSave(_layout(state))
        )
        try:
            self._open_manager().save(step, args=args, force=True)
        except Exception as error:
            raise UserError(self._failure(error)) from error
        self._finishing = threading.Thread(target=self._finish, args=(step,), name="finish")
        self._finishing.start()
        return True

    def newest_undamaged(self) -> int | None:
        """The step that `restore_latest` restores. The first call reads all its files.

        Raises UserError if there are finished checkpoints and all of them are damaged.
        """
        if self._newest is None:
            finished = [step for step in _steps(self.directory) if self._finished(step)]
            self._newest = _newest_undamaged(self.directory, finished)
        step, damaged = self._newest
        if step is None and damaged:
            raise UserError(
                f"No checkpoint in {self.directory} can be read: "
                + "; ".join(f"of step {s}, {why}" for s, why in damaged.items())
                + ". Move the directory away, or choose another workdir, to start from step 0."
            )
        return step

    def restore_latest(self, abstract_state: PyTree) -> tuple[PyTree, int] | None:
        """The newest undamaged checkpoint as (state, step), or None if there is none.

        Skips newer checkpoints that are damaged or unfinished: logs a warning and renames them, so
        that their steps can be saved again. Raises UserError, and changes nothing, if all are
        damaged, or if the arrays differ from those of `abstract_state`.
        """
        step = self.newest_undamaged()
        if step is None:
            return None
        state = _restore(self.directory, step, abstract_state)
        _, damaged = self._newest
        self._put_aside({s: f"{why}; step {step} is used instead" for s, why in damaged.items()})
        self._open_manager()
        return state, step

    def close(self) -> None:
        """Waits for the last save, and raises its error. A second call does nothing."""
        self._closed = True
        if self._manager is not None:
            try:
                self._raise_error_of_last_save(wait=True)
            finally:
                manager, self._manager = self._manager, None
                with contextlib.suppress(Exception):  # this raises the error of the last save again
                    manager.wait_until_finished()
                manager.close()

    def _finished(self, step: int) -> bool:
        folder = self.directory / str(step)
        return (folder / INVENTORY).exists() or _committed(folder)

    def _remove_unfinished(self) -> None:
        """Removes what a run that was killed while it saved has left under temporary names.

        Orbax's cleanup_tmp_directories does so in a thread for which only its next save waits: it
        may still be removing when this manager is closed and another one saves in the directory.
        """
        if jax.process_index() == 0:  # the others wait for it in _put_aside
            for path in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)

    def _put_aside(self, reasons: dict[int, str]) -> None:
        for step, why in reasons.items() if jax.process_index() == 0 else ():
            log.warning("Checkpoint %d in %s was skipped: %s.", step, self.directory, why)
            aside = self.directory / f"passed-over-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints put aside")

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self.directory / str(step)
                write_atomically(folder / INVENTORY, json.dumps(_inventory(folder), indent=1))
        except Exception as error:
            self._error = error

    def _raise_error_of_last_save(self, *, wait: bool) -> None:
        if self._finishing is not None and (wait or not self._finishing.is_alive()):
            self._finishing.join()
            self._finishing, error, self._error = None, self._error, None
            if error is not None:
                raise UserError(self._failure(error)) from error

    def _failure(self, error: Exception) -> str:
        steps = (s for s in _steps(self.directory) if s != self._saving and self._finished(s))
        latest = max(steps, default=0)
        return (
            f"The checkpoint of step {self._saving} could not be written to {self.directory}: "
            f"{_reason(error)}. Older ones are not lost: remove the cause, and the same "
            f"command resumes from step {latest}."
        )


def load_params(
    directory: str | os.PathLike, abstract_params: PyTree, step: int | None = None
) -> tuple[PyTree, int]:
    """(params, step) of the checkpoint of `step`, by default of the newest undamaged checkpoint.

    Changes nothing on disk. The parameters get the types and shardings of `abstract_params`
    (without a sharding: the first device). Raises UserError if there is no such checkpoint, or if
    it is damaged.
    """
    directory = Path(directory).absolute()
    steps = _steps(directory)
    if step is not None and step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(
            f"There is no checkpoint of step {step} in {directory}; the steps there: {there}."
        )
    found, damaged = _newest_undamaged(directory, steps if step is None else [step])
    if step in damaged:
        raise UserError(
            f"The checkpoint of step {step} in {directory} cannot be read: {damaged[step]}."
        )
    for bad, why in damaged.items():
        log.warning("Checkpoint %d was skipped: %s.", bad, why)
    if found is None:
        raise UserError(f"There is no checkpoint to read in {directory}.")
    return _restore(directory, found, {"params": abstract_params}, partial=True)["params"], found


def _restore(directory: Path, step: int, abstract: PyTree, partial: bool = False) -> PyTree:
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    with ocp.CheckpointManager(directory, options=options) as manager:

        def read(**items):
            return manager.restore(step, args=ocp.args.Composite(**items))

        stored, wanted = read(layout=ocp.args.JsonRestore())["layout"], _layout(abstract)
        if partial:  # ignores other entries and other types
            stored = {n: [v[0], wanted[n][1]] for n, v in stored.items() if n in wanted}
        check_arrays(f"Checkpoint {step} in {directory}", stored, "this model", wanted)
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), abstract
        )
        if not partial:
            return read(state=ocp.args.StandardRestore(target))["state"]
        how = ocp.checkpoint_utils.construct_restore_args(target)
        return read(
            state=ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True)
        )["state"]


def _layout(tree: PyTree) -> dict[str, list]:
    return {name: [list(x.shape), str(x.dtype)] for name, x in named_leaves(tree)}


def _steps(directory: Path) -> list[int]:
    return [int(p.name) for p in directory.glob("*") if p.name.isdigit()]


def _newest_undamaged(directory: Path, steps: list[int]) -> tuple[int | None, dict[int, str]]:
    """The newest undamaged step, and what is wrong with each newer one. Process 0 decides."""
    damaged = {}
    for step in sorted(steps, reverse=True):
        why = _damage(directory / str(step)) if jax.process_index() == 0 else ""
        if jax.process_count() > 1:
            undamaged = bool(multihost_utils.broadcast_one_to_all(np.array(not why)))
            why = "" if undamaged else why or "it is damaged"
        if not why:
            if jax.process_index() == 0 and not (directory / str(step) / INVENTORY).exists():
                log.warning(
                    "Checkpoint %d in %s is complete, but was not verified: all its files can be "
                    "read, but a changed byte in them would not be noticed.",
                    *(step, directory),
                )
            return step, damaged
        damaged[step] = why
    return None, damaged


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint, as the end of a sentence. Empty if nothing is wrong."""
    if not (folder / INVENTORY).exists():
        return _unreadable(folder) if _committed(folder) else UNFINISHED
    try:
        expected, found = (
            json.loads((folder / INVENTORY).read_text(encoding="utf-8")),
            _inventory(folder),
        )
        for name, entry in expected.items():
            if found.get(name) != entry:
                return f"its file {name} {'has changed' if name in found else 'is missing'}"
    except (OSError, ValueError, AttributeError) as error:
        return f"its {INVENTORY} cannot be read ({_reason(error)})"
    return ""


def _committed(folder: Path) -> bool:
    """Whether Orbax says that all processes have written their files."""
    try:
        metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
        return metadata["commit_timestamp_nsecs"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _unreadable(folder: Path) -> str:
    """What cannot be read of a checkpoint without an inventory, as the end of a sentence.

    TensorStore notices a file that is too short. One part of an array is in memory at a time.
    """
    name = "state"
    try:
        described = [*(folder / "state/array_metadatas").glob("*")]
        if not described:
            return "its state/array_metadatas is missing"
        for path in (folder / "layout/metadata", folder / "state/_METADATA", *described):
            name = str(path.relative_to(folder))
            json.loads(path.read_text(encoding="utf-8"))
        name = "state"
        files = {"driver": "file", "path": f"{folder / name}/"}
        arrays = tensorstore.KvStore.open({"driver": "ocdbt", "base": files}).result()
        with progress(f"Reading the checkpoint {folder}"):
            keys = arrays.list().result()
            # What was in a missing file has no bytes, and without the manifest there are no keys.
            if not keys or not all(arrays.read(key).result().value for key in keys):
                return f"a file of its {name} is missing"
    except (OSError, ValueError) as error:
        return f"its {name} cannot be read ({_reason(error)})"
    return ""


def _inventory(folder: Path) -> dict[str, list]:
    """[size, sha256] of every file except the inventory itself."""
    inventory = {}
    with progress(f"Hashing the checkpoint {folder}"):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if path.name.removesuffix(".new") != INVENTORY:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                inventory[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    return inventory


def _reason(error: Exception) -> str:
    """The cause in a few words: an error of TensorStore may have hundreds of lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if words := no_room(error):
        return words
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}".rstrip(".: ")


def params_sha256(params: PyTree) -> str:
    """A hash of names, types, shapes and bytes. Equal hashes mean equal parameters, bit for bit.

    Every process must call it, because arrays that are split over processes are gathered, in pieces
    of at most HASHED_AT_ONCE bytes: the host of one process may not have room for a whole one.
    """
    digest = hashlib.sha256()
    with progress("Hashing the parameters"):
        for name, x in sorted(named_leaves(params), key=lambda pair: pair[0]):
            digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
            for piece in _pieces(x):
                apart = isinstance(piece, jax.Array) and not piece.is_fully_addressable
                if apart and not piece.is_fully_replicated:
                    piece = multihost_utils.process_allgather(piece, tiled=True)
                digest.update(np.asarray(piece).tobytes())
    return digest.hexdigest()


def _pieces(x: AnyArray) -> Iterator[AnyArray]:
    """x in consecutive pieces, in the order of its bytes."""
    if x.nbytes <= HASHED_AT_ONCE or x.ndim == 0:
        yield x
    elif rows := HASHED_AT_ONCE // (x.nbytes // len(x)):
        for first in range(0, len(x), rows):
            yield x[first : first + rows]
    else:
        for row in range(len(x)):
            yield from _pieces(x[row])
