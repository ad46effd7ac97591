"""The model written a second time, plainly: one document, one loop, full masks, by the formulas.

Nothing of the package's forward is used: what both agree on is what the formulas say.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from golf_ray.config import ModelConfig


def norm(x: Tensor) -> Tensor:
    """rms norm over the last dimension."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)


def rotated(x: Tensor, config: ModelConfig) -> Tensor:
    """Rotary positions on [T, heads, d]."""
    half = config.rope_dims // 2
    out = x.clone()
    for t in range(half):
        angle = torch.arange(x.shape[0]) * config.rope_base ** (-2 * t / config.rope_dims)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., t], x[..., half + t]
        out[..., t] = a * cos + b * sin
        out[..., half + t] = b * cos - a * sin
    return out


def attention(n: Tensor, i: int, w: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """One layer's attention over one document."""
    L, H, G, d = config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim
    T = n.shape[0]
    q = (n @ w["qo_bank"][i].T).view(T, H, d)
    k = (n @ w["kv_bank"][i].T).view(T, G, d)
    v = (n @ w["kv_bank"][L + i].T).view(T, G, d)
    q = rotated(norm(q), config) * w[f"blocks.{i}.attn.q_gain"][:, None]
    k = rotated(norm(k), config)
    heads = []
    for h in range(H):
        g = h // (H // G)
        scores = q[:, h] @ k[:, g].T / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = scores.softmax(-1) @ v[:, g]
        if i >= L - config.xsa_last_n:
            own = v[:, g] / v[:, g].norm(dim=-1, keepdim=True)
            y = y - (y * own).sum(-1, keepdim=True) * own
        heads.append(y)
    return torch.cat(heads, -1) @ w["qo_bank"][L + i].T


def mlp(n: Tensor, i: int, w: dict[str, Tensor]) -> Tensor:
    """One layer's MLP."""
    z = n @ w["mlp_up_bank"][i].T
    return torch.where(z > 0, z, 0.5 * z).square() @ w["mlp_down_bank"][i].T


def logits(tokens: Tensor, w: dict[str, Tensor], config: ModelConfig, loop: bool) -> Tensor:
    """Softcapped logits of one document."""
    L = config.num_layers

    def order(looped: bool) -> tuple[list[int], list[int]]:
        if not looped or config.num_loops == 0:
            return list(range(L // 2)), list(range(L // 2, L))
        inner = list(range(config.loop_start, config.loop_end + 1)) * (config.num_loops + 1)
        whole = [*range(config.loop_start), *inner, *range(config.loop_end + 1, L)]
        return whole[: len(whole) // 2], whole[len(whole) // 2 :]

    encoder, decoder = order(loop)
    most = min(len(part) for part in order(True))
    x = norm(w["tok_emb.weight"][tokens])
    if config.embedding_dim != config.model_dim:
        x = x @ w["embed_proj.weight"].T
    x0, kept, lanes = x, [], None

    def scaled(x: Tensor, i: int) -> Tensor:
        return norm(x) * ((i + 1) ** -0.5 if config.ln_scale else 1.0)

    def mixed(x: Tensor, i: int) -> Tensor:
        return w[f"blocks.{i}.resid_mix"][0] * x + w[f"blocks.{i}.resid_mix"][1] * x0

    def block(x: Tensor, i: int) -> Tensor:
        u = mixed(x, i)
        y = u + w[f"blocks.{i}.attn_scale"] * attention(scaled(u, i), i, w, config)
        return y + w[f"blocks.{i}.mlp_scale"] * mlp(scaled(y, i), i, w)

    def skipped(x: Tensor, j: int) -> Tensor:
        skip = w["skip_weights"][j] * kept.pop()
        if not config.skip_gates:
            return x + skip
        g = torch.sigmoid(w["skip_gates"][j])
        return g * x + (1 - g) * skip

    for i in encoder:
        x = block(x, i)
        kept.append(x)
    for j, i in enumerate(decoder):
        if lanes is None and config.parallel_start_layer is not None:
            if i >= config.parallel_start_layer:
                lanes = [x, x]
        if j < most and kept:
            if lanes is None:
                x = skipped(x, j)
            else:
                lanes[0] = skipped(lanes[0], j)
        if lanes is None:
            x = block(x, i)
            continue
        a = w[f"blocks.{i}.attn_scale"] * attention(scaled(mixed(lanes[0], i), i), i, w, config)
        b = w[f"blocks.{i}.mlp_scale"] * mlp(scaled(lanes[1], i), i, w)
        r, p = w["parallel_resid_lambdas"][i], w["parallel_post_lambdas"][i]
        lanes = [r[k] * lanes[k] + p[0, k] * a + p[1, k] * b for k in (0, 1)]
    if lanes is not None:
        final = {"mean": sum(lanes) / 2, "attention": lanes[0], "mlp": lanes[1]}
        x = final[config.parallel_final_lane]
    x = norm(x)
    if config.embedding_dim != config.model_dim:
        x = x @ w["head_proj.weight"].T
    head = w["tok_emb.weight" if config.tie_embeddings else "lm_head.weight"]
    z = x @ head.T
    return config.logit_softcap * torch.tanh(z / config.logit_softcap)
