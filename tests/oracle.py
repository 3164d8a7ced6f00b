"""The oracle: the whole training objective in plain numpy and float64.

It follows the paper (arXiv 2604.01220) and the public docstrings: one line per sentence, loops
where the library has scans, and whole matrices where it has blocks. From the library it takes only
the program of a config and the names of the parameters.
"""

import numpy as np

from yocou_jax.config import Config, ModelConfig
from yocou_jax.data.pipeline import Batch
from yocou_jax.typing import PyTree


def to_float64(tree: PyTree) -> PyTree:
    if isinstance(tree, dict):
        return {name: to_float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)


def layer_of(tree: PyTree, layer: int) -> PyTree:
    """The parameters of one layer of a stack."""
    if isinstance(tree, dict):
        return {name: layer_of(part, layer) for name, part in tree.items()}
    return tree[layer]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logsumexp(x):
    top = x.max(-1)
    return top + np.log(np.exp(x - top[..., None]).sum(-1))


def norm(x, params, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * params["scale"]


def rotate(x, positions, theta):
    """RoPE: entries i and i + H/2 are one complex number, rotated by position theta^(-2i/H)."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def query(x, params, c: ModelConfig):
    q = np.einsum("bnd,dqh->bnqh", x, params["project"]["kernel"])
    return norm(q, params["norm"], c.norm_eps) if c.qk_norm else q


def key_value(x, params, c: ModelConfig):
    k = np.einsum("bnd,dkh->bnkh", x, params["key"]["kernel"])
    v = np.einsum("bnd,dkh->bnkh", x, params["value"]["kernel"])
    return (norm(k, params["norm"], c.norm_eps) if c.qk_norm else k), v


def attend(q, k, v, mask):
    """mask [B, N, S]. Query head h reads key head h // (Q / K)."""
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("bnqh,bsqh->bqns", q, k) / np.sqrt(q.shape[-1])
    p = softmax(np.where(mask[:, None], scores, -np.inf))
    return np.einsum("bqns,bsqh->bnqh", p, v)


def self_attention(x, params, c: ModelConfig, mixer, positions, causal):
    q = rotate(query(x, params["query"], c), positions, c.rope_theta)
    k, v = key_value(x, params["key_value"], c)
    k = rotate(k, positions, c.rope_theta)
    mask = causal
    if mixer == "window":  # W keys, including that of the query
        age = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])[None, :]
        mask = causal & (age <= c.window - 1)
    if "prefix" in params:  # rows are ordered stream by stream
        streams = c.program.streams
        rows = np.arange(x.shape[0]) // (x.shape[0] // streams)
        prefix_k, prefix_v = params["prefix"][0][rows], params["prefix"][1][rows]
        k, v = np.concatenate([prefix_k, k], 1), np.concatenate([prefix_v, v], 1)
        always = np.ones((*mask.shape[:2], c.prefix_length), bool)
        mask = np.concatenate([always, mask], -1)
    return np.einsum("bnqh,qhd->bnd", attend(q, k, v, mask), params["output"]["project"]["kernel"])


def cross_attention(x, params, c: ModelConfig, global_kv, positions, causal):
    q = query(x, params["query"], c)
    if c.cross_rope:
        q = rotate(q, positions, c.rope_theta)
    y = attend(q, *global_kv, causal)
    return np.einsum("bnqh,qhd->bnd", y, params["output"]["project"]["kernel"])


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def feed_forward(x, params, c: ModelConfig):
    """The result; and with experts also (load balance, router z, load [E])."""
    if not c.num_experts:
        return swiglu(x, *(params[name]["kernel"] for name in ("gate", "up", "down"))), None
    router = x @ params["router"]["kernel"]
    p = softmax(router)
    chosen = np.argsort(-p, axis=-1, kind="stable")[..., : c.experts_per_token]
    y, counts = np.zeros_like(x), np.zeros(c.num_experts)
    for where in np.ndindex(x.shape[:2]):
        total = p[where][chosen[where]].sum()
        for e in chosen[where]:
            kernels = (params[name][e] for name in ("gate", "up", "down"))
            y[where] += p[where][e] / total * swiglu(x[where], *kernels)
            counts[e] += 1
    if c.num_shared_experts:
        y += swiglu(x, *(params["shared"][name]["kernel"] for name in ("gate", "up", "down")))
    share = counts / counts.sum()
    balance = c.num_experts * (share * p.mean((0, 1))).sum()
    return y, (balance, (logsumexp(router) ** 2).mean(), c.num_experts * share)


