"""What training steps draw their loop counts from."""

import collections
import math

import pytest

from tests import tiny
from yocou_jax.loops import MAX_COUNTS, LoopDraw

POISSON = {n: math.exp(-2) * 2 ** (n - 1) / math.factorial(n - 1) for n in range(1, 7)}


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("5, 1,2", {1: 1, 2: 1, 5: 1}),
        ("poisson(3)", POISSON),
        (" poisson( 2 )", {n: 1 / math.factorial(n - 1) for n in range(1, 5)}),
    ],
)
def test_every_count_is_drawn_as_often_as_its_probability_says(text, shares):
    draw, steps = LoopDraw.parse(text), 10_000
    total = sum(shares.values())
    assert dict(zip(draw.counts, draw.probabilities, strict=True)) == pytest.approx(
        {count: share / total for count, share in shares.items()}
    )
    drawn = collections.Counter(draw.draw(7, step) for step in range(1, steps + 1))
    assert drawn.keys() == shares.keys()
    for count, probability in zip(draw.counts, draw.probabilities, strict=True):
        expected, deviation = steps * probability, (steps * probability * (1 - probability)) ** 0.5
        assert abs(drawn[count] - expected) < 4 * deviation


def test_a_draw_depends_on_the_seed_and_the_step_only():
    first, second = (LoopDraw.parse("1,2,3,5") for _ in range(2))
    drawn = [first.draw(0, step) for step in range(1, 101)]
    assert [second.draw(0, step) for step in range(100, 0, -1)] == drawn[::-1]
    assert [second.draw(1, step) for step in range(1, 101)] != drawn
    # 1 and 10 to 19 are other digits than 11 and 0 to 9 only if something is between them.
    assert [first.draw(1, step) for step in range(10, 20)] != [first.draw(11, n) for n in range(10)]


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "1", "1,1", "0,2", "1,,2", "1,2,", "1;2", "1,2.5", "-1,2", "1,10000", "1,²"),
        *("poisson(1)", f"poisson({MAX_COUNTS // 2 + 1})", "poisson(2.5)", "poisson", "Poisson(3)"),
        ",".join(map(str, range(1, MAX_COUNTS + 2))),
    ],
)
def test_other_texts_are_none(text):
    assert LoopDraw.parse(text) is None


@pytest.mark.parametrize(
    ("architecture", "text", "program"),
    [
        ("yoco_u", "1,2,3,5", "window*2@3 | cross*2"),
        ("yoco_u", "2,5,4", "window*2@5 | cross*2"),
        ("yoco_u", "poisson(4)", "window*2@4 | cross*2"),
        ("window*1@2 | cross*1@3", "2,3,4", "window*1@4 | cross*1@4"),
    ],
)
def test_the_count_of_the_model_itself(architecture, text, program):
    assert str(tiny.model(architecture, num_loops=text).program) == program
