"""Switch Transformer (2101.03961) as a decoder: one document, one query head, one token at a time.

As the recipe has it: decoder blocks alone, rotary positions, the head tied to the embedding.

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


def model(
    weights: Weights,
    hyper: Hyper,
    documents: Sequence[Document],
    *,
    jitter: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [T, V] of all documents, one after another, and every loss by name.

    ``jitter`` gives the factors [T, D] of the router's input, by layer.
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
            x_TD = x_TD + geglu(normed_TD, up, down)
            continue
        factor_TD = jitter[i] if jitter else torch.ones_like(x_TD)
        y_TD, balance = switch(below(layer, "moe."), hyper, normed_TD, normed_TD * factor_TD)
        x_TD = x_TD + y_TD
        balances.append(balance)
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["embed.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    prediction = cross_entropy(logits_TV, targets_T, ignore_index=-1)
    return logits_TV, {"prediction": prediction, "switch": torch.stack(balances).sum()}


def switch(part: Weights, hyper: Hyper, x_TD: Tensor, seen_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 1 to 6: y = p_i E_i(x) for i = argmax p; loss alpha * E * sum_i f_i P_i, f before any drop.

    ``seen_TD`` is what the router reads. With a capacity factor (equation 3) an expert takes its first
    ceil(factor * T / E) tokens; the residual alone carries the others.
    """
    experts, tokens = hyper["experts"], len(x_TD)
    capacity = math.ceil(hyper["capacity"] * tokens / experts) if hyper["capacity"] else tokens
    probabilities_TE = (seen_TD @ part["router.projection.weight"].T).softmax(1)
    y_TD = torch.zeros_like(x_TD)
    load = [0] * experts
    for t, probability_E in enumerate(probabilities_TE):
        expert = int(probability_E.argmax())
        load[expert] += 1
        if load[expert] <= capacity:
            output_D = geglu(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            y_TD[t] = probability_E[expert] * output_D
    mean_E = probabilities_TE.mean(0)
    total = sum(load[expert] / tokens * mean_E[expert] for expert in range(experts))
    return y_TD, hyper["switch_loss"] * experts * total


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


def geglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """GELU(gate) times value (2002.05202), GELU by the tanh approximation of the released code."""
    width = down.shape[1]
    gate = x @ up[:width].T
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * (x @ up[width:].T)) @ down.T


def norm(x_TD: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_TD / torch.sqrt((x_TD * x_TD).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
