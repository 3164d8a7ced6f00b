"""From logits to tokens: which distribution is sampled, and one draw from it for every row.

The order, as in Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p.
Top-k and top-p both keep a prefix of the descending order, so one sort serves them, and the rest
costs O(V). All settings are arrays under jit: other values, also row by row, compile nothing.
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
    """How tokens are drawn: each field one number for all rows, or an array [B], one per row.

    temperature: the logits are divided by it; 0 takes the likeliest token (the first of equals).
    top_k: only the k likeliest tokens; 0 is off. Of equal logits those of lower index come first,
        so exactly k are kept.
    top_p: only the smallest set of likeliest tokens with a mass of at least p, of what top_k left
        (nucleus sampling, Holtzman et al. 2020), and always one; 1 is off.
    min_p: only tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024); 0 is
        off.
    repetition_penalty: logits of tokens that were seen are divided by it where positive and
        multiplied where negative (CTRL, Keskar et al. 2019); 1 is off.
    """

    temperature: Float[AnyArray, " B"] | float = 1.0
    top_k: Int[AnyArray, " B"] | int = 0
    top_p: Float[AnyArray, " B"] | float = 1.0
    min_p: Float[AnyArray, " B"] | float = 0.0
    repetition_penalty: Float[AnyArray, " B"] | float = 1.0


# What each field may be: its type, the test, and the test in words.
RULES: dict[str, tuple[type, Callable[[np.ndarray], np.ndarray], str]] = {
    "temperature": (np.float32, lambda x: x >= 0, "finite and at least 0 (0 is greedy)"),
    "top_k": (np.int32, lambda x: x >= 0, "at least 0 (0 keeps all tokens)"),
    "top_p": (np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1] (1 keeps all tokens)"),
    "min_p": (np.float32, lambda x: (x >= 0) & (x < 1), "in [0, 1) (0 keeps all tokens)"),
    "repetition_penalty": (np.float32, lambda x: x > 0, "finite and above 0 (1 changes nothing)"),
}


def check(sampling: Sampling, batch: int) -> Sampling:
    """The same settings as arrays [batch] of float32 (top_k: int32). Runs on the host.

    Raises UserError for a value that is impossible, not finite or no number, and for an array that
    is not one value per row.
    """
    return Sampling(**{name: _column(name, getattr(sampling, name), batch) for name in RULES})


def _column(name: str, value: Any, batch: int) -> np.ndarray:
    dtype, possible, words = RULES[name]
    try:
        given = np.asarray(value)
    except ValueError:  # nested lists of different lengths
        given = np.array(None)
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
    if dtype is np.int32:  # no vocabulary is larger, and a cast alone would wrap around
        array = given.astype(np.int64).clip(-1, np.iinfo(np.int32).max).astype(np.int32)
    else:
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
            array = given.astype(np.float32)
    wrong = np.flatnonzero(~(possible(array) & np.isfinite(array)))
    if wrong.size:
        row = f"[{wrong[0]}]" if given.ndim else ""
        raise UserError(f"sampling.{name}{row}={given.flat[wrong[0]]} must be {words}.")
    return np.broadcast_to(array, (batch,))


def needs_sort(sampling: Sampling) -> bool:
    """Whether top-k or top-p is in use in any row; a question for the host, like `check`.

    Sorting V logits is dear, so a compiled loop is told by the static argument `sort`.
    """
    return bool(np.any(np.asarray(sampling.top_k) > 0) or np.any(np.asarray(sampling.top_p) < 1))


def needs_seen(sampling: Sampling) -> bool:
    """Whether any row has a repetition penalty, so that `seen` must be kept; asked on the host."""
    return bool(np.any(np.asarray(sampling.repetition_penalty) != 1))


def filter_logits(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    *,
    sort: bool,
    seen: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """The logits of the distribution that is sampled, float32, up to a constant of each row.

    Args:
      logits: finite or -inf, at least one finite in each row.
      sort: static; False passes over top_k and top_p (see `needs_sort`).
      seen: tokens of the prompt or the output so far; None passes over repetition_penalty.

    Returns:
      -inf for excluded tokens, the largest logit 0. Rows of temperature 0 have one token left.
    """
    x = logits.astype(jnp.float32)
    temperature, top_k, top_p, min_p, penalty = (
        jnp.broadcast_to(jnp.asarray(getattr(sampling, name), RULES[name][0]), x.shape[:1])[:, None]
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    )
    if seen is not None:
        x = jnp.where(seen, jnp.where(x > 0, x / penalty, x * penalty), x)
    # The largest logit becomes 0 before the division, so that no quotient overflows. Hardware takes
    # numbers and reciprocals below 1e-38 for 0, and -inf * 0 is no number.
    greedy = temperature == 0
    z = (x - x.max(axis=-1, keepdims=True)) / jnp.clip(temperature, 1e-37, 1e37)
    keep = z >= jnp.log(min_p)  # log(p / max p); the same before and after top-k and top-p
    if sort:
        keep &= _likeliest(z, top_k, top_p)
    index = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    first = index == jnp.argmax(x, axis=-1, keepdims=True)
    return jnp.where(jnp.where(greedy, first, keep), z, -jnp.inf)


def _likeliest(
    z: Float[Array, "B V"], top_k: Int[Array, "B 1"], top_p: Float[Array, "B 1"]
) -> Bool[Array, "B V"]:
    """What top-k and then top-p keep; the largest entry of each row of z is 0."""
    V = z.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    # Stable, so equal logits stand by index.
    negative, order = jax.lax.sort((-z, index), dimension=-1, is_stable=True, num_keys=1)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    mass = jnp.where(index < k, jnp.exp(-negative), 0.0)
    upto = jnp.cumsum(mass, axis=-1)
    in_nucleus = (upto - mass < top_p * upto[:, -1:]) & (index < k)
    # At p = 1 rounding would cut the tail, where the sum no longer grows.
    count = jnp.where(top_p < 1, jnp.sum(in_nucleus, axis=-1, keepdims=True), k)
    # The last of the prefix draws the border: no second sort, and no scatter, leads back.
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
    """One token for each row, drawn with the row's own key: rows do not depend on their batch.

    Arguments as in `filter_logits`; `keys` are typed (jax.random.key), one for each row.
    """
    filtered = filter_logits(logits, sampling, sort=sort, seen=seen)
    return jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
