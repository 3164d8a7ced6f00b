"""Cross-entropy of a linear head in chunks, so that the logits [B, N, V] never exist at once."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels import target_device
from yocou_jax.sharding import batch_ways, length_ways, vocab_ways
from yocou_jax.typing import AnyArray, Array, Bool, Float, Int

# Number of logits in memory at once on each device. An accelerator needs thousands of rows in each
# product with the head, because each chunk reads and writes the gradient of the head once. On a CPU
# a chunk should not be much larger than the caches.
CHUNK_LOGITS = {"cpu": 2**22}
CHUNK_LOGITS_ACCELERATOR = 2**26


@flax.struct.dataclass
class LossSums:
    """Sums over the targets, each times its weight. (Means of microbatches could not be added.)

    nll: the sum of -log p(target) in nats. z: the sum of logsumexp(logits)^2. weight: the sum of
    the weights, which divides the other two.
    """

    nll: Float[Array, ""]
    z: Float[Array, ""]
    weight: Float[Array, ""]


class Split(NamedTuple):
    """How the mesh of the context splits B sequences of N positions.

    rows, columns: the number of parts of B and of N (`batch_ways`, `length_ways`).
    """

    batch: int
    length: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Split":
        B, N = shape[:2]
        return cls(B, N, batch_ways(batch=B), length_ways(N))

    def num_chunks(self, vocab: int, arrays: int = 1) -> int:
        """Number of chunks that split the positions of each device, if each chunk has `arrays` of
        logits. vocab: the whole one, which a mesh may split."""
        limit = CHUNK_LOGITS.get(target_device().platform, CHUNK_LOGITS_ACCELERATOR)
        length = self.length // self.columns
        rows = arrays * self.batch // self.rows * length
        return min(length, -(-rows * (vocab // vocab_ways(vocab)) // limit))

    def to_chunks(self, x, chunks: int):
        """[B, N, ...] -> [chunks, shards, M, ...], M positions of sequences. The axis `shards` has
        one entry for each device that has other positions; so every device has work in each chunk.
        Positions are padded with zeros to a multiple of the number of chunks."""
        rest = x.shape[2:]
        x = x.reshape(self.rows, -1, self.columns, self.length // self.columns, *rest)
        pad = -x.shape[3] % chunks
        if pad:
            x = jnp.pad(x, ((0, 0),) * 3 + ((0, pad),) + ((0, 0),) * len(rest))
        x = x.reshape(*x.shape[:3], chunks, -1, *rest)  # rows, batch, columns, chunks, length
        x = jnp.moveaxis(x, (3, 0, 2), (0, 1, 2))
        return x.reshape(chunks, self.rows * self.columns, -1, *rest)

    def from_chunks(self, x):
        rest = x.shape[3:]
        x = x.reshape(len(x), self.rows, self.columns, self.batch // self.rows, -1, *rest)
        x = jnp.moveaxis(x, (0, 1, 2), (3, 0, 2))
        x = x.reshape(self.batch, self.columns, -1, *rest)
        return x[:, :, : self.length // self.columns].reshape(self.batch, self.length, *rest)


def _chunk(hidden, head, targets, weights):
    """One chunk: softmax [shards, rows, V], lse [shards, rows], weighted sums of nll and lse^2."""
    # The product returns float32: logits rounded to bfloat16 would cost hundredths of a nat.
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    lse = (top + jnp.log(total))[..., 0]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return exponentials / total, lse, jnp.sum((lse - picked) * weights), jnp.sum(lse**2 * weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head, targets, weights, z_loss):
    """Returns sum(nll) + z_loss sum(z), which is differentiable, and (sum nll, sum z)."""
    split = Split.of(hidden.shape)
    chunks = split.num_chunks(head.shape[1])
    head = head.astype(hidden.dtype)

    def body(carry, chunk):
        h, t, w = chunk
        _, _, nll, z = _chunk(h, head, t, w)
        return (carry[0] + nll, carry[1] + z), None

    inputs = [split.to_chunks(x, chunks) for x in (hidden, targets, weights)]
    (nll, z), _ = jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), inputs)
    return nll + z_loss * z, (nll, z)


def _cross_entropy_fwd(hidden, head, targets, weights, z_loss):
    """The forward pass computes the gradients too, because it has the logits. The backward pass
    multiplies them by the cotangent, which costs far less than a second product with the head."""
    split, (width, vocab) = Split.of(hidden.shape), head.shape
    chunks, shards = split.num_chunks(vocab), split.rows * split.columns
    cast = head.astype(hidden.dtype)

    def body(carry, chunk):
        nll_sum, z_sum, d_head = carry
        h, t, w = chunk
        p, lse, nll, z = _chunk(h, cast, t, w)
        scale = (w * (1 + 2 * z_loss * lse))[..., None]
        one_hot = t[..., None] == jnp.arange(vocab)[None, None]
        d_logits = (p * scale - jnp.where(one_hot, w[..., None], 0.0)).astype(hidden.dtype)
        # Two products read d_logits. Without the barrier, XLA computes it twice.
        d_logits = jax.lax.optimization_barrier(d_logits)
        # Every shard has its own gradient of the head. They are summed once, after the scan.
        d_head += jnp.einsum("srd,srv->sdv", h, d_logits, preferred_element_type=jnp.float32)
        return (nll_sum + nll, z_sum + z, d_head), d_logits @ cast.T

    inputs = [split.to_chunks(x, chunks) for x in (hidden, targets, weights)]
    start = (jnp.float32(0), jnp.float32(0), jnp.zeros((shards, width, vocab), jnp.float32))
    (nll, z, d_head), d_hidden = jax.lax.scan(body, start, inputs)
    residuals = split.from_chunks(d_hidden), d_head.sum(0).astype(head.dtype)
    return (nll + z_loss * z, (nll, z)), residuals


def _cross_entropy_bwd(z_loss, residuals, cotangents):
    d_hidden, d_head = residuals
    g, _ = cotangents
    return (d_hidden * g).astype(d_hidden.dtype), (d_head * g).astype(d_head.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def cross_entropy(
    hidden: Float[Array, "B N D"],
    head: Float[AnyArray, "D V"],
    targets: Int[Array, "B N"],
    weights: Float[Array, "B N"] | None = None,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], LossSums]:
    """Sum over targets of weight * (nll + z_loss * z), differentiable in hidden and head.

    weights: None counts every target once. z: logsumexp(logits)^2 (PaLM, section 5). Returns the
    sum to differentiate, and its parts. It has only first derivatives, in reverse mode.
    """
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    total, (nll, z) = _cross_entropy(hidden, head, targets, weights, z_loss)
    return total, LossSums(nll=nll, z=z, weight=jnp.sum(weights))


def divergence(
    hidden: Float[Array, "B N D"],
    other: Float[Array, "B N D"],
    head: Float[AnyArray, "D V"],
    weights: Float[Array, "B N"] | None = None,
) -> Float[Array, ""]:
    """The sum over positions of weight * KL(p || q) in nats. p: what the head predicts from
    `hidden`. q: what it predicts from `other`. weights: as in `cross_entropy`."""
    if weights is None:
        weights = jnp.ones(hidden.shape[:2], jnp.float32)
    split = Split.of(hidden.shape)
    chunks = split.num_chunks(head.shape[1], arrays=2)  # logits of both
    head = head.astype(hidden.dtype)

    def body(total, chunk):
        *both, w = chunk
        log_p, log_q = (
            jax.nn.log_softmax(jnp.matmul(h, head, preferred_element_type=jnp.float32))
            for h in both
        )
        return total + jnp.sum(w * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)), None

    inputs = [split.to_chunks(x, chunks) for x in (hidden, other, weights)]
    return jax.lax.scan(body, jnp.float32(0), inputs)[0]


def token_scores(
    hidden: Float[Array, "B N D"],
    head: Float[AnyArray, "D V"],
    targets: Int[Array, "B N"],
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """To evaluate a model, for each target: -log p in nats, and whether no other token is more
    likely."""
    split = Split.of(hidden.shape)
    chunks = split.num_chunks(head.shape[1])
    head = head.astype(hidden.dtype)

    def one(chunk):
        h, t = chunk
        logits = jnp.matmul(h, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked, picked == logits.max(axis=-1)

    inputs = tuple(split.to_chunks(x, chunks) for x in (hidden, targets))
    nll, best = jax.lax.map(one, inputs)
    return split.from_chunks(nll), split.from_chunks(best)
