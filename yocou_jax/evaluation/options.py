"""What the user of a task may choose."""

import dataclasses
from pathlib import Path

from yocou_jax.config import MAX_INT32, MAX_LOOPS, ModelConfig
from yocou_jax.errors import UserError
from yocou_jax.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class Options:
    """The choices for a task. None: the task decides.

    folder: the workdir or exported folder of the model. loops: loop counts. source: a text instead
    of the run's held-out split, as in `data.source`. lengths: in tokens; what they are the length
    of, the task says. samples: number of sequences, or of questions. seed: for what is drawn.
    harness, few_shot, end_of_text: tasks of lm-evaluation-harness; questions with their answers
    before each one; whether the end-of-text token comes first.
    """

    folder: Path
    loops: tuple[int, ...] | None = None
    source: str | None = None
    lengths: tuple[int, ...] | None = None
    samples: int | None = None
    seed: int = 0
    harness: tuple[str, ...] = ("python_docs",)
    few_shot: int | None = None
    end_of_text: bool = True

    def __post_init__(self):
        for name, most in (("loops", MAX_LOOPS), ("lengths", 2**24)):
            numbers = getattr(self, name)
            if numbers is not None and not (numbers and all(1 <= n <= most for n in numbers)):
                given = ",".join(map(str, numbers))
                raise UserError(f"--{name}={given} must be whole numbers from 1 to {most}.")
        for name, least in (("samples", 1), ("seed", 0), ("few_shot", 0)):
            number = getattr(self, name)
            if number is not None and not least <= number <= MAX_INT32:
                raise UserError(f"--{name}={number} must be from {least} to {MAX_INT32}.")


def trained_counts(config: ModelConfig) -> list[int]:
    """The counts that training has used. A figure marks them."""
    return list(draw.counts) if (draw := config.loop_draw) else config.program.loop_counts


def with_loops(loaded: Pretrained, count: int) -> Pretrained:
    """The same model, in which every looped stage runs `count` times.

    Raises UserError if the count is not possible, or if no stage is a loop.
    """
    loaded.config.program.with_loops(count)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, num_loops=count))


def models(loaded: Pretrained, options: Options) -> list[tuple[int, Pretrained]]:
    """Each loop count that `options` asks for, with the model that runs its loops so often. By
    default, the model as it is: its count is then the largest one of its loops.

    Raises UserError for a count that is not possible, and if the program has no loop.
    """
    if options.loops is None:
        return [(max(loaded.config.program.loop_counts, default=1), loaded)]
    return [(count, with_loops(loaded, count)) for count in options.loops]


def suffix(count: int, options: Options) -> str:
    """The end of the name of a number with this loop count. "" without `options.loops`, so that
    numbers of models with other counts, as they are, have the same name."""
    return "" if options.loops is None else f"_loops{count}"
