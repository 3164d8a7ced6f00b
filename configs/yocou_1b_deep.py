"""Deeper and narrower at the same size: the 40-layer layout of the ablation (Table 5).

    python -m experiments.train --config=configs/yocou_1b_deep.py --config.mesh.fsdp=8

40 layers, D = 1792 and as many parameters as in the 20-layer layout are the paper's, and so is the
rest of configs/yocou_1b.py. The heads and the feed-forward width it does not give: 16 query heads
of 128 keep the K/V width of 512, and d_ff = 4608 makes 1.323B without embeddings. The paper reports
Wiki perplexity 21.42 for this layout and 21.01 for the 20-layer one; not reproduced here so far.
"""

from configs import yocou_1b


def get_config(architecture: str = "yoco_u"):
    c = yocou_1b.get_config(architecture)
    c.model.update(num_layers=40, d_model=1792, num_heads=16, d_ff=4608)
    return c
