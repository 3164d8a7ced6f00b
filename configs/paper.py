"""How does the loss fall with size? The paper's seven sizes (section 4.4, Table 7, Figure 5).

    python -m experiments.train --config=configs/paper.py:1.3b,yoco_u --config.mesh.fsdp=8
    python -m experiments.train --config=configs/paper.py:300m,transformer
    python -m experiments.plan --config=configs/paper.py:10.8b --topology=v5p:4x4x4 \
        --config.mesh.fsdp=64 --config.optimizer.accumulation_steps=2

The preset is a size (300m, 500m, 870m, 1.3b, 3.4b, 6.4b, 10.8b) and an architecture (default:
yoco_u). Widths, layers, heads, learning rates, length, tokens, weight decay and window are those
of the paper. Ours are:

* The feed-forward width. Appendix C says 3 D, but with it all seven sizes are 7 to 14% larger than
  their names. With 8/3 D they fit; taken is the nearest multiple of 256.
* The K/V heads. The paper's cache sizes give four of width 128 for the 1.3B model. Here every size
  has four, and 870M has three, because four do not divide its 18 heads.
* A constant learning rate without warm-up, as in section 4.1; vocabulary, clipping and text.

Expected cost: see `experiments.account`; 21B tokens for each size. None of them ran here so far.
"""

from configs import yocou_1b
from yocou_jax.errors import UserError

# Layers, D, query heads, learning rate: Table 7.
SIZES = {
    "300m": (12, 1536, 12, 6e-4),
    "500m": (12, 2048, 16, 6e-4),
    "870m": (16, 2304, 18, 3e-4),
    "1.3b": (20, 2560, 20, 3e-4),
    "3.4b": (20, 4096, 32, 3e-4),
    "6.4b": (24, 5120, 40, 3e-4),
    "10.8b": (28, 6144, 48, 2e-4),
}


def get_config(preset: str = "1.3b"):
    size, _, architecture = preset.partition(",")
    if size not in SIZES:
        raise UserError(f"The size {size!r} is not one of: {', '.join(SIZES)}.")
    layers, width, heads, rate = SIZES[size]
    c = yocou_1b.get_config(architecture or "yoco_u")
    c.model.update(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=3 if heads % 4 else 4,
        d_ff=round(width * 8 / 3 / 256) * 256,
    )
    c.optimizer.learning_rate = rate
    return c