def mix_streams(x, params, c: ModelConfig):
    """sum_p ((1 - eps) w_p + eps / P) x_p, w = softmax of one linear map of all x_p."""
    streams = np.stack(np.split(x, c.program.streams))
    w = softmax(np.einsum("pbnd,pdo->bno", streams, params["kernel"]))
    w = (1 - c.gate_floor) * w + c.gate_floor / c.program.streams
    return np.einsum("pbnd,bnp->bnd", streams, w)


def logits(params, c: ModelConfig, tokens, positions=None, segment_ids=None):
    """Logits [B, N, V], and the routing of every run of a layer (see `feed_forward`)."""
    program = c.program
    tokens = np.tile(tokens, (program.streams, 1))
    N = tokens.shape[1]
    positions = np.arange(N)[None] if positions is None else positions
    causal = np.tri(N, dtype=bool)[None]
    if segment_ids is not None:
        causal = causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
    causal = np.broadcast_to(causal, (len(tokens), N, N))
    x = np.sqrt(c.d_model) * params["embedding"][tokens]
    global_kv, routing = None, []
    for i, stage in enumerate(program.stages):
        if stage.mixer == "cross" and global_kv is None:  # written once
            h = norm(x, params["global_kv"]["norm"], c.norm_eps)
            k, v = key_value(h, params["global_kv"]["key_value"], c)
            global_kv = (rotate(k, positions, c.rope_theta) if c.cross_rope else k), v
        for _ in range(stage.num_loops):
            for layer in range(stage.layers):
                p = layer_of(params[f"stage_{i}_{stage.mixer}"]["layers"], layer)
                h = norm(x, p["attention_norm"], c.norm_eps)
                if stage.mixer == "cross":
                    x = x + cross_attention(h, p["attention"], c, global_kv, positions, causal)
                else:
                    x = x + self_attention(h, p["attention"], c, stage.mixer, positions, causal)
                y, routed = feed_forward(
                    norm(x, p["feed_forward_norm"], c.norm_eps), p["feed_forward"], c
                )
                x = x + y
                routing.append(routed)
    x = norm(x, params["final_norm"], c.norm_eps)
    if program.streams > 1:
        x = mix_streams(x, params["stream_gate"], c)
    head = params["embedding"].T if c.tie_embeddings else params["head"]
    return x @ head, routing if c.num_experts else None


def training_step(params, config: Config, batch: Batch) -> dict:
    """objective: what one update minimizes. The other entries are metrics: loss, z_loss and, with
    experts, load_balance, router_z, expert_load_max, expert_load_min.

    The cross-entropy and z are means over all targets of the batch. The losses of the routers are
    means over the runs of layers and over microbatches. A microbatch is every n-th row.
    """
    c, n = config.model, config.optimizer.accumulation_steps
    weights = np.ones(batch.targets.shape) if batch.loss_weights is None else batch.loss_weights
    nll = z = 0.0
    routing = []
    for first in range(n):
        rows = [None if x is None else x[first::n] for x in (batch.positions, batch.segment_ids)]
        y, routed = logits(params, c, batch.tokens[first::n], *rows)
        lse = logsumexp(y)
        picked = np.take_along_axis(y, batch.targets[first::n, :, None], -1)[..., 0]
        nll += ((lse - picked) * weights[first::n]).sum()
        z += (lse**2 * weights[first::n]).sum()
        routing.append(routed)
    nll, z = nll / weights.sum(), z / weights.sum()
    out = {"loss": nll, "z_loss": z, "objective": nll + config.optimizer.z_loss * z}
    if c.num_experts:
        balance, router_z, load = (
            np.mean([[one[i] for one in routed] for routed in routing], axis=0) for i in range(3)
        )
        out |= {"load_balance": balance.mean(), "router_z": router_z.mean()}
        out |= {"expert_load_max": load.max(), "expert_load_min": load.min()}
        out["objective"] += c.load_balance_weight * balance.mean()
        out["objective"] += c.router_z_weight * router_z.mean()
    return out
