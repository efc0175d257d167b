"""DeepSeekMoE (2401.06066), as its equations say it: one document, head, token and expert at a time.

The first blocks are dense. The device-level loss is the 145B model's; the smaller ones train without it.

Legend: N tokens of one document, T tokens of all, D hidden size, V vocabulary, H width of a head,
E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

Weights = Mapping[str, Tensor]
Hyper = Mapping[str, Any]
Document = tuple[Tensor, Tensor]
"""Token ids, and for each what comes next: -1 where nothing is to be predicted."""


def model(weights: Weights, hyper: Hyper, documents: Sequence[Document]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [T, V] of all documents, one after another, and every loss by name."""
    lengths = [len(ids) for ids, _ in documents]
    x_TD = weights["embed.weight"][torch.cat([ids for ids, _ in documents])]
    losses: dict[str, Tensor] = {}
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        x_TD = x_TD + torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        if i < hyper["dense_first"]:
            y_TD = swiglu(normed_TD, layer["feed_forward.up.weight"], layer["feed_forward.down.weight"])
        else:
            y_TD, balance = mixture(below(layer, "moe."), hyper, normed_TD)
            losses = {name: losses.get(name, 0) + value for name, value in balance.items()}
        x_TD = x_TD + y_TD
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["head.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    return logits_TV, losses | {"prediction": cross_entropy(logits_TV, targets_T, ignore_index=-1)}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Equations 9 to 11: shared experts, and the k routed ones of highest s, each times s as it is."""
    affinity_TE = (x_TD @ part["router.projection.weight"].T).softmax(1)
    y_TD = swiglu(x_TD, part["shared.up.weight"], part["shared.down.weight"])
    chosen = [best(affinity_E, hyper["k"]) for affinity_E in affinity_TE.tolist()]
    for t, experts in enumerate(chosen):
        for expert in experts:
            output_D = swiglu(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            y_TD[t] += affinity_TE[t, expert] * output_D
    return y_TD, balance_losses(affinity_TE, chosen, hyper)


def balance_losses(affinity_TE: Tensor, chosen: list[list[int]], hyper: Hyper) -> dict[str, Tensor]:
    """Expert-level equations 12 to 14 and device-level equations 15 to 17, over all tokens together."""
    tokens, experts = affinity_TE.shape
    f = [experts / (hyper["k"] * tokens) * sum(i in mine for mine in chosen) for i in range(experts)]
    p = [affinity_TE[:, i].sum() / tokens for i in range(experts)]
    losses = {"switch": hyper["switch_loss"] * torch.stack([f[i] * p[i] for i in range(experts)]).sum()}
    if "device_loss" in hyper:
        size = experts // hyper["devices"]
        groups = [range(start, start + size) for start in range(0, experts, size)]
        each = [sum(f[i] for i in group) / size * sum(p[i] for i in group) for group in groups]
        losses["device"] = hyper["device_loss"] * torch.stack(each).sum()
    return losses


def best(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def attention(part: Weights, hyper: Hyper, x_ND: Tensor) -> Tensor:
    size, group = hyper["head_dim"], hyper["heads"] // hyper["kv_heads"]
    outputs = []
    for head in range(hyper["heads"]):
        q_NH = rotate(head_of(part, "q", x_ND, head, size), hyper["theta"])
        k_NH = rotate(head_of(part, "k", x_ND, head // group, size), hyper["theta"])
        v_NH = head_of(part, "v", x_ND, head // group, size)
        outputs.append(causal_softmax(q_NH @ k_NH.T / math.sqrt(size)) @ v_NH)
    return torch.cat(outputs, 1) @ part["o.weight"].T


def head_of(part: Weights, name: str, x_ND: Tensor, head: int, size: int) -> Tensor:
    return x_ND @ part[f"{name}.weight"][head * size : (head + 1) * size].T


def rotate(x_NH: Tensor, theta: float) -> Tensor:
    """Turn the pair (i, i + H/2) at position n by n * theta^(-2i/H)."""
    rotated = x_NH.clone()
    half = x_NH.shape[1] // 2
    for i in range(half):
        angle_N = torch.arange(x_NH.shape[0], dtype=x_NH.dtype) * theta ** (-i / half)
        first_N, second_N = x_NH[:, i], x_NH[:, i + half]
        rotated[:, i] = first_N * angle_N.cos() - second_N * angle_N.sin()
        rotated[:, i + half] = first_N * angle_N.sin() + second_N * angle_N.cos()
    return rotated


def causal_softmax(scores_NN: Tensor) -> Tensor:
    future_NN = torch.ones_like(scores_NN, dtype=torch.bool).triu(1)
    return scores_NN.masked_fill(future_NN, -math.inf).softmax(1)


def swiglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (x @ up.T).chunk(2, -1)
    return (silu(gate) * value) @ down.T


def norm(x_TD: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_TD / torch.sqrt((x_TD * x_TD).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
