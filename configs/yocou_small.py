"""Universal YOCO on a laptop: does it learn Python from Python's own standard library?

python -m experiments.train --config=configs/yocou_small.py             (or: make train)
python -m experiments.train --config=configs/yocou_small.py:transformer (any architecture)
"""

from configs import base


def get_config(architecture: str = "yoco_u"):
    c = base.get_config()
    c.model.update(
        architecture=architecture,
        num_layers=4,
        d_model=192,
        num_heads=4,
        num_kv_heads=2,
        head_dim=48,
        d_ff=768,
        window=64,
    )
    c.optimizer.update(schedule="wsd", decay_fraction=0.6, final_fraction=0.02, warmup_steps=20)
    c.data.update(batch_size=8, sequence_length=256, validation_sequences=128)
    c.run.update(steps=560)
    return c
