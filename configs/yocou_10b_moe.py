"""The mixture-of-experts model: 64 experts, top-8, one shared, width 1024 (Table 2).

    python -m experiments.train --config=configs/yocou_10b_moe.py \
        --config.mesh.fsdp=32 --config.mesh.data=-1                      (64 devices of 80 GB)

75,000 steps of 4M tokens are the paper's 300B. At D = 2560 and 20 layers this is 10.5B parameters
without embeddings, of which a token uses 1.5B; the paper calls it "10B total, 1.3B active". It
reports averages over eight tasks of 46.23 (equal FLOPs) against YOCO's 41.78; not reproduced here.
"""

from configs import yocou_1b


def get_config(architecture: str = "yoco_u"):
    c = yocou_1b.get_config(architecture)
    c.model.update(num_experts=64, experts_per_token=8, num_shared_experts=1, expert_width=1024)
    c.model.remat = "full"
    c.optimizer.accumulation_steps = 8
    c.data.update(batch_size=512)
    c.run.update(steps=75_000)
    return c
