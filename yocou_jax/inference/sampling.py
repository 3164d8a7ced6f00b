"""From logits to tokens: the distribution of the next token, and one draw from it for every row.

The order is as in Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p.
Top-k and top-p both keep the first tokens in descending order, so one sort is enough for both. All
else costs O(V). Under jit all settings are arrays, so that new values, also different ones for each
row, do not compile a new program.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from yocou_jax.errors import UserError
from yocou_jax.typing import AnyArray, Array, Bool, Float, Int, Key


@flax.struct.dataclass
class Sampling:
    """How tokens are drawn. Each field is one number for all rows, or an array [B], one per row.

    temperature: divides the logits. 0 takes the most likely token (of equal ones, the first).
    top_k: keeps the k most likely tokens. Of equal logits, those with a lower index come first, so
        exactly k are kept. 0 is off.
    top_p: of the tokens that top_k keeps, keeps the smallest set of most likely tokens with a share
        of at least p of their probability, and at least one token (nucleus sampling, Holtzman et
        al. 2020). 1 is off.
    min_p: keeps tokens that are at least min_p times as likely as the most likely one (Nguyen et
        al. 2024). 0 is off.
    repetition_penalty: divides the positive logits of tokens that were seen, and multiplies the
        negative ones (CTRL, Keskar et al. 2019). 1 is off.
    """

    temperature: Float[AnyArray, " B"] | float = 1.0
    top_k: Int[AnyArray, " B"] | int = 0
    top_p: Float[AnyArray, " B"] | float = 1.0
    min_p: Float[AnyArray, " B"] | float = 0.0
    repetition_penalty: Float[AnyArray, " B"] | float = 1.0


# For each field: its type, a test of its values, and this test in words.
RULES: dict[str, tuple[type, Callable[[np.ndarray], np.ndarray], str]] = {
    "temperature": (np.float32, lambda x: x >= 0, "finite and at least 0 (0 is greedy)"),
    "top_k": (np.int32, lambda x: x >= 0, "at least 0 (0 keeps all tokens)"),
    "top_p": (np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1] (1 keeps all tokens)"),
    "min_p": (np.float32, lambda x: (x >= 0) & (x < 1), "in [0, 1) (0 keeps all tokens)"),
    "repetition_penalty": (np.float32, lambda x: x > 0, "finite and above 0 (1 changes nothing)"),
}


def check(sampling: Sampling, batch: int) -> Sampling:
    """The same settings as arrays [batch] of float32 (top_k: int32). Runs on the host.

    Raises UserError for a value that is out of range, not finite or not a number, and for an array
    that does not have one value per row.
    """
    return Sampling(**{name: _column(name, getattr(sampling, name), batch) for name in RULES})


def as_array(value: Any) -> np.ndarray:
    """The value as an array on the host; nested lists of different lengths as one that no check
    accepts."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.array(None)


def _column(name: str, value: Any, batch: int) -> np.ndarray:
    (dtype, possible, words), given = RULES[name], as_array(value)
    kinds, wanted = ("iu", "whole number") if dtype is np.int32 else ("iuf", "number")
    if given.dtype.kind not in kinds:
        raise UserError(
            f"sampling.{name}={value!r} must be a {wanted}, or an array of one for each row."
        )
    if given.shape not in ((), (batch,)):
        raise UserError(
            f"sampling.{name} has the shape {given.shape}, but must be one {wanted} or one for "
            f"each row, ({batch},)."
        )
    if dtype is np.int32:  # no vocabulary is larger; without `clip` the cast would wrap around
        array = given.astype(np.int64).clip(-1, np.iinfo(np.int32).max).astype(np.int32)
    else:
        with np.errstate(over="ignore"):  # too large for float32: infinite, which is refused below
            array = given.astype(np.float32)
    wrong = np.flatnonzero(~(possible(array) & np.isfinite(array)))
    if wrong.size:
        row = f"[{wrong[0]}]" if given.ndim else ""
        raise UserError(f"sampling.{name}{row}={given.flat[wrong[0]]} must be {words}.")
    return np.broadcast_to(array, (batch,))


def needs_sort(sampling: Sampling) -> bool:
    """Whether any row uses top-k or top-p. Runs on the host, like `check`.

    Compiled loops take it as the static argument `sort`, because to sort V logits is expensive.
    """
    return bool(np.any(np.asarray(sampling.top_k) > 0) or np.any(np.asarray(sampling.top_p) < 1))


def needs_seen(sampling: Sampling) -> bool:
    """Whether any row has a repetition penalty, and so needs `seen`. Runs on the host."""
    return bool(np.any(np.asarray(sampling.repetition_penalty) != 1))


def filter_logits(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    *,
    sort: bool,
    seen: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """The logits of the distribution to sample from, in float32, minus their maximum in each row.

    Args:
      logits: finite or -inf, at least one finite in each row.
      sort: static; False ignores top_k and top_p (see `needs_sort`).
      seen: tokens of the prompt and the output so far; None ignores repetition_penalty.

    Returns:
      -inf for excluded tokens; the largest logit is 0. Rows with temperature 0 keep one token.
    """
    x = logits.astype(jnp.float32)
    temperature, top_k, top_p, min_p, penalty = (
        jnp.broadcast_to(jnp.asarray(getattr(sampling, name), RULES[name][0]), x.shape[:1])[:, None]
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    )
    if seen is not None:
        x = jnp.where(seen, jnp.where(x > 0, x / penalty, x * penalty), x)
    # The largest logit becomes 0 before the division, so that no quotient overflows. Hardware
    # treats numbers and reciprocals below 1e-38 as 0, and -inf * 0 is NaN.
    greedy = temperature == 0
    z = (x - x.max(axis=-1, keepdims=True)) / jnp.clip(temperature, 1e-37, 1e37)
    # z is log(p / max p), which top-k and top-p do not change: so min-p may come first.
    keep = z >= jnp.log(min_p)
    if sort:
        keep &= _likeliest(z, top_k, top_p)
    index = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    first = index == jnp.argmax(x, axis=-1, keepdims=True)
    return jnp.where(jnp.where(greedy, first, keep), z, -jnp.inf)


def _likeliest(
    z: Float[Array, "B V"], top_k: Int[Array, "B 1"], top_p: Float[Array, "B 1"]
) -> Bool[Array, "B V"]:
    """The tokens that top-k and then top-p keep. The largest entry of each row of z is 0."""
    V = z.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    # The sort is stable, so equal logits are in the order of their index.
    negative, order = jax.lax.sort((-z, index), dimension=-1, is_stable=True, num_keys=1)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    mass = jnp.where(index < k, jnp.exp(-negative), 0.0)
    upto = jnp.cumsum(mass, axis=-1)
    in_nucleus = (upto - mass < top_p * upto[:, -1:]) & (index < k)
    # At p = 1 rounding would cut the tail, where the sum does not grow any more.
    count = jnp.where(top_p < 1, jnp.sum(in_nucleus, axis=-1, keepdims=True), k)
    # The last kept logit is the threshold, so the mask needs no second sort and no scatter.
    last = jnp.maximum(count, 1) - 1
    at = jnp.take_along_axis(-negative, last, axis=-1)
    tie = jnp.take_along_axis(order, last, axis=-1)
    return (z > at) | ((z == at) & (index <= tie))


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    *,
    sort: bool,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Draws one token for each row, with the key of the row, so it does not depend on other rows.

    Arguments as in `filter_logits`. keys: typed keys (jax.random.key), one for each row.
    """
    filtered = filter_logits(logits, sampling, sort=sort, seen=seen)
    return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
