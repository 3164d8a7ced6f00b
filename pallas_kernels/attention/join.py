"""Joins results of attention over parts of the keys into the result over all keys.

out = sum_i exp(lse_i - lse) out_i, where lse is the log of the sum of exponentials over all keys. A
part in which a row sees nothing (out 0, lse MASKED) counts for nothing.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import MASKED

# out [..., H], and lse [...] in fp32: what attention with return_lse returns.
Part = tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]


def join(first: Part, *others: Part) -> Part:
    """Joins parts that separate calls computed; their lse is a natural log. The sum is in fp32, out
    has the dtype of the first part, and the result may be joined with more parts."""
    out, lse = first
    dtype = out.dtype
    for other, other_lse in others:
        share = jax.nn.sigmoid(lse - other_lse)[..., None]
        out = share * out + (1 - share) * other
        lse = jnp.logaddexp(lse, other_lse)
    return out.astype(dtype), lse


def join_splits(
    out: Float[Array, "..."], lse2: Float[Array, "..."], axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Joins the parts along `axis` that one kernel returned in fp32, with lse in base 2. Returns
    the result and its lse, a natural log. A row that sees nothing in any part gives 0 and MASKED.
    """
    top = lse2.max(axis)
    weights = jnp.exp2(lse2 - jnp.expand_dims(top, axis))
    total = weights.sum(axis)
    lse = jnp.where(top <= MASKED, MASKED, top * math.log(2) + jnp.log(total))
    return (out * weights[..., None]).sum(axis) / total[..., None], lse
