"""The checks that run in every test find wrong shapes, silent broadcasts and warnings."""

import sys
import warnings

import jax.numpy as jnp
import jaxtyping
import pytest

from pallas_kernels import cross_attention, decode_cross
from tests import checked, tiny
from yocou_jax.model import logits

q, k = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 6, 2, 8))
refused = pytest.raises(jaxtyping.TypeCheckError)


def test_every_module_that_is_imported_is_checked():
    loaders = {type(sys.modules[n].__loader__) for n in checked.MODULES if n in sys.modules}
    assert [loader.__module__ for loader in loaders] == ["jaxtyping._import_hook"]


@pytest.mark.parametrize("wrong", [k[:, :5], k[0], k.astype(int)], ids=["axis", "rank", "type"])
def test_a_wrong_operand_of_attention_is_refused(wrong):
    with refused:
        cross_attention(q, k, wrong)
    with refused:
        decode_cross(q[:, 0], k, wrong, jnp.array([1, 2]))


def test_wrong_tokens_are_refused_by_the_model():
    config = tiny.model("yoco_u")
    params, tokens = tiny.params(config), tiny.tokens(2, 5)
    for wrong in (tokens[0], tokens[None], tokens.astype(float)):
        with refused:
            logits(params, config, wrong, tiny.compute())


def test_a_wrong_result_is_refused(monkeypatch):
    config = tiny.model("yoco_u")
    monkeypatch.setattr("yocou_jax.model.language_model.to_logits", lambda hidden, head: hidden[0])
    with refused:
        logits(tiny.params(config), config, tiny.tokens(2, 5), tiny.compute())


def test_a_test_that_is_wrong_on_purpose_reads_our_own_sentence(unchecked):
    with pytest.raises(ValueError, match="agree in batch and head width"):
        cross_attention(q[..., :7], k, k)


def test_nothing_is_broadcast_to_more_axes_in_silence():
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
