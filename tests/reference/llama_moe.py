"""LLaMA-MoE (2406.16554) as its code has it: one document, head, token and expert at a time.

Gate and losses are Shazeer's (1701.06538). Load is, as printed there, the chance that an expert's noisy logit
passes the threshold; the released code compares the noise alone, and divides variances by E - 1 instead of E.

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


def model(
    weights: Weights,
    hyper: Hyper,
    documents: Sequence[Document],
    *,
    noise: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [T, V] of all documents, one after another, and every loss by name.

    ``noise`` gives draws [T, E] from a standard normal distribution by layer; without them logits are clean.
    """
    lengths = [len(ids) for ids, _ in documents]
    x_TD = weights["embed.weight"][torch.cat([ids for ids, _ in documents])]
    balances = []
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        x_TD = x_TD + torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        drawn_TE = noise[i] if noise else x_TD.new_zeros(len(x_TD), hyper["experts"])
        y_TD, importance, load = mixture(below(layer, "moe."), hyper, normed_TD, drawn_TE)
        x_TD = x_TD + y_TD
        balances.append(torch.stack([importance, load]))
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["head.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    prediction = cross_entropy(logits_TV, targets_T, ignore_index=-1)
    importance, load = torch.stack(balances).sum(0)
    return logits_TV, {"prediction": prediction, "importance": importance, "load": load}


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor, drawn_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum scale * Softmax(TopK(H))_i SwiGLU_i(x), H = tanh(x W1) W2 + draw * deviation (equations 3 and 4).

    Importance and load are coefficient * CV^2 (equations 6, 7 and 10, 11). Residual experts see every token.
    """
    hidden_TE = torch.tanh(x_TD @ part["router.projection.hidden.weight"].T)
    clean_TE = hidden_TE @ part["router.projection.output.weight"].T
    deviation_TE = torch.log1p(torch.exp(x_TD @ part["router.noise.weight"].T)) + hyper["noise_floor"]
    noisy_TE = clean_TE + drawn_TE * deviation_TE
    y_TD = torch.zeros_like(x_TD)
    if "shared.up.weight" in part:
        y_TD = swiglu(x_TD, part["shared.up.weight"], part["shared.down.weight"])
    importance, load = ([x_TD.new_zeros(())] * hyper["experts"] for _ in range(2))
    for t, noisy_E in enumerate(noisy_TE):
        chosen = best(noisy_E.tolist(), hyper["k"])
        for expert, weight in zip(chosen, hyper["scale"] * noisy_E[chosen].softmax(0), strict=True):
            y_TD[t] += weight * swiglu(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            importance[expert] = importance[expert] + weight
        for expert in range(hyper["experts"]):
            chance = chance_of(expert, clean_TE[t], noisy_E, deviation_TE[t], hyper["k"])
            load[expert] = load[expert] + chance
    return y_TD, hyper["importance_loss"] * variation(importance), hyper["load_loss"] * variation(load)


def chance_of(expert: int, clean_E: Tensor, noisy_E: Tensor, deviation_E: Tensor, k: int) -> Tensor:
    """Equations 8 and 9: Phi((clean_i - k-th highest noisy logit of the others) / deviation_i)."""
    if k == len(noisy_E):
        return torch.ones_like(deviation_E[expert])
    others = [i for i in range(len(noisy_E)) if i != expert]
    threshold = noisy_E[others[best(noisy_E[others].tolist(), k)[-1]]]
    return 0.5 * (1 + torch.erf((clean_E[expert] - threshold) / deviation_E[expert] / math.sqrt(2)))


def variation(values: Sequence[Tensor]) -> Tensor:
    """Squared coefficient of variation."""
    values_E = torch.stack(list(values))
    mean = values_E.mean()
    return (values_E - mean).square().mean() / mean.square()


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
