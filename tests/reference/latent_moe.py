"""LatentMoE (2601.18089) behind the router of Nemotron 3 (2512.20856).

One document, head, token and expert at a time. Router and loss are DeepSeek-V3's without groups (2412.19437
equations 13 to 20).

Legend: N tokens of one document, T tokens of all, D hidden size, V vocabulary, H width of a head,
E experts, L latent size.
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


def model(
    weights: Weights, hyper: Hyper, rows: Sequence[Sequence[Document]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [T, V] of all documents, one after another, and every loss by name.

    The balance loss is that of a row, averaged over rows.
    """
    documents = [document for row in rows for document in row]
    sizes = [sum(len(ids) for ids, _ in row) for row in rows]
    lengths = [len(ids) for ids, _ in documents]
    x_TD = weights["embed.weight"][torch.cat([ids for ids, _ in documents])]
    balances = []
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        x_TD = x_TD + torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        y_TD, balance = mixture(below(layer, "moe."), hyper, normed_TD, sizes)
        x_TD = x_TD + y_TD
        balances.append(balance)
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["head.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    prediction = cross_entropy(logits_TV, targets_T, ignore_index=-1)
    return logits_TV, {"prediction": prediction, "sequence": torch.stack(balances).sum()}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """W_up sum of g_i FFN_i(W_down x), plus FFN_shared(x): only routed experts live in the latent space.

    The k experts of highest s + b are used, s = sigmoid(x W); g = scale * s / (sum of the chosen s).
    """
    scores_TE = torch.sigmoid(x_TD @ part["router.projection.weight"].T)
    chosen = [best(biased_E, hyper["k"]) for biased_E in (scores_TE + part["balance.bias_E"]).tolist()]
    y_TD = squared_relu(x_TD, part["shared.up.weight"], part["shared.down.weight"])
    for t, experts in enumerate(chosen):
        latent_L = part["latent.down.weight"] @ x_TD[t]
        total_L = torch.zeros_like(latent_L)
        for expert in experts:
            weight = hyper["scale"] * scores_TE[t, expert] / scores_TE[t, experts].sum()
            total_L += weight * squared_relu(
                latent_L, part["experts.up"][expert], part["experts.down"][expert]
            )
        y_TD[t] += part["latent.up.weight"] @ total_L
    start, losses = 0, []
    for size in sizes:
        place = slice(start, start + size)
        losses.append(sequence_loss(scores_TE[place], chosen[place], hyper))
        start += size
    return y_TD, torch.stack(losses).mean()


def sequence_loss(scores_TE: Tensor, chosen: list[list[int]], hyper: Hyper) -> Tensor:
    """Equations 17 to 20 of DeepSeek-V3 in one row, f counting the experts that were used."""
    tokens, experts = scores_TE.shape
    p_E = (scores_TE / scores_TE.sum(1, keepdim=True)).mean(0)
    f = [experts / (hyper["k"] * tokens) * sum(i in mine for mine in chosen) for i in range(experts)]
    return hyper["sequence_loss"] * sum(f[i] * p_E[i] for i in range(experts))


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


def squared_relu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x @ up.T).clamp(min=0).square() @ down.T


def norm(x_TD: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_TD / torch.sqrt((x_TD * x_TD).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
