"""One dial: the depth sets width, heads, learning rate, batch and tokens.

    python -m experiments.train --config=configs/dial.py:d2
    python -m experiments.train --config=configs/dial.py:d12,transformer

d2, d4, d6, ... have so many layers; an architecture may follow. d2 needs 6e13 FLOPs (two runs of
configs/yocou_small.py), d4 3e15, d12 2e18, d20 3e19. The rules:

    D = 64 * depth          heads of 64 (of 128 from D = 1024), at most four K/V heads
    d_ff = 8/3 D            the nearest multiple of 64
    W = 64 up to D = 512, else 512; sequences of 4 W tokens
    tokens = 20 for each parameter without embeddings (Chinchilla, arXiv 2203.15556)
    batch = the power of two next to 4 sqrt(tokens)      (of tokens; at least 2,048)
    learning rate = 0.01 * sqrt(160 / D), Muon           (0.01 was chosen at D = 160 and 192)

They are rules of thumb: no run has tuned them, and none was made so far.
"""

import math

from configs import base
from yocou_jax import accounting
from yocou_jax.config import ModelConfig
from yocou_jax.errors import UserError


def get_config(preset: str = "d4"):
    word, _, architecture = preset.partition(",")
    depth = int(word[1:]) if word[:1] == "d" and word[1:].isdecimal() else 0
    if depth % 2 or not 2 <= depth <= 64:
        raise UserError(f"{word!r} must be d and an even depth from 2 to 64, as d12.")
    width = 64 * depth
    head = 64 if width < 1024 else 128
    window = 64 if width <= 512 else 512
    c = base.get_config()
    c.model.update(
        architecture=architecture or "yoco_u",
        num_layers=depth,
        vocab_size=4096 if width <= 512 else 32_768,
        d_model=width,
        num_heads=width // head,
        num_kv_heads=math.gcd(4, width // head),
        head_dim=head,
        d_ff=round(width * 8 / 3 / 64) * 64,
        window=window,
    )
    c.optimizer.update(
        name="muon",
        learning_rate=0.01 * math.sqrt(160 / width),
        schedule="wsd",
        decay_fraction=0.6,
        final_fraction=0.02,
        warmup_steps=20,
    )
    tokens = 20 * accounting.parameters(ModelConfig.from_dict(c.model)).non_embedding
    batch = 2 ** round(math.log2(max(2048, 4 * math.sqrt(tokens))))
    c.data.update(batch_size=max(1, batch // (4 * window)), sequence_length=4 * window)
    c.run.steps = max(1, round(tokens / (c.data.batch_size * c.data.sequence_length)))
    return c
