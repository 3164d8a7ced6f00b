"""All fields of a config, with their units or reasons. A config imports this and changes a few.

A step is one update of the parameters. A value without a reason is small, so that a first run fits
on every device.

There are no other fields: `--config.model.windw=64` is an error that says "Did you mean".
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()

    m = c.model = ConfigDict()
    # A name in yocou_jax.program.ARCHITECTURES, or a program such as "window*4@3 | cross*4".
    m.architecture = "yoco_u"
    m.num_layers = 8  # layers with parameters of their own; not used if a program is given
    # Runs of each looped stage; none: those of the architecture. A text has several counts, and
    # each training step draws one of them (yocou_jax/loops.py): "1,2,3,5", or "poisson(3)" for
    # 1 + Poisson(2) without counts above 6. The count of the model itself (in val_loss, samples and
    # inference) is then the mean of the Poisson draw, or the architecture's count if it is named,
    # or else the largest. Validation also runs with every count.
    m.num_loops = placeholder((int, str))
    m.vocab_size = 4096  # rows of the embedding table; at least the tokenizer's entries
    m.d_model = 256  # numbers per position in the residual stream: the model width D
    m.num_heads = 4  # query heads
    m.num_kv_heads = 2  # key/value heads; num_heads / num_kv_heads query heads share each one
    m.head_dim = 64  # numbers per head; 64 and 128 need no padding in any attention kernel
    m.d_ff = 704  # width of SwiGLU: 8/3 d_model, rounded up to a multiple of 64
    # Keys that a query of a window layer sees, including its own key. The rule is `visible` in
    # pallas_kernels/attention/mask.py.
    m.window = 128
    m.rope_theta = 10_000.0  # RoPE's angles are position * rope_theta^(-2i / head_dim) (its paper)
    m.cross_rope = False  # the paper's cross-decoder has no position encoding (NoPE)
    m.qk_norm = False  # RMSNorm on the queries and keys of each head
    m.norm_eps = 1e-5  # RMSNorm adds it to the mean square (the value in YOCO's code)
    m.tie_embeddings = False  # one table for the embedding and the output head
    m.num_experts = 0  # routed experts of each feed-forward; 0: no experts, d_ff is the width
    # The next three are those of the paper's mixture of experts (Table 6).
    m.experts_per_token = 8  # routed experts that a token is sent to
    m.num_shared_experts = 1  # experts that every token passes through
    m.expert_width = 1024  # width of the SwiGLU of one expert
    # Weights of two losses of the router, each a mean over layers: the load-balance loss of Switch,
    # and logsumexp(logits)^2 of ST-MoE. The values are those of their papers.
    m.load_balance_weight = 0.01
    m.router_z_weight = 0.001
    m.prefix_length = 48  # learned K/V positions per layer and stream (48 in ParScale)
    m.gate_floor = 0.1  # a stream's weight is at least this / streams (ParScale's epsilon)

    # How the model runs. This does not change what the parameters of a checkpoint mean.
    k = c.compute = ConfigDict()
    k.dtype = "auto"  # of activations; auto: bfloat16 on accelerators, float32 on a CPU
    k.attention = "auto"  # names: pallas_kernels/attention/api.py; auto: the best for the device
    # What the backward pass computes again to save memory: none | attention (all but the results of
    # attention) | full (all)
    k.remat = "none"
    # On a CPU, a stage with at most this many runs of a layer (layers times loops) is compiled run
    # by run, a deeper one as loops. Loops copy what the backward pass keeps: a fifth of a step.
    # 0: always loops, as on other devices, where nothing was measured.
    k.unroll = 16
    k.scan = True  # False: Python loops over layers and loops, to debug

    o = c.optimizer = ConfigDict()
    o.name = "adamw"  # or muon (for the hidden matrices; AdamW for the rest)
    o.learning_rate = 1e-3  # the highest one (section 4.1 of the paper)
    o.schedule = "cosine"  # or wsd (constant, then a linear decay), or constant
    o.warmup_steps = 100  # updates in which the learning rate rises to its peak
    o.decay_fraction = 0.3  # share of run.steps; the length of the decay of wsd
    o.final_fraction = 0.1  # share of learning_rate: the exact rate of the last update
    o.beta1 = 0.9  # of AdamW: decay per update of the mean gradient (Table 6 of the paper)
    o.beta2 = 0.95  # of AdamW: decay per update of the mean squared gradient (Table 6)
    o.momentum = 0.95  # of Muon, as in optax (formula: make_optimizer in training/optimizer.py)
    o.eps = 1e-8  # AdamW adds it to the root, Muon to the norm of a matrix (optax's default)
    o.weight_decay = 0.1  # of matrices, times the learning rate (Tables 6 and 7 of the paper)
    o.clip_norm = 1.0  # limit of the global gradient norm (1e9: no limit); not in the paper
    o.z_loss = 0.0  # weight of logsumexp(logits)^2 in the loss (PaLM); 0: no such term
    # Weights of losses after loop 1, 2, ..., such as "0.1,0.2,1": the objective is their weighted
    # mean. "": only after the last loop. After each loop with a weight, the layers after the looped
    # stage and the head run once more. The program has one looped stage, with as many loops.
    o.loop_loss = ""
    # Truncated backpropagation: the gradient passes through this number of last loops of each
    # looped stage; none: all. What the earlier loops add to the residual stream is a constant, so
    # the embedding and the layers before the stage get a gradient, but not the one through them.
    o.backprop_loops = placeholder(int)
    o.accumulation_steps = 1  # microbatches per update; more of them need less memory
    o.max_skipped_updates = 5  # the run stops after this number of non-finite updates in a row

    d = c.data = ConfigDict()
    # python | site_packages | a path or glob (.txt .gz .jsonl .parquet ...) | hf:org/name[/config]
    # | hf:...@commit | hops(...) | needle(...) (tasks: yocou_jax/data/synthetic.py)
    # or a mixture such as 0.7*python + 0.3*texts/*.txt
    d.source = "python"
    d.text_field = "text"  # name of the field with the text, in JSON, parquet and Hugging Face rows
    d.bad_rows = "refuse"  # rows without text: refuse | skip (and count them)
    d.tokenizer = "bpe"  # bytes | bpe (trained on the training split) | path of a tokenizer.json
    d.end_of_text = ""  # name of the end-of-text token in a tokenizer.json; "": a usual name
    d.allow_lossy_tokenizer = False  # allows a tokenizer that changes the text (to lower case)
    d.vocab_size = m.get_oneway_ref("vocab_size")  # entries of a trained BPE; follows the model's
    # Documents are always joined, and a sequence may have parts of several. True separates them:
    # attention stays inside each document (segment ids).
    d.packing = False
    d.batch_size = 16  # sequences per update, over all devices
    d.sequence_length = 512  # tokens that a sequence has as inputs
    d.validation_fraction = 0.02  # share of the documents; the hash of a name decides
    # (a small text gets another share if a held-out sequence or a batch would not be full)
    # Held-out sequences that one validation reads, or fewer if there are not so many. It may change
    # on resume, although the validation loss then differs.
    d.validation_sequences = 64
    d.seed = 0  # for the order of the training sequences
    d.cache_dir = "runs/cache"  # tokenized corpora, trained tokenizers and compiled programs
    # A start does not read files again that have the same paths, sizes and times as in an earlier
    # one. True: it reads all of them, and so finds a change that left all these as they were; and
    # it asks for the newest commit of a Hugging Face data set.
    d.verify = False

    # How devices share the work (yocou_jax/sharding.py). mesh.data is not the group `data` above.
    s = c.mesh = ConfigDict()
    s.data = -1  # copies of the model, each for other rows of a batch; -1: all devices left
    s.fsdp = 1  # parts of the parameters and the optimizer state
    s.tensor = 1  # parts of the heads, the feed-forward and the vocabulary
    s.context = 1  # parts of the positions of a sequence, and of what fsdp splits
    s.expert = 1  # parts of the experts, and of the rows of a batch

    r = c.run = ConfigDict()
    r.steps = 1000  # updates
    r.seed = 0  # for the initial parameters, and for loop counts that are drawn
    r.log_every = 10  # steps from one row of metrics to the next
    r.eval_every = 200  # steps from one validation to the next
    # True: each validation also measures what happens inside the model and its loops, on one batch
    # (yocou_jax/analysis). In yocou_small on a CPU this takes as long as 7 updates (LOG.md).
    r.analysis = False
    r.sample_every = 200  # steps from one sample (a text of the model) to the next
    r.sample_prompt = "def "  # what a sample continues: Python code, as data.source
    r.sample_tokens = 64  # new tokens of a sample
    r.checkpoint_every = 200  # steps from one checkpoint to the next
    r.keep_checkpoints = 2  # the newest ones that stay; a second one, if the newest is damaged
    # How many steps TensorBoard's profiler records; 0: none. They come after the first 10 steps of
    # this process (PROFILE_FROM in yocou_jax/config.py), because the first steps warm up. So a
    # resumed run records steps too, counted from its checkpoint.
    r.profile_steps = 0
    return c
