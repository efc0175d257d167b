"""Shazeer 2017 (1701.06538) as a decoder: noisy top-k gating, flat or in two levels, one token at a time.

The paper puts its layer between LSTMs; here it stands where a decoder has its feed-forward network.

Legend: N tokens of one document, T tokens of all, D hidden size, V vocabulary, H width of a head,
E experts, M members of a group of experts.
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

Decision = tuple[list[dict[int, Tensor]], Tensor]
"""The weight of each expert that a token uses, token by token, and the smooth load [E]."""


def model(
    weights: Weights, hyper: Hyper, documents: Sequence[Document], *, noise: Mapping[int, Weights]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [T, V] of all documents, one after another, and every loss by name.

    ``noise`` gives standard normal draws by layer for "projection" and "primary"; none in evaluation.
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
        y_TD, balance = mixture(below(layer, "moe."), hyper, normed_TD, noise.get(i, {}))
        x_TD = x_TD + y_TD
        balances.append(balance)
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["head.weight"].T
    prediction = cross_entropy(logits_TV, torch.cat([targets for _, targets in documents]), ignore_index=-1)
    importance, load = torch.stack(balances).sum(0)
    return logits_TV, {"prediction": prediction, "importance": importance, "load": load}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor, drawn: Weights) -> tuple[Tensor, Tensor]:
    """The sum of G(x)_i E_i(x) (equation 1); w CV^2 of importance and of load (equations 6, 7, 10 and 11)."""
    gates, load_E = (two_levels if "router.primary.weight" in part else flat)(part, hyper, x_TD, drawn)
    y_TD, importance = torch.zeros_like(x_TD), [x_TD.new_zeros(())] * hyper["experts"]
    for t, used in enumerate(gates):
        for expert, weight in used.items():
            y_TD[t] += weight * network(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            importance[expert] = importance[expert] + weight
    uneven = squared_variation(torch.stack(importance)), squared_variation(load_E)
    return y_TD, torch.stack([hyper["importance_loss"] * uneven[0], hyper["load_loss"] * uneven[1]])


def flat(part: Weights, hyper: Hyper, x_TD: Tensor, drawn: Weights) -> Decision:
    tokens = [kept(*z, k=hyper["k"]) for z in noisy(part, x_TD, drawn, "projection", "noise")]
    return [weights for weights, _ in tokens], torch.stack([chance_E for _, chance_E in tokens]).sum(0)


def two_levels(part: Weights, hyper: Hyper, x_TD: Tensor, drawn: Weights) -> Decision:
    """Appendix B: weights G_primary(x)_i G_i(x)_j and Load_H = Load_primary_i * Load_i(X_i)_j / |X_i|.

    X_i are the tokens of group i. Expert j of group i is number i * M + j.
    """
    primary = [kept(*z, k=hyper["keep_groups"]) for z in noisy(part, x_TD, drawn, "primary", "primary_noise")]
    secondary = noisy(part, x_TD, drawn, "projection", "noise")
    gates: list[dict[int, Tensor]] = [{} for _ in x_TD]
    loads = []
    for group, members in enumerate(torch.arange(hyper["experts"]).chunk(hyper["groups"])):
        sent = [t for t, (used, _) in enumerate(primary) if group in used]
        load_M = x_TD.new_zeros(len(members))
        for t in sent:
            weights, chance_M = kept(*(z[members] for z in secondary[t]), k=hyper["k"])
            gates[t] |= {int(members[j]): primary[t][0][group] * weight for j, weight in weights.items()}
            load_M = load_M + chance_M
        load_primary = torch.stack([chances[group] for _, chances in primary]).sum()
        loads.append(load_primary * load_M / max(len(sent), 1))
    return gates, torch.cat(loads)


def noisy(part: Weights, x_TD: Tensor, drawn: Weights, gate: str, noise: str) -> list[tuple[Tensor, ...]]:
    """For each token x W_g, H(x) of equation 4, and the deviation Softplus(x W_noise) of its noise."""
    clean_TE = x_TD @ part[f"router.{gate}.weight"].T
    deviation_TE = torch.log1p(torch.exp(x_TD @ part[f"router.{noise}.weight"].T))
    noisy_TE = clean_TE + drawn[gate] * deviation_TE if gate in drawn else clean_TE
    return list(zip(clean_TE, noisy_TE, deviation_TE, strict=True))


def kept(clean_E: Tensor, noisy_E: Tensor, deviation_E: Tensor, k: int) -> tuple[dict[int, Tensor], Tensor]:
    """Softmax(KeepTopK(H(x), k)) and P(x, i) (equations 3, 5, 8 and 9); P is 1 where all are kept."""
    chosen = noisy_E.sort(descending=True, stable=True).indices[:k].tolist()
    weights = dict(zip(chosen, noisy_E[chosen].softmax(0), strict=True))
    if k == len(noisy_E):
        return weights, torch.ones_like(noisy_E)
    chances = []
    for i in range(len(noisy_E)):
        threshold = noisy_E[[j for j in range(len(noisy_E)) if j != i]].topk(k).values[-1]
        chances.append(0.5 * (1 + torch.erf((clean_E[i] - threshold) / deviation_E[i] / math.sqrt(2))))
    return weights, torch.stack(chances)


def squared_variation(values_E: Tensor) -> Tensor:
    return values_E.var(correction=0) / values_E.mean() ** 2


def attention(part: Weights, hyper: Hyper, x_ND: Tensor) -> Tensor:
    size, outputs = hyper["head_dim"], []
    for first in range(0, hyper["heads"] * size, size):
        q_NH, k_NH, v_NH = (x_ND @ part[f"{name}.weight"][first : first + size].T for name in "qkv")
        scores_NN = rotate(q_NH, hyper["theta"]) @ rotate(k_NH, hyper["theta"]).T / math.sqrt(size)
        future_NN = torch.ones_like(scores_NN, dtype=torch.bool).triu(1)
        outputs.append(scores_NN.masked_fill(future_NN, -math.inf).softmax(1) @ v_NH)
    return torch.cat(outputs, 1) @ part["o.weight"].T


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


def network(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x @ up.T).clamp(min=0) @ down.T


def norm(x_TD: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_TD / torch.sqrt((x_TD * x_TD).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
