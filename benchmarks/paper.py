"""The figures of arXiv 2604.01220 (Universal YOCO) that a run is compared with, and the aims."""

import dataclasses

from yocou_jax.config import ModelConfig

# The 1.3B model in bf16: tokens/s of prefill (Table 8) and of decode, all 32 rows together (Table
# 9), on one H100; KV cache in MiB per sequence (Table 10).
LENGTHS = (8192, 16_384, 32_768, 65_536, 131_072, 262_144)
TABLES = {
    "prefill": {
        "transformer": (85_707, 66_342, 45_566, 27_276, 14_987, 7475),
        "yoco": (220_662, 219_734, 218_247, 219_106, 220_416, 220_407),
        "rins": (42_905, 33_276, 22_767, 13_630, 7397, 3739),
        "yoco_u": (75_637, 75_694, 76_202, 76_148, 75_534, 76_301),
    },
    "decode": {
        "transformer": (2712, 1795, 638, 450, 220, 137),
        "yoco": (3356, 2539, 1722, 975, 556, 318),
        "rins": (1582, 580, 234, 118, 96, 56),
        "yoco_u": (2410, 1966, 1419, 865, 514, 303),
    },
    "kv": {
        "transformer": (320, 640, 1280, 2560, 5120, 10_240),
        "yoco": (26, 42, 74, 138, 266, 522),
        "rins": (640, 1280, 2560, 5120, 10_240, 20_480),
        "yoco_u": (46, 62, 94, 158, 286, 542),
    },
}


def is_the_papers(config: ModelConfig, itemsize: int = 2) -> bool:
    """Whether the paper measured this model: with its sizes, its loops and a type of 2 bytes."""
    sizes = config.program.layers, config.d_model, config.num_kv_heads * config.head_dim
    same = (*sizes, config.window, config.num_experts) == (20, 2560, 512, 512, 0)
    loops = config.program == dataclasses.replace(config, num_loops=None).program
    return same and loops and itemsize == 2


def figure(
    kind: str, architecture: str, config: ModelConfig, length: int, itemsize: int = 2
) -> float | None:
    """The paper's figure; None if it has none for this model in a type of `itemsize` bytes."""
    row = TABLES[kind].get(architecture)
    if row is None or length not in LENGTHS or not is_the_papers(config, itemsize):
        return None
    return row[LENGTHS.index(length)]


AIM_LENGTH = 262_144
# At AIM_LENGTH: words, the kind of ratio, of which architecture to which (as in
# `comparison.ratios`), and how much the ratio should be at least.
AIMS = (
    ("prefill at least 10.2x the transformer's", "prefill", "yoco_u", "transformer", 10.2),
    ("decode at least 2.2x the transformer's", "decode", "yoco_u", "transformer", 2.2),
    ("KV cache 18.9x smaller than the transformer's", "kv", "yoco_u", "transformer", 10_240 / 542),
    ("decode within 5% of yoco's", "decode", "yoco_u", "yoco", 0.95),
)
AIMED = ("transformer", "yoco", "yoco_u")  # measured first at each length
