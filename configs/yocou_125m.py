"""A first real run on one accelerator: 124M parameters on web text, 74M without embeddings.

    python -m experiments.train --config=configs/yocou_125m.py

12 layers with D = 768, as in the small GPT-2. 20,000 steps of 131,072 tokens are 2.6B tokens.
Without a network: --config.data.source=site_packages. This config never ran so far.
"""

from configs import base


def get_config(architecture: str = "yoco_u"):
    c = base.get_config()
    c.model.update(
        architecture=architecture,
        num_layers=12,
        vocab_size=32_768,
        d_model=768,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        d_ff=2048,
        window=512,
    )
    c.compute.remat = "attention"
    c.optimizer.update(learning_rate=1e-3, warmup_steps=500)
    c.data.update(
        source="hf:HuggingFaceFW/fineweb-edu/sample-10BT", batch_size=64, sequence_length=2048
    )
    c.run.update(steps=20_000, eval_every=500, sample_every=1000, checkpoint_every=1000)
    return c
