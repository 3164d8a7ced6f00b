"""Universal YOCO on a laptop: does it learn Python from Python's own standard library?

    python -m experiments.train --config=configs/yocou_small.py             (or: make train)
    python -m experiments.train --config=configs/yocou_small.py:transformer (any architecture)

1.5M parameters without embeddings, 1.3M tokens, about 3e13 FLOPs in all. The README says which loss
it reaches and how long it takes. The settings were chosen by runs with d_model 192 on 0.18M tokens
(90 steps) and their validation bits/byte: Muon at 0.003, 0.01 and 0.02 gave 2.24, 2.16 and 2.18;
AdamW at 0.004 gave 2.45; 1,024 tokens per step instead of 2,048 gave 2.16; d_model 256 at the same
FLOPs (64 steps) gave 2.28; embeddings scaled to unit variance gave 1.99, and with qk_norm too 1.99.
The width was chosen by whole runs: 640 steps with 160 gave 1.4163 and 700 gave 1.3953; 600 steps
with 192 gave 1.4216, and a step took 1.5 times as long on the same machine. Each is one run with
one seed. Nothing was tuned for another architecture. All these figures are of the validation text
of before 2026-11-27 (LOG.md).
"""

from configs import base


def get_config(architecture: str = "yoco_u"):
    c = base.get_config()
    c.model.update(
        architecture=architecture,
        num_layers=4,
        d_model=160,
        num_heads=4,
        num_kv_heads=2,
        head_dim=40,
        d_ff=640,
        window=64,
    )
    c.optimizer.update(
        name="muon",
        learning_rate=0.01,
        schedule="wsd",
        decay_fraction=0.6,
        final_fraction=0.02,
        warmup_steps=20,
    )
    c.data.update(batch_size=8, sequence_length=256, validation_sequences=128)
    c.run.update(steps=640, eval_every=200, sample_every=200, checkpoint_every=100)
    return c
