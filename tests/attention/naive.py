"""Attention layers by their equations in float64: one query of one head at a time.

Legend: B sequences, S tokens, D hidden, P width of a head, Z rank of the latent, R rotated width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from consilium.config.attention import GQA, MLA
from consilium.ops.rope import rotate_naive

EPSILON = 1e-5

Weights = Mapping[str, Tensor]


def fill(module: nn.Module, seed: int) -> None:
    """Random weights at which nothing hides: norms are not 1, biases are not 0 and of both signs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(
                    0, 0.5 if name.endswith("bias") else weight.shape[1] ** -0.5, generator=generator
                )


def float64_weights(module: nn.Module) -> dict[str, Tensor]:
    """Leaves of their own, for gradients beside the module's."""
    return {name: weight.detach().double().requires_grad_() for name, weight in module.named_parameters()}


def naive_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def causal_sight(batch: int, tokens: int) -> Tensor:
    return torch.ones(batch, tokens, tokens, dtype=torch.bool).tril()


def naive_gqa(config: GQA, weights: Weights, x_BSD: Tensor, position_BS: Tensor, seen_BSS: Tensor) -> Tensor:
    """Grouped-query attention; head h reads key/value head floor(h / group)."""
    q_BSHP = _gqa_projection(config, weights, "q", x_BSD, position_BS)
    k_BSGP = _gqa_projection(config, weights, "k", x_BSD, position_BS)
    v_BSGP = _projected(weights, "v", x_BSD).unflatten(-1, (config.kv_heads, -1))
    serves = [head // (config.heads // config.kv_heads) for head in range(config.heads)]
    scale = config.scale if config.scale is not None else 1 / math.sqrt(config.head_dim)
    y = naive_heads(q_BSHP, k_BSGP[:, :, serves], v_BSGP[:, :, serves], seen_BSS, scale, config.softcap)
    return y @ weights["o.weight"].T


def naive_mla(config: MLA, weights: Weights, x_BSD: Tensor, position_BS: Tensor, seen_BSS: Tensor) -> Tensor:
    """Multi-head latent attention, 2405.04434 equations 37 to 47."""
    if config.q_rank is None:
        q = _projected(weights, "q", x_BSD)
    else:
        q = naive_norm(_projected(weights, "q_down", x_BSD), weights["q_norm.weight"])
        q = q @ weights["q_up.weight"].T
    q_BSHX = q.unflatten(-1, (config.heads, -1))
    turned_BSHR = rotate_naive(q_BSHX[..., config.nope_dim :], config.rope, position_BS)
    q_BSHX = torch.cat((q_BSHX[..., : config.nope_dim], turned_BSHR), -1)
    down = _projected(weights, "kv_down", x_BSD)
    latent_BSZ = down[..., : config.kv_rank]
    if config.kv_norm == "rms":
        latent_BSZ = naive_norm(latent_BSZ, weights["kv_norm.weight"])
    shared_BS1R = rotate_naive(down[..., None, config.kv_rank :], config.rope, position_BS)
    kv_BSHX = (latent_BSZ @ weights["kv_up.weight"].T).unflatten(-1, (config.heads, -1))
    keys = [
        torch.cat((kv_BSHX[:, :, h, : config.nope_dim], shared_BS1R[:, :, 0]), -1)
        for h in range(config.heads)
    ]
    k_BSHX, v_BSHV = torch.stack(keys, 2), kv_BSHX[..., config.nope_dim :]
    y = naive_heads(q_BSHX, k_BSHX, v_BSHV, seen_BSS, config.softmax_scale, None)
    return y @ weights["o.weight"].T


def naive_heads(
    q_BSHP: Tensor, k_BSHP: Tensor, v_BSHV: Tensor, seen_BSS: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention of every head, joined to [B, S, H * V]."""
    batch, tokens, heads, _ = q_BSHP.shape
    rows: list[Tensor] = []
    for b, s, h in ((b, s, h) for b in range(batch) for s in range(tokens) for h in range(heads)):
        visible = seen_BSS[b, s].nonzero()[:, 0]
        logits = k_BSHP[b, visible, h] @ q_BSHP[b, s, h] * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        exponentials = (logits - logits.detach().max()).exp() if len(visible) else logits
        rows.append((exponentials[:, None] * v_BSHV[b, visible, h]).sum(0) / max(exponentials.sum(), 1e-300))
    return torch.stack(rows).view(batch, tokens, -1)


def _projected(weights: Weights, name: str, x_BSD: Tensor) -> Tensor:
    y = x_BSD @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _gqa_projection(config: GQA, weights: Weights, name: str, x_BSD: Tensor, position_BS: Tensor) -> Tensor:
    y = _projected(weights, name, x_BSD)
    if config.qk_norm == "full":
        y = naive_norm(y, weights[f"{name}_norm.weight"])
    y = y.unflatten(-1, (-1, config.head_dim))
    if config.qk_norm == "head":
        y = naive_norm(y, weights[f"{name}_norm.weight"])
    return rotate_naive(y, config.rope, position_BS)
