"""OLMoE (2409.02060 section 2): one document, head, token and expert at a time.

The losses are E sum_i f_i P_i (equation 3) and the mean squared logsumexp of the logits (equation 4).

Legend: N tokens of one document, T tokens of all, D hidden size, V vocabulary, H width of a head,
Q width of all query heads, K of all key heads, E experts.
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
    balances = []
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        x_TD = x_TD + torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        y_TD, losses = mixture(below(layer, "moe."), hyper, normed_TD)
        x_TD = x_TD + y_TD
        balances.append(losses)
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["head.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    prediction = cross_entropy(logits_TV, targets_T, ignore_index=-1)
    sums = {name: torch.stack([losses[name] for losses in balances]).sum() for name in ("switch", "z")}
    return logits_TV, {"prediction": prediction, **sums}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum p_i SwiGLU_i(x) over the k highest p; E sum_i f_i P_i, and the mean square of log sum exp."""
    logits_TE = x_TD @ part["router.projection.weight"].T
    probabilities_TE = logits_TE.softmax(1)
    y_TD = torch.zeros_like(x_TD)
    load = [0] * hyper["experts"]
    for t, probability_E in enumerate(probabilities_TE):
        for expert in best(probability_E.tolist(), hyper["k"]):
            output_D = swiglu(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            y_TD[t] += probability_E[expert] * output_D
            load[expert] += 1
    mean_E = probabilities_TE.mean(0)
    product = sum(count / sum(load) * mean_E[expert] for expert, count in enumerate(load))
    squares_T = torch.stack([logits_E.exp().sum().log() ** 2 for logits_E in logits_TE])
    losses = {
        "switch": hyper["switch_loss"] * hyper["experts"] * product,
        "z": hyper["z_loss"] * squares_T.mean(),
    }
    return y_TD, losses


def best(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def attention(part: Weights, hyper: Hyper, x_ND: Tensor) -> Tensor:
    """Queries and keys are normalised over all heads together, then split and rotated."""
    size, group = hyper["head_dim"], hyper["heads"] // hyper["kv_heads"]
    q_NQ = norm(x_ND @ part["q.weight"].T, part["q_norm.weight"], hyper)
    k_NK = norm(x_ND @ part["k.weight"].T, part["k_norm.weight"], hyper)
    v_NK = x_ND @ part["v.weight"].T
    outputs = []
    for head in range(hyper["heads"]):
        q_NH = rotate(of_head(q_NQ, head, size), hyper["theta"])
        k_NH = rotate(of_head(k_NK, head // group, size), hyper["theta"])
        outputs.append(causal_softmax(q_NH @ k_NH.T / math.sqrt(size)) @ of_head(v_NK, head // group, size))
    return torch.cat(outputs, 1) @ part["o.weight"].T


def of_head(x_NX: Tensor, head: int, size: int) -> Tensor:
    return x_NX[:, head * size : (head + 1) * size]


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
