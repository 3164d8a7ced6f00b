"""LlamaForCausalLM of transformers 5.x in float32, with scaled_dot_product_attention.

It runs in the process of child.py. The cache is `DynamicCache`, which `generate` takes by default.
"""

import inspect
import time

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


class Model:
    """sizes: those of LlamaConfig. arrays: the parameters by the names of LlamaForCausalLM."""

    def __init__(self, sizes, arrays):
        config = LlamaConfig(**sizes, attn_implementation="sdpa")
        self.model = LlamaForCausalLM(config).eval()
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.model.load_state_dict(state)
        # Later releases of transformers 5 have another name for it.
        arguments = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in arguments else "past_key_values"

    @torch.inference_mode()
    def forward(self, tokens, cache, keep=1):
        """Logits [B, keep, V] after tokens [B, N], of the last `keep` positions, or of all if keep
        is 0. The cache is extended."""
        options = {self.cache_name: cache, "use_cache": True, "logits_to_keep": keep}
        return self.model(input_ids=tokens, **options).logits

    def new_cache(self):
        return DynamicCache(config=self.model.config)

    def logits(self, tokens, then):
        """Logits after the tokens [B, N], and after one more token [B] for each row."""
        cache = self.new_cache()
        first = self.forward(torch.tensor(tokens), cache)
        second = self.forward(torch.tensor(then)[:, None], cache)
        return [first[:, 0].tolist(), second[:, 0].tolist()]

    def prefill(self, batch, length, warm):
        """Seconds to read a prompt, after a prompt of `warm` tokens, to warm up."""
        shape = (batch, length)
        tokens = np.random.default_rng(0).integers(0, self.model.config.vocab_size, shape)
        tokens = torch.from_numpy(tokens)
        self.forward(tokens[:, :warm], self.new_cache())
        begin = time.perf_counter()
        self.forward(tokens, self.new_cache())
        return time.perf_counter() - begin

    @torch.inference_mode()
    def random_cache(self, batch, length):
        """A cache of random values, because the cost of a step depends on lengths alone."""
        c, cache = self.model.config, self.new_cache()
        shape = (batch, c.num_key_value_heads, length, c.head_dim)
        for layer in range(c.num_hidden_layers):
            # All rows are equal, because it takes long to draw them.
            k, v = torch.randn(2, 1, *shape[1:])
            cache.update(k.expand(shape).contiguous(), v.expand(shape).contiguous(), layer)
        return cache

    def decode(self, batch, length, steps):
        """Seconds of `steps` greedy steps. After the last one, `length` positions are cached. To
        warm up, the same steps run once before."""
        cache = self.random_cache(batch, length - steps)
        for warm in (True, False):
            token = torch.zeros(batch, 1, dtype=torch.long)
            begin = time.perf_counter()
            for _ in range(steps):
                token = self.forward(token, cache).argmax(-1)
            seconds = time.perf_counter() - begin
            if warm:
                cache.crop(-steps)
        return seconds
