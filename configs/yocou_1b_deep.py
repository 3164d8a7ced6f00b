"""Deeper and narrower at the same size: the 40-layer layout of the ablation (Table 5).

    python -m experiments.train --config=configs/yocou_1b_deep.py --config.mesh.fsdp=8

The paper gives 40 layers, D = 1792, and as many parameters as the 20-layer layout has. The other
settings are those of configs/yocou_1b.py. The paper does not give the heads and the feed-forward
width. Taken here are 16 query heads of width 128, so that the K/V width stays 512, and d_ff = 4608,
which makes 1.323B parameters without embeddings. The paper reports Wiki perplexity 21.42 for this
layout and 21.01 for the 20-layer layout. This is not reproduced here so far.
"""

from configs import yocou_1b


def get_config(architecture: str = "yoco_u"):
    c = yocou_1b.get_config(architecture)
    c.model.update(num_layers=40, d_model=1792, num_heads=16, d_ff=4608)
    return c
