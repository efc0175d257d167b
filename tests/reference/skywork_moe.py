"""Skywork-MoE (2406.06563), as its equations say it: one document, head, token and expert at a time.

Each layer's loss coefficient is part of the weights, since training moves it with the layer's drop rate.

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
    return logits_TV, {"prediction": prediction, "adaptive": torch.stack(balances).sum()}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 3 and 4: y = (1/s) sum of g_j E_j(x) over the k best, s the sum of their g, dropped or not.

    The loss is coefficient * sum_j (1/n - mean_t g_tj)^2: it holds no counts.
    """
    gates_TE = torch.stack([standardised(z_E, hyper).softmax(0) for z_E in router_logits(part, x_TD)])
    chosen = [best(gate_E, hyper["k"]) for gate_E in gates_TE.tolist()]
    kept = admitted(chosen, gates_TE.tolist(), hyper) if hyper["capacity"] else chosen
    y_TD = torch.zeros_like(x_TD)
    for t, experts in enumerate(kept):
        total = gates_TE[t, chosen[t]].sum()
        for expert in experts:
            output_D = swiglu(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            y_TD[t] += gates_TE[t, expert] / total * output_D
    distance_E = 1 / hyper["experts"] - gates_TE.mean(0)
    return y_TD, part["balance.coefficient"] * (distance_E * distance_E).sum()


def router_logits(part: Weights, x_TD: Tensor) -> Tensor:
    return x_TD @ part["router.projection.weight"].T + part.get("router.projection.bias", 0)


def standardised(z_E: Tensor, hyper: Hyper) -> Tensor:
    """Equation 3 with the released code's unbiased variance; epsilon keeps equal logits finite."""
    centred_E = z_E - z_E.mean()
    variance = (centred_E * centred_E).sum() / (len(z_E) - 1)
    return hyper["standardise_scale"] * centred_E / torch.sqrt(variance + hyper["standardise_epsilon"])


def admitted(chosen: list[list[int]], gates_TE: list[list[float]], hyper: Hyper) -> list[list[int]]:
    """The first ceil(factor * T * k / E) copies of each expert, by position or by falling probability.

    By position all first choices come before all second ones.
    """
    limit = math.ceil(hyper["capacity"] * len(chosen) * hyper["k"] / hyper["experts"])
    copies = [(t, experts[rank]) for rank in range(hyper["k"]) for t, experts in enumerate(chosen)]
    if hyper["drop_by"] == "probability":
        copies.sort(key=lambda copy: -gates_TE[copy[0]][copy[1]])
    kept, load = [list[int]() for _ in chosen], [0] * hyper["experts"]
    for t, expert in copies:
        load[expert] += 1
        if load[expert] <= limit:
            kept[t].append(expert)
    return kept


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
