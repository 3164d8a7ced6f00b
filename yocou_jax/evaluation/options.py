"""What the user of a task may choose."""

import dataclasses
from pathlib import Path

from yocou_jax.config import MAX_INT32, MAX_LOOPS, ModelConfig
from yocou_jax.errors import UserError
from yocou_jax.pretrained import Pretrained
from yocou_jax.program import Program


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
    few_shot: int = 0
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


def loop_counts(program: Program) -> list[int]:
    """The counts of the looped stages, without repetition; [] if there is no loop."""
    return sorted({stage.loops for stage in program.stages if stage.loops is not None})


def trained_counts(config: ModelConfig) -> list[int]:
    """The counts that training has used. A figure marks them."""
    return loop_counts(config.program)


def with_loops(loaded: Pretrained, count: int) -> Pretrained:
    """The same model, in which every looped stage runs `count` times.

    Raises UserError if the count is not possible, or if no stage is a loop.
    """
    loaded.config.program.with_loops(count)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, num_loops=count))


def with_one_count(loaded: Pretrained, options: Options) -> Pretrained:
    """The model with the one count of `options.loops`, or as it is. Raises UserError for several
    counts."""
    if options.loops is None:
        return loaded
    if len(options.loops) > 1:
        given = ",".join(map(str, options.loops))
        raise UserError(
            f"--loops={given} has {len(options.loops)} counts, but this task takes one. "
            "--task=loops compares several."
        )
    return with_loops(loaded, options.loops[0])
