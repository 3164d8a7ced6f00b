"""Does the loop pay at 1.3B? The paper's dense comparison (Table 3), one preset per architecture.

    python -m experiments.train --config=configs/yocou_1b.py --config.mesh.fsdp=8
    python -m experiments.train --config=configs/yocou_1b.py:transformer --config.mesh.fsdp=8
    python -m experiments.account --config=configs/yocou_1b.py

L = 20, D = 2560, W = 512, 3 loops, K/V width 512, AdamW at 1e-3, sequences of 8192 and about 20B
tokens are the paper's. It does not give the feed-forward width (6656 makes 1.3B without
embeddings), the vocabulary, warm-up, weight decay or clipping: those here are ours. The paper
reports Wiki perplexity 21.01 for yoco_u, 22.25 for yoco and 22.52 for transformer; not reproduced
here so far.
Expected cost: see `experiments.account` (training FLOPs per token x 21B tokens). With 8 devices a
microbatch is 2 sequences each (8 microbatches); on more devices lower accumulation_steps.
"""

from configs import base


def get_config(architecture: str = "yoco_u"):
    c = base.get_config()
    c.model.update(
        architecture=architecture,
        num_layers=20,
        vocab_size=32_768,
        d_model=2560,
        num_heads=20,
        num_kv_heads=4,
        head_dim=128,
        d_ff=6656,
        window=512,
        remat="attention",
    )
    c.optimizer.update(learning_rate=1e-3, warmup_steps=500, accumulation_steps=8)
    c.data.update(
        source="hf:HuggingFaceFW/fineweb-edu/sample-100BT",
        batch_size=128,
        sequence_length=8192,
    )
    c.run.update(steps=20_000, eval_every=1000, sample_every=1000, checkpoint_every=1000)
    return c
