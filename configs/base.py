"""Every field there is, with its unit or reason. A config imports this and changes a few lines.

Fields exist here or nowhere: `--config.model.windw=64` is answered with "Did you mean".
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()

    m = c.model = ConfigDict()
    # A name in yocou_jax.program.ARCHITECTURES, or a program such as "window*4@3 | cross*4".
    m.architecture = "yoco_u"
    m.num_layers = 8  # layers with parameters of their own; a program's text decides for itself
    m.num_loops = placeholder(int)  # runs of every looped stage; none: as the architecture says
    m.vocab_size = 4096  # rows of the embedding table, at least the tokenizer's entries
    m.d_model = 256
    m.num_heads = 4  # query heads
    m.num_kv_heads = 2  # key/value heads, shared by num_heads / num_kv_heads queries each
    m.head_dim = 64
    m.d_ff = 704  # SwiGLU width
    m.window = 128  # keys that a window layer sees, the query's own included
    m.rope_theta = 10_000.0
    m.cross_rope = False  # the paper's cross-decoder has no position encoding (NoPE)
    m.qk_norm = False  # RMSNorm on each head's queries and keys
    m.norm_eps = 1e-5
    m.tie_embeddings = False  # one table for the embedding and the output head
    m.num_experts = 0  # routed experts of each feed-forward; 0: dense, d_ff wide
    m.experts_per_token = 8
    m.num_shared_experts = 1
    m.expert_width = 1024
    m.load_balance_weight = 0.01  # of the Switch load-balance loss, mean over layers
    m.router_z_weight = 0.001  # of the squared log-partition of the router, mean over layers
    m.prefix_length = 48  # learned K/V entries per layer and stream (ParScale's 48)
    m.gate_floor = 0.1  # least share of the stream mix, spread evenly (ParScale's epsilon)

    # How the model is run: a checkpoint means the same whatever is said here.
    k = c.compute = ConfigDict()
    k.dtype = "auto"  # of activations: bfloat16 on accelerators, float32 on a CPU
    k.attention = "auto"  # a name of pallas_kernels.api, or auto: the best for the device
    k.remat = "none"  # what backward recomputes: none | attention (keeps its output) | full
    k.scan = True  # False unrolls layers and loops in Python, to debug

    o = c.optimizer = ConfigDict()
    o.name = "adamw"  # or muon, for the hidden matrices
    o.learning_rate = 1e-3  # peak (the paper's of section 4.1)
    o.schedule = "cosine"  # or wsd (constant, then linear decay), or constant
    o.warmup_steps = 100
    o.decay_fraction = 0.3  # of run.steps, the length of wsd's decay
    o.final_fraction = 0.1  # of the peak: the learning rate of the last update, exactly
    o.beta1 = 0.9  # of AdamW, as is beta2 (the paper's, Table 6)
    o.beta2 = 0.95
    o.momentum = 0.95  # of Muon (Nesterov's; yocou_jax/training/optimizer.py has the formula)
    o.eps = 1e-8  # added to AdamW's root, and to a matrix's norm by Muon's Newton-Schulz
    o.weight_decay = 0.1  # of matrices, times the learning rate (the paper's, Tables 6 and 7)
    o.clip_norm = 1.0  # of the global gradient norm (1e9: no clipping); the paper does not give it
    o.z_loss = 0.0  # weight of logsumexp(logits)^2
    o.accumulation_steps = 1  # microbatches per update
    o.max_skipped_updates = 5  # non-finite updates in a row after which the run stops

    d = c.data = ConfigDict()
    # python | site_packages | a path or glob (.txt .gz .jsonl .parquet ...) | hf:org/name[/config]
    # or a mixture: 0.7*python + 0.3*texts/*.txt
    d.source = "python"
    d.text_field = "text"  # of jsonl, parquet and Hugging Face rows
    d.bad_rows = "refuse"  # rows without text: refuse | skip (they are counted)
    d.tokenizer = "bpe"  # bytes | bpe (trained on the training split) | path of a tokenizer.json
    d.end_of_text = ""  # name of a tokenizer.json's end-of-text token; "": one of the usual names
    d.allow_lossy_tokenizer = False  # True: one that changes the text, such as to lower case
    d.vocab_size = m.get_oneway_ref("vocab_size")  # entries of a trained BPE; follows the model's
    d.packing = False  # documents with segment ids: attention stays inside each of them
    d.batch_size = 16  # sequences per update, over all devices
    d.sequence_length = 512  # tokens
    d.validation_fraction = 0.02  # of the documents, by hash of their name
    # (of small texts more, where a window of sequence_length or a batch would not be filled)
    d.validation_sequences = 64
    d.seed = 0  # of the order of the training windows
    d.cache_dir = "runs/cache"  # tokenised corpora and trained tokenizers

    s = c.mesh = ConfigDict()
    s.data = -1  # copies of the model; -1 takes the devices that are left
    s.fsdp = 1  # shards of parameters and optimiser state
    s.tensor = 1  # shards of heads, feed-forward and vocabulary

    r = c.run = ConfigDict()
    r.steps = 1000  # updates
    r.seed = 0  # of the initial parameters
    r.log_every = 10  # steps
    r.eval_every = 200  # steps
    r.sample_every = 200  # steps
    r.sample_prompt = "def "
    r.sample_tokens = 64
    r.checkpoint_every = 200  # steps
    r.keep_checkpoints = 2
    r.profile_steps = 0  # steps to trace for TensorBoard's profiler, after step 10
    return c
