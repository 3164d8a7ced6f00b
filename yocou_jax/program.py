"""A language model is a short program of stages. What it costs and how it runs is derived from it.

    yoco_u = "window*10@3 | cross*10"      10 window layers, applied 3 times; then 10 cross layers

A stage is written `mixer*layers@loops`. The sign `|` joins stages. `, streams=P` at the end runs
parallel streams (ParScale). MIXERS in mixers.py has the mixers and their facts. These three are in
the paper:

    window   causal self-attention over the last W keys, the query's own included (RoPE)
    full     causal self-attention over all keys up to the query's own (RoPE)
    cross    causal attention to the one global K, V (no position encoding)

A cross stage is a stage of a mixer that reads the global K, V (`Mixer.reads_global`). The
self-decoder is all stages before the first cross stage. The cross-decoder is the other stages.
Between the two, one RMSNorm and two projections compute the global K, V once (YOCO, arXiv
2405.05254; YOCO-U, arXiv 2604.01220). A new architecture is a new line below.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

from yocou_jax.errors import UserError, shown
from yocou_jax.mixers import MIXERS

# {all} is the number of layers, and {half} is half of it. The loop counts are those of the paper.
# `model.num_loops` of a config replaces the count of every stage that has one (see Stage).
ARCHITECTURES: dict[str, str] = {
    "yoco_u": "window*{half}@3 | cross*{half}",
    "yoco": "window*{half} | cross*{half}",
    "transformer": "full*{all}",
    "universal_transformer": "full*{all}@2",
    # Section 4.2 of the paper loops the first half, appendix E the second: full*10 | full*10@3.
    "rins": "full*{half}@3 | full*{half}",
    "upper_loop": "window*{half} | cross*{half}@3",
    "upper_loop_unshared": "window*{half} | full*{half}@3",
    "parscale": "full*{all}, streams=2",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """`layers` blocks of one mixer. The whole stack of blocks runs `num_loops` times.

    loops: the count as it is written after `@`. None: there is no `@`, and the stage is no loop.
        `@1` computes the same, but the stage is a loop, and its count can be changed later.
    num_loops: how often the stack runs; 1 without `@`.

    `model.num_loops` of a config and `num_loops` of a call change the count of every loop. If they
    are None, each loop has the count of the program.
    """

    mixer: str
    layers: int
    loops: int | None = None

    def __post_init__(self):
        if self.mixer not in MIXERS:
            raise UserError(
                f"The stage {shown(str(self))} has the mixer {shown(self.mixer)}; the mixers are "
                f"{', '.join(MIXERS)}."
            )
        if self.layers < 1 or (self.loops is not None and self.loops < 1):
            raise UserError(
                f"The stage {shown(str(self))} needs at least one layer and at least one loop."
            )

    @property
    def reads_global(self) -> bool:
        """Whether its layers read the one global K, V, and have no memory of their own."""
        return MIXERS[self.mixer].reads_global

    @property
    def num_loops(self) -> int:
        return self.loops or 1

    @property
    def depth(self) -> int:
        """Number of layers that a token passes through: layers times loops."""
        return self.layers * self.num_loops

    def visits(self, name: str) -> Iterator["Visit"]:
        """Every run of one of its layers, loop by loop. name: of the stage in its program."""
        for loop in range(self.num_loops):
            for layer in range(self.layers):
                yield Visit(name, self, loop, layer)

    def __str__(self) -> str:
        return f"{self.mixer}*{self.layers}" + ("" if self.loops is None else f"@{self.loops}")


class Visit(NamedTuple):
    """One run of one layer, when a token passes through a program.

    name: the name of the stage, which its parameters have too. index: number of this run within the
    stage, loop by loop. Every (loop, layer) has a memory of its own, and this is its number.
    """

    name: str
    stage: Stage
    loop: int
    layer: int

    @property
    def index(self) -> int:
        return self.loop * self.stage.layers + self.layer


def _mixers(**facts: bool) -> str:
    """The names of the mixers that have these facts."""
    return ", ".join(
        name
        for name, mixer in MIXERS.items()
        if all(getattr(mixer, fact) == value for fact, value in facts.items())
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """The stages in order, and `streams`, the number of parallel copies of the input (ParScale)."""

    stages: tuple[Stage, ...]
    streams: int = 1

    def __post_init__(self):
        if not self.stages:
            raise UserError("A program needs at least one stage, such as 'full*12'.")
        readers = [stage.reads_global for stage in self.stages]
        if readers[0]:
            raise UserError(
                f"The program {shown(str(self))} begins with a {self.stages[0].mixer} stage, which "
                "reads the global K, V. They are computed from the output of the stages before it: "
                f"put a stage of another mixer first ({_mixers(reads_global=False)})."
            )
        if readers != sorted(readers):
            raise UserError(
                f"The program {shown(str(self))} has a stage that does not read the global K, V "
                f"after one that does; only stages of {_mixers(reads_global=True)} may follow, "
                "because prefill runs them for the last token only."
            )
        if self.streams < 1:
            raise UserError(f"streams={shown(self.streams)} must be at least 1.")
        if self.streams > 1 and not all(MIXERS[stage.mixer].streams for stage in self.stages):
            raise UserError(
                f"The program {shown(str(self))} has streams={shown(self.streams)}; parallel "
                f"streams (ParScale) are defined only for stages of {_mixers(streams=True)}."
            )

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads 'window*10@3 | cross*10' or 'full*20, streams=2'; raises UserError otherwise."""
        body, _, option = text.partition(",")
        streams = re.fullmatch(r"\s*streams\s*=\s*(\d+)\s*", option) if option else None
        if option and not streams:
            raise UserError(
                f"The program {shown(text)} ends in {shown(option.strip())}; the only option is "
                "'streams=P'."
            )
        stages = []
        for part in body.split("|"):
            match = re.fullmatch(r"\s*([a-z]+)\s*\*\s*(\d+)\s*(?:@\s*(\d+)\s*)?", part)
            if not match:
                raise UserError(
                    f"{shown(part.strip())} in the program {shown(text)} is not a stage; a stage "
                    "is written mixer*layers or mixer*layers@loops, such as window*10@3."
                )
            mixer, layers, loops = match.groups()
            stages.append(Stage(mixer, int(layers), int(loops) if loops else None))
        return cls(tuple(stages), int(streams.group(1)) if streams else 1)

    @classmethod
    def from_architecture(cls, architecture: str, num_layers: int) -> "Program":
        """The program of a name in ARCHITECTURES with `num_layers` layers, or of a program's text.

        With a text such as 'window*4@3 | cross*4', num_layers is not used.
        """
        if "*" in architecture:
            return cls.parse(architecture)
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"model.architecture={shown(architecture)} is neither a program such as "
                f"'window*4@3 | cross*4' nor one of {', '.join(ARCHITECTURES)}."
            )
        template = ARCHITECTURES[architecture]
        if "{half}" in template and num_layers % 2:
            raise UserError(
                f"model.num_layers={num_layers} is odd; '{architecture}' ({template}) needs two "
                "equal halves."
            )
        return cls.parse(template.format(all=num_layers, half=num_layers // 2))

    def with_loops(self, num_loops: int) -> "Program":
        """The same program, in which every looped stage runs `num_loops` times."""
        if num_loops < 1:
            raise UserError(f"num_loops={num_loops} must be at least 1.")
        if all(stage.loops is None for stage in self.stages):
            raise UserError(
                f"num_loops={num_loops} was asked for, but the program {shown(str(self))} has no "
                "looped stage; mark one as mixer*layers@loops."
            )
        stages = tuple(
            stage if stage.loops is None else dataclasses.replace(stage, loops=num_loops)
            for stage in self.stages
        )
        return dataclasses.replace(self, stages=stages)

    @property
    def loop_counts(self) -> list[int]:
        """The different counts of its looped stages, in order. Empty: it has no looped stage."""
        return sorted({stage.loops for stage in self.stages if stage.loops is not None})

    @property
    def layers(self) -> int:
        """Number of layers with parameters of their own."""
        return sum(stage.layers for stage in self.stages)

    @property
    def depth(self) -> int:
        """Number of layers that a token passes through: each counts once per loop."""
        return sum(stage.depth for stage in self.stages)

    @property
    def named_stages(self) -> list[tuple[str, Stage]]:
        """(name, stage) for each stage. The name is that of its parameters."""
        return [(f"stage_{i}_{stage.mixer}", stage) for i, stage in enumerate(self.stages)]

    @property
    def self_decoder(self) -> list[tuple[str, Stage]]:
        """The named stages before the global K, V: every token of a prompt runs through them. In a
        program without cross stages (a transformer) these are all stages."""
        return [(name, stage) for name, stage in self.named_stages if not stage.reads_global]

    @property
    def cross_decoder(self) -> list[tuple[str, Stage]]:
        """The named stages that read the global K, V. In prefill, only the last token of a prompt
        runs through them (YOCO, section 2.2)."""
        return [(name, stage) for name, stage in self.named_stages if stage.reads_global]

    @property
    def has_cross(self) -> bool:
        """Whether there is a cross-decoder, and so a global K, V."""
        return self.stages[-1].reads_global

    def visits(self) -> Iterator[Visit]:
        """Every run of a layer that a token passes through, in order."""
        for name, stage in self.named_stages:
            yield from stage.visits(name)

    def __str__(self) -> str:
        text = " | ".join(str(stage) for stage in self.stages)
        return text + (f", streams={self.streams}" if self.streams > 1 else "")
