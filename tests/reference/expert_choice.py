"""Expert choice (2202.09368) as a decoder: each expert takes its best tokens of the whole micro-batch.

Not causal: whether a token is taken depends on tokens after it and in other documents.

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
    """Return the logits [T, V] of all documents, one after another, and the loss by name."""
    lengths = [len(ids) for ids, _ in documents]
    x_TD = weights["embed.weight"][torch.cat([ids for ids, _ in documents])]
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        x_TD = x_TD + torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        if i % 2 == 0:
            up, down = layer["feed_forward.up.weight"], layer["feed_forward.down.weight"]
            x_TD = x_TD + geglu(normed_TD, up, down)
        else:
            x_TD = x_TD + mixture(below(layer, "moe."), hyper, normed_TD)
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["embed.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    return logits_TV, {"prediction": cross_entropy(logits_TV, targets_T, ignore_index=-1)}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor) -> Tensor:
    """S = softmax(X W_g); expert i takes its k = c T / E best tokens and weighs them by S_ti (section 3.2).

    k is rounded up; of equal scores the earlier token is taken. A token may have any number of experts.
    """
    score_TE = (x_TD @ part["router.projection.weight"].T).softmax(1)
    each = math.ceil(hyper["choice_factor"] * len(x_TD) / hyper["experts"])
    y_TD = torch.zeros_like(x_TD)
    for expert in range(hyper["experts"]):
        for t in best(score_TE[:, expert].tolist(), each):
            output_D = network(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            y_TD[t] += score_TE[t, expert] * output_D
    return y_TD


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


def network(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return gelu(x @ up.T) @ down.T


def geglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (x @ up.T).chunk(2, -1)
    return (gelu(gate) * value) @ down.T


def gelu(x: Tensor) -> Tensor:
    """By the tanh approximation (1606.08415 section 2)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x_TD: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_TD / torch.sqrt((x_TD * x_TD).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
