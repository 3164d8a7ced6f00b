"""The same language model in PyTorch: what a user would write instead, with `torch.compile`.

It runs in the process of child.py, with torch and numpy only. `sizes` are those of
`weights.twin_sizes`, and `arrays` those of `weights.twin_arrays`, by the names of the parameters
here. Window layers give scaled_dot_product_attention a mask, because it has no windows.

Shapes: x [B, N, D], queries [B, Q, N, H], keys and values [B, K, N, H], angles (their cosines and
sines, [N, H / 2] each), mask [N, N], tokens and targets [B, N]. The result is the mean loss, in
nats.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class KeyValue(nn.Module):
    """x [B, N, D] -> k and v [B, K, N, H]."""

    def __init__(self, s, rotated):
        super().__init__()
        self.K, self.H, self.rotated = s["num_kv_heads"], s["head_dim"], rotated
        self.project = linear(s["d_model"], 2 * self.K * self.H)
        self.norm = RMSNorm(self.H, s["norm_eps"]) if s["qk_norm"] else nn.Identity()

    def forward(self, x, angles):
        B, N, _ = x.shape
        k, v = self.project(x).view(B, N, 2, self.K, self.H).permute(2, 0, 3, 1, 4)
        k = self.norm(k)
        return (rope(k, *angles) if self.rotated else k), v


class Block(nn.Module):
    def __init__(self, s, stage):
        super().__init__()
        D, eps = s["d_model"], s["norm_eps"]
        self.Q, self.H = s["num_heads"], s["head_dim"]
        self.windowed, reads_global = stage["window"] is not None, stage["reads_global"]
        self.rotated = not reads_global or s["cross_rope"]
        self.attention_norm, self.feed_forward_norm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.query = linear(D, self.Q * self.H)
        self.query_norm = RMSNorm(self.H, eps) if s["qk_norm"] else nn.Identity()
        self.key_value = None if reads_global else KeyValue(s, rotated=True)
        self.output = linear(self.Q * self.H, D)
        self.gate_up, self.down = linear(D, 2 * s["d_ff"]), linear(s["d_ff"], D)

    def forward(self, x, angles, mask, global_kv):
        B, N, _ = x.shape
        h = self.attention_norm(x)
        q = self.query_norm(self.query(h).view(B, N, self.Q, self.H)).transpose(1, 2)
        q = rope(q, *angles) if self.rotated else q
        k, v = global_kv if self.key_value is None else self.key_value(h, angles)
        seen = {"attn_mask": mask} if self.windowed else {"is_causal": True}
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **seen)
        x = x + self.output(y.transpose(1, 2).reshape(B, N, self.Q * self.H))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Stage(nn.Module):
    def __init__(self, s, stage):
        super().__init__()
        self.loops, self.reads_global = stage["loops"], stage["reads_global"]
        self.layers = nn.ModuleList(Block(s, stage) for _ in range(stage["layers"]))

    def forward(self, x, *context):
        for _ in range(self.loops):
            for block in self.layers:
                x = block(x, *context)
        return x


class LanguageModel(nn.Module):
    def __init__(self, s):
        super().__init__()
        D, N = s["d_model"], s["sequence_length"]
        self.embedding, self.scale = nn.Embedding(s["vocab_size"], D), D**0.5
        self.stages = nn.ModuleList(Stage(s, stage) for stage in s["stages"])
        if any(stage["reads_global"] for stage in s["stages"]):
            self.global_norm = RMSNorm(D, s["norm_eps"])
            self.global_kv = KeyValue(s, rotated=s["cross_rope"])
        self.final_norm = RMSNorm(D, s["norm_eps"])
        self.head = linear(D, s["vocab_size"])
        if s["tie_embeddings"]:
            self.head.weight = self.embedding.weight
        i = torch.arange(N)
        distance = i[:, None] - i[None]
        window = max((stage["window"] or 0) for stage in s["stages"])
        self.register_buffer("mask", (distance >= 0) & (distance < window))
        half = s["head_dim"] // 2
        angles = i[:, None] * s["rope_theta"] ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens, targets):
        x, angles, global_kv = self.scale * self.embedding(tokens), (self.cos, self.sin), None
        for stage in self.stages:
            if stage.reads_global and global_kv is None:
                global_kv = self.global_kv(self.global_norm(x), angles)
            x = stage(x, angles, self.mask, global_kv)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Model:
    """The model with its optimizer, and one way to train it."""

    def __init__(self, sizes, arrays):
        self.sizes, self.model = sizes, LanguageModel(sizes)
        parameters = dict(self.model.named_parameters())
        if arrays.keys() != parameters.keys():
            raise ValueError(f"Other parameters: {sorted(arrays.keys() ^ parameters.keys())}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(arrays[name]))
        o = sizes["optimizer"]
        groups = [
            {"params": [p for p in parameters.values() if p.ndim > 1]},
            {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=o["learning_rate"],
            betas=(o["beta1"], o["beta2"]),
            eps=o["eps"],
            weight_decay=o["weight_decay"],
            fused=True,
        )
        self.forward = torch.compile(self.model) if sizes["compile"] else self.model

    def batch(self, seed):
        """Random tokens and their targets [B, N]; `training.batch` draws the same."""
        s = self.sizes
        shape = (s["batch_size"], s["sequence_length"] + 1)
        text = torch.from_numpy(np.random.default_rng(seed).integers(0, s["vocab_size"], shape))
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def loss(self, seed):
        with torch.no_grad():
            return self.model(*self.batch(seed)).item()

    def step(self, seed):
        """One update from the batch of this seed: its seconds, and the loss before it."""
        batch = self.batch(seed)
        begin = time.perf_counter()
        loss = self.forward(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.sizes["optimizer"]["clip_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"seconds": time.perf_counter() - begin, "loss": loss.item()}
