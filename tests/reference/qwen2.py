"""Qwen2 (2407.10671 section 2.2.1): Llama's decoder with biases on queries, keys and values alone.

One document, one query head at a time. The small sizes read the logits off the embedding (``tied``).

Legend: N tokens of one document, T tokens of all of them, D hidden size, V vocabulary, H width of a head.
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
    logits_TV = torch.cat([document_logits(weights, hyper, ids) for ids, _ in documents])
    targets_T = torch.cat([targets for _, targets in documents])
    return logits_TV, {"prediction": cross_entropy(logits_TV, targets_T, ignore_index=-1)}


def document_logits(weights: Weights, hyper: Hyper, ids_N: Tensor) -> Tensor:
    x_ND = weights["embed.weight"][ids_N]
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        x_ND = x_ND + attention(
            below(layer, "attention."), hyper, norm(x_ND, layer["attention_norm.weight"], hyper)
        )
        normed_ND = norm(x_ND, layer["feed_forward_norm.weight"], hyper)
        x_ND = x_ND + swiglu(normed_ND, layer["feed_forward.up.weight"], layer["feed_forward.down.weight"])
    head = weights["embed.weight"] if hyper["tied"] else weights["head.weight"]
    return norm(x_ND, weights["norm.weight"], hyper) @ head.T


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
    rows = slice(head * size, (head + 1) * size)
    return x_ND @ part[f"{name}.weight"][rows].T + part[f"{name}.bias"][rows]


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


def norm(x_ND: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_ND / torch.sqrt((x_ND * x_ND).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
