"""Hash layers (2106.04426) as a decoder: a fixed table sends each token id to its experts, without a gate.

Legend: N tokens of one document, T tokens of all, D hidden size, V vocabulary, H width of a head,
E experts, K experts of a token.
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


def model(
    weights: Weights, hyper: Hyper, documents: Sequence[Document], *, tables: Mapping[int, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [T, V] of all documents, one after another, and the loss by name.

    ``tables`` gives the experts [V, K] of every token id, by layer.
    """
    lengths = [len(ids) for ids, _ in documents]
    ids_T = torch.cat([ids for ids, _ in documents])
    x_TD = weights["embed.weight"][ids_T]
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        x_TD = x_TD + torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        x_TD = x_TD + hashed(below(layer, "moe.experts."), normed_TD, ids_T, tables[i])
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["head.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    return logits_TV, {"prediction": cross_entropy(logits_TV, targets_T, ignore_index=-1)}


def hashed(experts: Weights, x_TD: Tensor, ids_T: Tensor, table_VK: Tensor) -> Tensor:
    """FFN_hash(id)(x), section 3: the token id alone chooses, and nothing weighs."""
    y_TD = torch.zeros_like(x_TD)
    for t, number in enumerate(ids_T.tolist()):
        for expert in table_VK[number].tolist():
            y_TD[t] += swiglu(x_TD[t], experts["up"][expert], experts["down"][expert])
    return y_TD


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
