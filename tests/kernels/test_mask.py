"""Who sees whom, and how many pairs that is: counted one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Mask, SegmentIds
from pallas_kernels.attention import mask as masks
from tests import tiny
from yocou_jax.mixers import MIXERS


def counted(N, S, window=None, q_offset=0):
    """[N, S]: query n has position q_offset + n, and sees `window` keys, its own included."""
    age = q_offset + np.arange(N)[:, None] - np.arange(S)[None, :]
    return (age >= 0) & (age < (N + q_offset + 1 if window is None else window))


@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
@pytest.mark.parametrize(("N", "S", "q_offset"), [(9, 9, 0), (5, 12, 7), (7, 4, 0), (6, 3, 20)])
def test_the_window_counts_the_querys_own_key(window, N, S, q_offset):
    mask, want = Mask(window, q_offset), counted(N, S, window, q_offset)
    np.testing.assert_array_equal(mask.as_array(N, S), want[None])
    assert mask.pairs(N, S) == want.sum()


def test_lengths_and_segments_hide_keys_of_their_row():
    ids = jnp.array([[1, 1, 2, 2], [3, 3, 3, 0]])
    got = Mask(3, 0, jnp.array([4, 2]), SegmentIds(ids, ids)).as_array(4, 4)
    want = np.stack([counted(4, 4, 3)] * 2) & (ids[:, :, None] == ids[:, None, :])
    np.testing.assert_array_equal(got, want & (np.arange(4) < np.array([[[4]], [[2]]])))


def test_static_fields_are_not_operands():
    """So jax does not trace a window, and splits the arrays over devices as it splits others."""
    mask = Mask(3, 2, jnp.array([4, 2]))
    arrays, treedef = jax.tree.flatten(mask)
    assert len(arrays) == 1
    again = jax.tree.unflatten(treedef, arrays)
    assert (again.window, again.q_offset, again.segments) == (3, 2, None)
    assert jax.tree.structure(Mask(4, 2, mask.lengths)) != treedef


@pytest.mark.parametrize(
    ("mixer", "architecture"),
    [("window", "yoco"), ("cross", "yoco"), ("full", "transformer"), ("full", "parscale")],
)
def test_accounting_counts_the_pairs_that_kernels_see(mixer, architecture):
    """mixers.py does not load jax, so it has a formula of its own for the same count."""
    config = tiny.model(architecture)
    kernel = MIXERS[mixer].kernel(config)
    mask = Mask(kernel.window, kernel.prefix)
    for length in (1, 3, 4, 5, 40):
        assert MIXERS[mixer].pairs(config, length) == mask.pairs(length, length + kernel.prefix)


@pytest.mark.parametrize("window", [None, 1, 5, 2**31 - 1])
def test_one_comparison_sees_what_two_see(window):
    q_pos, k_pos = jnp.arange(-9, 40)[:, None], jnp.arange(-20, 60)[None, :]
    want = masks.visible(q_pos, k_pos, window)
    np.testing.assert_array_equal(masks.visible_int32(q_pos, k_pos, window), want)
    assert want.any()
    assert not want.all()
