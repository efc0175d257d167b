"""Nemotron-4 upcycled to experts (2410.07524): one document, head, token and expert at a time.

Nemotron-4 (2402.16819 section 2): squared ReLU without a gate, and half of each head carries no position.

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
    x_TD = weights["embed.weight"][torch.cat([ids for ids, _ in documents])]
    balances = []
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        x_TD = x_TD + torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        y_TD, balance = mixture(below(layer, "moe."), hyper, normed_TD)
        x_TD = x_TD + y_TD
        balances.append(balance)
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["head.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    prediction = cross_entropy(logits_TV, targets_T, ignore_index=-1)
    return logits_TV, {"prediction": prediction, "switch": torch.stack(balances).sum()}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Sum p_i FFN_i(x) over the k highest p, softmax before selection; E sum_i f_i P_i.

    The loss is Switch's (2101.03961 equations 4 to 6), all k choices counted, f summing to 1.
    """
    probabilities_TE = (x_TD @ part["router.projection.weight"].T).softmax(1)
    y_TD = torch.zeros_like(x_TD)
    load = [0] * hyper["experts"]
    for t, probability_E in enumerate(probabilities_TE):
        for expert in best(probability_E.tolist(), hyper["k"]):
            output_D = squared_relu(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            y_TD[t] += probability_E[expert] * output_D
            load[expert] += 1
    mean_E = probabilities_TE.mean(0)
    total = sum(count / sum(load) * mean_E[expert] for expert, count in enumerate(load))
    return y_TD, hyper["switch_loss"] * hyper["experts"] * total


def best(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def attention(part: Weights, hyper: Hyper, x_ND: Tensor) -> Tensor:
    size, group = hyper["head_dim"], hyper["heads"] // hyper["kv_heads"]
    outputs = []
    for head in range(hyper["heads"]):
        q_NH = rotate(head_of(part, "q", x_ND, head, size), hyper)
        k_NH = rotate(head_of(part, "k", x_ND, head // group, size), hyper)
        v_NH = head_of(part, "v", x_ND, head // group, size)
        outputs.append(causal_softmax(q_NH @ k_NH.T / math.sqrt(size)) @ v_NH)
    return torch.cat(outputs, 1) @ part["o.weight"].T


def head_of(part: Weights, name: str, x_ND: Tensor, head: int, size: int) -> Tensor:
    return x_ND @ part[f"{name}.weight"][head * size : (head + 1) * size].T


def rotate(x_NH: Tensor, hyper: Hyper) -> Tensor:
    """Turn the pair (i, i + R/2) of the first R = fraction * H values at position n by n * theta^(-2i/R)."""
    rotated = x_NH.clone()
    half = int(x_NH.shape[1] * hyper["fraction"]) // 2
    for i in range(half):
        angle_N = torch.arange(x_NH.shape[0], dtype=x_NH.dtype) * hyper["theta"] ** (-i / half)
        first_N, second_N = x_NH[:, i], x_NH[:, i + half]
        rotated[:, i] = first_N * angle_N.cos() - second_N * angle_N.sin()
        rotated[:, i + half] = first_N * angle_N.sin() + second_N * angle_N.cos()
    return rotated


def causal_softmax(scores_NN: Tensor) -> Tensor:
    future_NN = torch.ones_like(scores_NN, dtype=torch.bool).triu(1)
    return scores_NN.masked_fill(future_NN, -math.inf).softmax(1)


def squared_relu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x @ up.T).clamp(min=0).square() @ down.T


def norm(x_TD: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_TD / torch.sqrt((x_TD * x_TD).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
