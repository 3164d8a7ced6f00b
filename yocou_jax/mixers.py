"""The kinds of layers that a program can name, and the facts of each: pure arithmetic, no arrays.

A mixer is the part of a layer that moves information between positions; norms and feed-forward are
the same in every layer. `MIXERS` has the facts that programs, accounting and the choice of kernels
ask for, and `MODULES` in the model, with the same keys, has what is computed. Nothing else knows a
mixer by its name, so a new one is an entry in each of the two (see CONTRIBUTING.md).
"""

import typing

if typing.TYPE_CHECKING:
    from yocou_jax.config import ModelConfig


class Kernel(typing.NamedTuple):
    """Which operation of pallas_kernels.api a layer calls in training, with which arguments.

    window: visible keys, the query's own included; None for all before. prefix: learned keys
    before the first position.
    """

    operation: str
    window: int | None = None
    prefix: int = 0


class Mixer:
    """Facts of one layer, for one sequence and one parallel stream; numbers are not bytes.

    reads_global: it reads the one global K, V and keeps nothing during inference, so only such
    layers may follow it. What others keep, their modules say. streams: whether it can run in
    parallel streams (ParScale).
    """

    reads_global = False
    streams = False

    def kernel(self, config: "ModelConfig") -> Kernel | None:
        """The attention kernel that training calls; None without one."""
        return None

    def weights(self, config: "ModelConfig") -> int:
        """Entries of its matrices: each is one multiply-add for each position."""
        raise NotImplementedError

    def scales(self, config: "ModelConfig") -> int:
        """Scales of norms inside the mixer."""
        return 0

    def learned(self, config: "ModelConfig") -> int:
        """Parameters that are neither matrices nor scales, of all streams together."""
        return 0

    def sequence_flops(self, config: "ModelConfig", length: int) -> int:
        """Forward FLOPs over a sequence of `length` positions, without those of the weights."""
        raise NotImplementedError

    def step_flops(self, config: "ModelConfig", context: int) -> int:
        """The same for the newest of `context` positions, in one decode step."""
        raise NotImplementedError

    def kept(self, config: "ModelConfig", length: int) -> int:
        """Numbers that its memory holds after `length` positions, in room for just these."""
        raise NotImplementedError

    def read(self, config: "ModelConfig", context: int) -> int:
        """Numbers of a memory that a decode step reads when it sees `context` positions."""
        raise NotImplementedError


class Attention(Mixer):
    """Softmax attention: what differs between its kinds is which keys a query sees.

    FLOPs: 2 H for the score and 2 H for the value of each visible (query, key) pair and query head.
    """

    own_kv = True  # whether it has W_k and W_v

    def pairs(self, config: "ModelConfig", length: int) -> int:
        """Visible (query, key) pairs of one causal sequence of `length` positions, one head."""
        return length * (length + 1) // 2

    def keys(self, config: "ModelConfig", context: int) -> int:
        """Keys that the newest of `context` positions sees, its own included."""
        return context

    def positions(self, config: "ModelConfig", length: int) -> int:
        """Positions whose keys and values its memory holds (Table 1, column KV memory)."""
        return length

    def kernel(self, config: "ModelConfig") -> Kernel:
        return Kernel("cross_attention")

    def weights(self, config: "ModelConfig") -> int:
        """W_q, W_o and, if it has its own, W_k and W_v."""
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

    def kept(self, config: "ModelConfig", length: int) -> int:
        return self.positions(config, length) * kv_width(config)

    def read(self, config: "ModelConfig", context: int) -> int:
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
    """Causal self-attention over everything before (RoPE), and in parallel streams over each
    stream's own learned keys and values (ParScale)."""

    streams = True

    def pairs(self, config: "ModelConfig", length: int) -> int:
        return super().pairs(config, length) + length * config.kv_prefix

    def keys(self, config: "ModelConfig", context: int) -> int:
        return context + config.kv_prefix

    def positions(self, config: "ModelConfig", length: int) -> int:
        return length + config.kv_prefix

    def kernel(self, config: "ModelConfig") -> Kernel:
        return Kernel("cross_attention", prefix=config.kv_prefix)

    def learned(self, config: "ModelConfig") -> int:
        return config.program.streams * config.kv_prefix * kv_width(config)


class Cross(Attention):
    """Causal attention on the one global K, V, which it only reads."""

    reads_global = True
    own_kv = False

    def positions(self, config: "ModelConfig", length: int) -> int:
        return 0


def kv_width(config: "ModelConfig") -> int:
    """Numbers of one position's keys and values in all heads."""
    return 2 * config.num_kv_heads * config.head_dim


MIXERS: dict[str, Mixer] = {"window": Window(), "full": Full(), "cross": Cross()}
