"""The kinds of layers that a program can name, and the facts of each: arithmetic without arrays.

A mixer is the part of a layer that moves information between positions. Norms and feed-forward are
the same in every layer. `MIXERS` has the facts that programs, accounting and the choice of kernels
need. `MODULES` in yocou_jax/model/attention.py has the same keys, and the modules that compute. No
other code compares the name of a mixer. So a new mixer needs one entry in each table. If its module
needs a memory or an axis name that does not exist yet, these are new too (CONTRIBUTING.md has the
steps).
"""

import typing

if typing.TYPE_CHECKING:
    from yocou_jax.config import ModelConfig


class Kernel(typing.NamedTuple):
    """The operation of pallas_kernels/attention/api.py that a layer calls in training, and its
    arguments. "cross_attention" is causal attention over all keys: full layers call it too.

    window: number of visible keys, the query's own included. None: all keys up to the query's own.
    prefix: number of learned keys before the first position.
    """

    operation: str
    window: int | None = None
    prefix: int = 0


class Mixer:
    """Facts of one layer, for one sequence and one parallel stream. Sizes are numbers, not bytes.

    reads_global: True if the layer attends to the one global K, V. Then it has no memory of its own
    in inference, and only layers of this kind may come after it in a program. False: its module
    makes its memory.
    streams: True if the layer can run in parallel streams (ParScale).
    """

    reads_global = False
    streams = False

    def kernel(self, config: "ModelConfig") -> Kernel | None:
        """The attention kernel that training calls, or None."""
        return None

    def weights(self, config: "ModelConfig") -> int:
        """Entries of its matrices. Each entry costs one multiply-add per position."""
        raise NotImplementedError

    def scales(self, config: "ModelConfig") -> int:
        """Scales of norms inside the mixer."""
        return 0

    def other_parameters(self, config: "ModelConfig") -> int:
        """Parameters that are neither matrices nor scales, of all streams together."""
        return 0

    def sequence_flops(self, config: "ModelConfig", length: int) -> int:
        """FLOPs of a forward pass over `length` positions, without those of the matrices."""
        raise NotImplementedError

    def step_flops(self, config: "ModelConfig", context: int) -> int:
        """FLOPs of one decode step at the newest of `context` positions, without the matrices."""
        raise NotImplementedError

    def memory_size(self, config: "ModelConfig", length: int) -> int:
        """How many numbers (not bytes) the layer's own memory stores, if it has room for `length`
        positions. For one sequence in one parallel stream: accounting.py multiplies the result by
        streams, loops and layers. 0 for a layer that reads the global K, V, which count once."""
        raise NotImplementedError

    def step_reads(self, config: "ModelConfig", context: int) -> int:
        """How many numbers a decode step reads from memory, at the newest of `context` positions:
        from the layer's own memory, or from the global K, V."""
        raise NotImplementedError


class Attention(Mixer):
    """Softmax attention. Its kinds differ in the keys that a query sees.

    FLOPs of each visible (query, key) pair and query head: 2 H for the score, 2 H for the value.
    """

    own_kv = True  # whether it has W_k and W_v

    def pairs(self, config: "ModelConfig", length: int) -> int:
        """Number of visible (query, key) pairs per head, in a causal sequence of `length`."""
        return length * (length + 1) // 2

    def keys(self, config: "ModelConfig", context: int) -> int:
        """Number of keys that the newest of `context` positions sees, its own included."""
        return context

    def positions(self, config: "ModelConfig", length: int) -> int:
        """For how many positions its memory stores keys and values (Table 1, KV memory)."""
        return length

    def kernel(self, config: "ModelConfig") -> Kernel:
        return Kernel("cross_attention")

    def weights(self, config: "ModelConfig") -> int:
        """W_q, W_o and, if the layer has keys and values of its own, W_k and W_v."""
        own_kv = 2 * config.num_kv_heads if self.own_kv else 0
        return config.d_model * config.head_dim * (2 * config.num_heads + own_kv)

    def scales(self, config: "ModelConfig") -> int:
        if not config.qk_norm:
            return 0
        return 2 * config.head_dim if self.own_kv else config.head_dim

    def sequence_flops(self, config: "ModelConfig", length: int) -> int:
        return 4 * config.num_heads * config.head_dim * self.pairs(config, length)

    def step_flops(self, config: "ModelConfig", context: int) -> int:
        return 4 * config.num_heads * config.head_dim * self.keys(config, context)

    def memory_size(self, config: "ModelConfig", length: int) -> int:
        return self.positions(config, length) * kv_width(config)

    def step_reads(self, config: "ModelConfig", context: int) -> int:
        return self.keys(config, context) * kv_width(config)


class Window(Attention):
    """Causal self-attention over the last W keys, the query's own included (RoPE)."""

    def pairs(self, config: "ModelConfig", length: int) -> int:
        w = min(config.window, length)
        return w * (w + 1) // 2 + (length - w) * w

    def keys(self, config: "ModelConfig", context: int) -> int:
        return min(config.window, context)

    def positions(self, config: "ModelConfig", length: int) -> int:
        return config.window

    def kernel(self, config: "ModelConfig") -> Kernel:
        return Kernel("window_attention", window=config.window)


class Full(Attention):
    """Causal self-attention over all keys up to the query's own (RoPE). In parallel streams also
    over the learned keys and values of the stream (ParScale)."""

    streams = True

    def pairs(self, config: "ModelConfig", length: int) -> int:
        return super().pairs(config, length) + length * config.kv_prefix

    def keys(self, config: "ModelConfig", context: int) -> int:
        return context + config.kv_prefix

    def positions(self, config: "ModelConfig", length: int) -> int:
        return length + config.kv_prefix

    def kernel(self, config: "ModelConfig") -> Kernel:
        return Kernel("cross_attention", prefix=config.kv_prefix)

    def other_parameters(self, config: "ModelConfig") -> int:
        return config.program.streams * config.kv_prefix * kv_width(config)


class Cross(Attention):
    """Causal attention to the one global K, V, which are computed outside the layer."""

    reads_global = True
    own_kv = False

    def positions(self, config: "ModelConfig", length: int) -> int:
        return 0


def kv_width(config: "ModelConfig") -> int:
    """How many numbers the keys and values of one position have, all heads together."""
    return 2 * config.num_kv_heads * config.head_dim


MIXERS: dict[str, Mixer] = {"window": Window(), "full": Full(), "cross": Cross()}
