"""How a run is resumed with other settings or another end, or starts from other weights."""

from pathlib import Path
from typing import NamedTuple

import jax

from yocou_jax import pretrained
from yocou_jax.config import END, FREE, Config, resumable
from yocou_jax.data.tokenizer import Tokenizer
from yocou_jax.errors import UserError
from yocou_jax.training.optimizer import decay_starts, make_schedule
from yocou_jax.training.step import Setup
from yocou_jax.trees import check_arrays, differences, flat, named_leaves
from yocou_jax.typing import PyTree

FREE_FIELDS, END_FIELDS = resumable(FREE), resumable(END)


def compare_starts(
    workdir: Path, before: dict, config: Config, first: int, init_from: Path | None
) -> tuple[list[str], bool]:
    """Compares a run that has done `first` updates with `before`, the manifest of its last start.

    Returns sentences about what has changed, and whether the run is exact: all learning rates so
    far are those of the schedule in `config`. Raises UserError if the run did not start from the
    weights of `init_from`, and the errors of `new_end`.
    """
    started = (before.get("init_from") or {}).get("path")
    if init_from is not None and started != str(init_from):
        raise UserError(
            f"The run in {workdir} was started from {started or 'scratch'} and is at step {first}: "
            f"--init_from={init_from} needs another workdir."
        )
    old, now = flat(before["config"]), flat(config.to_dict())
    changed = differences(old, now, ignore=tuple(k for k in now if k not in FREE_FIELDS))
    notices = [f"Changed since the last start: {'; '.join(changed)}."] if changed else []
    exact = all(resume.get("exact", False) for resume in before.get("resumes", []))
    if any(old.get(name) != now[name] for name in END_FIELDS):
        sentence, exact_now = new_end(Config.from_dict(before["config"]), config, first)
        notices.append(sentence)
        if exact_now and not exact:
            notices.append(
                "But an earlier change of the end came after a decay had begun, so the run differs "
                "from one that had the new end from its start."
            )
        exact = exact and exact_now
    return notices, exact


def new_end(old: Config, new: Config, first: int) -> tuple[str, bool]:
    """What another end of the schedule changes in a run that has done `first` updates.

    Returns a sentence, and whether the old and the new schedule have the same learning rates up to
    here. Raises UserError if the run has done more steps than the new end allows. Also raises it
    if the old or the new schedule is a cosine, and an update so far depends on its end.
    """
    if first > new.run.steps:
        raise UserError(
            f"The run has done {first} updates already, more than run.steps={new.run.steps}."
        )
    ends = [decay_starts(c.optimizer, c.run.steps) for c in (old, new)]
    changes = differences(*({n: flat(c.to_dict())[n] for n in END_FIELDS} for c in (old, new)))
    words = f"The end of the schedule has changed ({'; '.join(changes)})"
    if all(end is None or first <= end for end in ends):
        words += ": no update so far depends on it, so the run is the same as with the new end"
        return f"{words} from its start.", True
    if "cosine" in (old.optimizer.schedule, new.optimizer.schedule):
        raise UserError(
            f"{words}, but the {first} updates done depend on it: the cosine falls over the whole "
            "run.steps. Give the old values, or start a new run with --init_from=WORKDIR. A run "
            "with optimizer.schedule=constant or wsd can be made longer."
        )
    words += " after a decay had begun. A run with the new values from its start would differ"
    if first == new.run.steps:
        return f"{words}.", False
    rates = [float(make_schedule(c.optimizer, c.run.steps)(first)) for c in (old, new)]
    words += f": the learning rate of update {first + 1} is {rates[1]:.4g}; in the old schedule"
    return f"{words} it is {rates[0]:.4g} (if no update was skipped).", False


class Source(NamedTuple):
    """The parameters that a run starts with (sharded as those of the run), the step at which they
    were saved (None: unknown), and sentences for the user."""

    params: PyTree
    step: int | None
    notices: list[str]


def load_source(path: Path, setup: Setup, config: Config, tokenizer: Tokenizer) -> Source:
    """The parameters of a workdir or an exported folder for a run of `config`.

    Raises UserError if its tokenizer or the shape of an array differs.
    """
    source = pretrained.load(path, setup.mesh)
    if source.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"The model of {path} has another tokenizer than this run, so its embeddings do not "
            f"fit: give --config.data.tokenizer={path}/tokenizer.json, and its "
            "data.end_of_text and data.allow_lossy_tokenizer."
        )
    wanted = setup.abstract_state.params
    found, needed = (
        {name: list(x.shape) for name, x in named_leaves(tree)} for tree in (source.params, wanted)
    )
    check_arrays(f"The model of {path}", found, "this config's model", needed)
    step = "" if source.step is None else f", step {source.step}"
    notices = [f"Started from the parameters of {path}{step}."]
    settings = (source.config, source.compute), (config.model, config.compute)
    old, new = (flat({"model": vars(model), "compute": vars(how)}) for model, how in settings)
    if changed := differences(old, new, ignore=FREE_FIELDS):
        notices.append(f"Its model differs: {'; '.join(changed)}.")
    # `load` has sharded them over the mesh as training does.
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), source.params, wanted)
    return Source(params, source.step, notices)
