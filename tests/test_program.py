"""The language of stages: what a text means, and which texts are refused."""

import pytest

from yocou_jax.errors import UserError
from yocou_jax.program import ARCHITECTURES, Program, Stage

PAPER = {
    "yoco_u": "window*10@3 | cross*10",
    "yoco": "window*10 | cross*10",
    "transformer": "full*20",
    "universal_transformer": "full*20@2",
    "rins": "full*10@3 | full*10",
    "upper_loop": "window*10 | cross*10@3",
    "upper_loop_unshared": "window*10 | full*10@3",
    "parscale": "full*20, streams=2",
}


def test_the_table_has_the_programs_of_the_paper():
    found = {name: str(Program.from_architecture(name, 20)) for name in ARCHITECTURES}
    assert found == PAPER


@pytest.mark.parametrize("text", [*PAPER.values(), "window*1@1", "full*2 | window*3 | cross*1@2"])
def test_parse_and_print_are_inverse(text):
    program = Program.parse(text)
    assert str(program) == text
    assert Program.parse(str(program)) == program
    assert (
        Program.parse(text.replace("*", " * ").replace("@", " @ ").replace("=", " = ")) == program
    )


def test_parse_reads_every_part():
    assert Program.parse("window*4@3|cross*2") == Program(
        (Stage("window", 4, 3), Stage("cross", 2))
    )
    assert Program.parse("full*6, streams=3") == Program((Stage("full", 6),), streams=3)


def test_depth_counts_loops_but_the_number_of_layers_does_not():
    program = Program.parse("window*4@3 | cross*2")
    assert (program.layers, program.depth, program.has_cross) == (6, 14, True)
    assert [stage.num_loops for stage in program.stages] == [3, 1]
    assert not Program.parse("full*2").has_cross


def test_a_program_can_be_given_for_an_architecture():
    assert str(Program.from_architecture("window*1@2 | cross*3", 99)) == "window*1@2 | cross*3"


@pytest.mark.parametrize(
    ("text", "loops", "expected"),
    [
        ("window*4@3 | cross*4", 5, "window*4@5 | cross*4"),
        ("full*1@2 | full*1 | full*3@7", 1, "full*1@1 | full*1 | full*3@1"),
        ("full*2@2, streams=3", 4, "full*2@4, streams=3"),
    ],
)
def test_with_loops_changes_every_loop_and_nothing_else(text, loops, expected):
    before = Program.parse(text)
    assert str(before.with_loops(loops)) == expected
    assert str(before) == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "'' in the program '' is not a stage"),
        ("full", "'full' in the program 'full' is not a stage"),
        ("full*2 |", "'' in the program 'full*2 |' is not a stage"),
        ("full*-2", "'full*-2' in the program"),
        ("full*2@x", "mixer*layers or mixer*layers@loops"),
        ("fulll*2", "the mixer 'fulll'; the mixers are window, full, cross"),
        ("full*0", "'full*0' needs at least one layer and at least one loop"),
        ("cross*2", "begins with a cross stage"),
        ("cross*2 | window*2", "begins with a cross stage"),
        ("window*2 | cross*2 | window*2", "only stages of cross may follow"),
        ("full*2, streams=0", "streams=0 must be at least 1"),
        ("window*2, streams=2", "streams=2; parallel streams"),
        ("full*2, stream=2", "ends in 'stream=2'; the only option is 'streams=P'"),
    ],
)
def test_a_bad_text_of_a_program_is_refused_in_a_sentence(text, sentence):
    with pytest.raises(UserError) as error:
        Program.parse(text)
    assert sentence in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Program(()), "at least one stage"),
        (lambda: Stage("full", 2, 0), "at least one layer and at least one loop"),
        (lambda: Program.from_architecture("yocou", 4), "is neither a program"),
        (lambda: Program.from_architecture("yoco_u", 5), "model.num_layers=5 is odd"),
        (lambda: Program.parse("full*2@2").with_loops(0), "num_loops=0 must be at least 1"),
        (lambda: Program.parse("full*2").with_loops(3), "has no looped stage"),
    ],
    ids=["empty", "no loop", "unknown", "odd", "zero loops", "not looped"],
)
def test_bad_arguments_of_a_program_are_refused(call, sentence):
    with pytest.raises(UserError) as error:
        call()
    assert sentence in str(error.value)
    assert str(error.value).endswith(".")


def test_a_loop_of_zero_in_a_text_is_refused():
    with pytest.raises(UserError, match="at least one loop"):
        Program.parse("full*2@0")
