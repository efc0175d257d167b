"""Grok-1 (the released model.py): one document, head, token and expert at a time.

Embeddings and logits are scaled, every branch is normalised before and after, attention logits are capped.

Legend: N tokens of one document, T tokens of all, D hidden size, V vocabulary, H width of a head,
E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Weights = Mapping[str, Tensor]
Hyper = Mapping[str, Any]
Document = tuple[Tensor, Tensor]
"""Token ids, and for each what comes next: -1 where nothing is to be predicted."""


def model(weights: Weights, hyper: Hyper, documents: Sequence[Document]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [T, V] of all documents, one after another, and every loss by name."""
    lengths = [len(ids) for ids, _ in documents]
    x_TD = hyper["embedding_scale"] * weights["embed.weight"][torch.cat([ids for ids, _ in documents])]
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        y_TD = torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        x_TD = x_TD + norm(y_TD, layer["attention_post_norm.weight"], hyper)
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        y_TD = mixture(below(layer, "moe."), hyper, normed_TD)
        x_TD = x_TD + norm(y_TD, layer["feed_forward_post_norm.weight"], hyper)
    logits_TV = hyper["logit_scale"] * norm(x_TD, weights["norm.weight"], hyper) @ weights["embed.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    return logits_TV, {"prediction": cross_entropy(logits_TV, targets_T, ignore_index=-1)}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor) -> Tensor:
    """Sum p_i GeGLU_i(x) over the two highest p, the softmax over all experts as it is."""
    probabilities_TE = (x_TD @ part["router.projection.weight"].T).softmax(1)
    y_TD = torch.zeros_like(x_TD)
    for t, probability_E in enumerate(probabilities_TE):
        for expert in best(probability_E.tolist(), hyper["k"]):
            output_D = geglu(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            y_TD[t] += probability_E[expert] * output_D
    return y_TD


def best(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def attention(part: Weights, hyper: Hyper, x_ND: Tensor) -> Tensor:
    """Logits become cap * tanh(q k / sqrt(H) / cap) before the mask, so that the mask stays -inf."""
    size, group, cap = hyper["head_dim"], hyper["heads"] // hyper["kv_heads"], hyper["softcap"]
    outputs = []
    for head in range(hyper["heads"]):
        q_NH = rotate(head_of(part, "q", x_ND, head, size), hyper["theta"])
        k_NH = rotate(head_of(part, "k", x_ND, head // group, size), hyper["theta"])
        v_NH = head_of(part, "v", x_ND, head // group, size)
        capped_NN = cap * torch.tanh(q_NH @ k_NH.T / math.sqrt(size) / cap)
        outputs.append(causal_softmax(capped_NN) @ v_NH)
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


def geglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """GELU(gate) times value, GELU by the tanh approximation that is JAX's default."""
    gate, value = (x @ up.T).chunk(2, -1)
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * value) @ down.T


def norm(x_TD: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_TD / torch.sqrt((x_TD * x_TD).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
