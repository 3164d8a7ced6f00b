"""Cross-entropy of a linear head, in chunks: [B, N, V] logits never exist at once."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from yocou_jax.typing import Array, Float, Int

# Logits alive at once, per device. 4M float32 values (16 MB) keep a matrix unit busy; on a CPU
# smaller chunks are faster because they stay nearer the caches.
CHUNK_LOGITS = 2**22


@flax.struct.dataclass
class LossSums:
    """Sums over weighted targets, so that microbatches and devices can be added before dividing.

    nll: -log p(target) in nats; z: logsumexp(logits)^2; weight: the number of targets counted.
    """

    nll: Float[Array, ""]
    z: Float[Array, ""]
    weight: Float[Array, ""]


def _chunk_length(batch: int, length: int, vocab: int) -> int:
    """The longest divisor of `length` whose logits fit CHUNK_LOGITS per device."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    limit = max(1, CHUNK_LOGITS * devices // (batch * vocab))
    return max(n for n in range(1, length + 1) if length % n == 0 and n <= limit)


def _chunk(hidden, head, targets, weights):
    """One chunk of M rows: softmax probabilities [M, V], lse [M], and the sums of nll and lse^2."""
    logits = (hidden @ head).astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    lse = (top + jnp.log(total))[:, 0]
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return exponentials / total, lse, jnp.sum((lse - picked) * weights), jnp.sum(lse**2 * weights)


def _rows(x, start, length):
    """Positions start .. start + length of every sequence, [B * length, ...]: sequences are split
    over devices, so that a chunk of positions is work for all of them."""
    x = jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)
    return x.reshape(-1, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head, targets, weights, z_loss):
    """sum(nll) + z_loss sum(z) as the differentiable value; (sum nll, sum z) beside it."""
    batch, length, _ = hidden.shape
    chunk = _chunk_length(batch, length, head.shape[1])
    head = head.astype(hidden.dtype)

    def body(carry, start):
        h, t, w = (_rows(x, start, chunk) for x in (hidden, targets, weights))
        _, _, nll, z = _chunk(h, head, t, w)
        return (carry[0] + nll, carry[1] + z), None

    starts = jnp.arange(0, length, chunk)
    (nll, z), _ = jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), starts)
    return nll + z_loss * z, (nll, z)


def _cross_entropy_fwd(hidden, head, targets, weights, z_loss):
    """Computes the gradients already in the forward pass: the logits are at hand, and scaling by
    the incoming cotangent later costs far less than a second product with the head."""
    batch, length, width = hidden.shape
    vocab = head.shape[1]
    chunk = _chunk_length(batch, length, vocab)
    cast = head.astype(hidden.dtype)

    def body(carry, start):
        nll_sum, z_sum, d_head = carry
        h, t, w = (_rows(x, start, chunk) for x in (hidden, targets, weights))
        p, lse, nll, z = _chunk(h, cast, t, w)
        scale = (w * (1 + 2 * z_loss * lse))[:, None]
        one_hot = t[:, None] == jnp.arange(vocab)
        d_logits = (p * scale - jnp.where(one_hot, w[:, None], 0.0)).astype(hidden.dtype)
        # Two products read d_logits: without the barrier XLA computes it once for each.
        d_logits = jax.lax.optimization_barrier(d_logits)
        d_hidden = d_logits @ cast.T
        d_head = d_head + jnp.matmul(h.T, d_logits, preferred_element_type=jnp.float32)
        return (nll_sum + nll, z_sum + z, d_head), d_hidden.reshape(batch, chunk, width)

    start = (jnp.float32(0), jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (nll, z, d_head), d_hidden = jax.lax.scan(body, start, jnp.arange(0, length, chunk))
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    return (nll + z_loss * z, (nll, z)), (d_hidden, d_head.astype(head.dtype))


def _cross_entropy_bwd(z_loss, residuals, cotangents):
    d_hidden, d_head = residuals
    g, _ = cotangents
    return (d_hidden * g).astype(d_hidden.dtype), (d_head * g).astype(d_head.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def cross_entropy(
    hidden: Float[Array, "B N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    weights: Float[Array, "B N"] | None = None,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], LossSums]:
    """Sum over targets of weight * (nll + z_loss * z), differentiable in hidden and head.

    weights None counts every target once. z is logsumexp(logits)^2 (PaLM, section 5). Returns the
    sum to differentiate and its parts. Only first derivatives, in reverse mode.
    """
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    total, (nll, z) = _cross_entropy(hidden, head, targets, weights, z_loss)
    return total, LossSums(nll=nll, z=z, weight=jnp.sum(weights))
