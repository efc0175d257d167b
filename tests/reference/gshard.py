"""GShard (2006.16668) as a decoder: Algorithm 1 in each local group, one token after another.

Legend: N tokens of one document, T tokens of all, S tokens of a group, D hidden size, V vocabulary,
H width of a head, E experts, C capacity.
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
    weights: Weights, hyper: Hyper, documents: Sequence[Document], *, drawn: Mapping[int, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [T, V] of all documents, one after another, and every loss by name.

    ``drawn`` gives uniform draws [T] by layer; none in evaluation, where every second expert is dispatched.
    """
    lengths = [len(ids) for ids, _ in documents]
    x_TD = weights["embed.weight"][torch.cat([ids for ids, _ in documents])]
    balances = []
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        x_TD = x_TD + torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        if i % 2 == 0:
            up, down = layer["feed_forward.up.weight"], layer["feed_forward.down.weight"]
            x_TD = x_TD + network(normed_TD, up, down)
            continue
        drawn_T = drawn.get(i, torch.zeros(len(x_TD)))
        y_TD, balance = mixture(below(layer, "moe."), hyper, normed_TD, drawn_T)
        x_TD = x_TD + y_TD
        balances.append(balance)
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["embed.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    prediction = cross_entropy(logits_TV, targets_T, ignore_index=-1)
    return logits_TV, {"prediction": prediction, "switch": torch.stack(balances).sum()}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor, drawn_T: Tensor) -> tuple[Tensor, Tensor]:
    """Dispatch in groups of S tokens, the last one shorter; coefficient * E^2 * l_aux of all tokens.

    The printed loss is l_aux of every group, 1 / E^2 at balance; with one group only the factor differs.
    """
    gates_TE = (x_TD @ part["router.projection.weight"].T).softmax(1)
    y_TD, size = torch.zeros_like(x_TD), hyper["group_tokens"] or len(x_TD)
    for first in range(0, len(x_TD), size):
        here = slice(first, first + size)
        for s, expert, weight in dispatch(gates_TE[here], drawn_T[here], hyper):
            t = first + s
            y_TD[t] += weight * network(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
    return y_TD, hyper["switch_loss"] * hyper["experts"] ** 2 * auxiliary_loss(gates_TE)


def dispatch(gates_SE: Tensor, drawn_S: Tensor, hyper: Hyper) -> list[tuple[int, int, Tensor]]:
    """Token, expert and weight of every copy that fits (Algorithm 1 without its line 13).

    A second choice counts towards the capacity even if the draw rejects it (line 22); in released code it
    does not, which ``released`` asks for.
    """
    size, experts = gates_SE.shape
    capacity = math.ceil(hyper["capacity"] * 2 * size / experts) if hyper["capacity"] else size
    load, copies = [0] * experts, []
    for s, gates_E in enumerate(gates_SE):
        first, second = best(gates_E.tolist(), 2)
        if load[first] < capacity:
            copies.append((s, first, gates_E[first] / (gates_E[first] + gates_E[second])))
        load[first] += 1
    for s, gates_E in enumerate(gates_SE):
        first, second = best(gates_E.tolist(), 2)
        weight = gates_E[second] / (gates_E[first] + gates_E[second])
        accepted = bool(2 * weight > drawn_S[s])
        if load[second] < capacity and accepted:
            copies.append((s, second, weight))
        load[second] += accepted or not hyper.get("released", False)
    return copies


def auxiliary_loss(gates_SE: Tensor) -> Tensor:
    """l_aux = (1 / E) * sum of c_e / S * m_e: the share of first choices, before drops, and the mean gate."""
    size, experts = gates_SE.shape
    first = [best(gates_E.tolist(), 1)[0] for gates_E in gates_SE]
    shares = [first.count(expert) / size * gates_SE[:, expert].mean() for expert in range(experts)]
    return torch.stack(shares).sum() / experts


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
    return (x @ up.T).clamp(min=0) @ down.T


def norm(x_TD: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_TD / torch.sqrt((x_TD * x_TD).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
