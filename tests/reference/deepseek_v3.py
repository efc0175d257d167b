"""DeepSeek-V3 (2412.19437), as its equations say it: one document, one head, one token, one expert at a time.

Legend: N tokens of a document, T of all, D hidden, V vocabulary, H head, R rotated, L latent, E experts.
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
Rows = Sequence[Sequence[Document]]


def model(weights: Weights, hyper: Hyper, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits [T, V] of all documents, row by row, and every loss by name.

    A token sees its own document; the balance loss is that of a row, which holds one sequence.
    """
    found = [run(weights, hyper, row) for row in rows]
    depth, further = hyper["mtp_depth"], []
    for k in range(depth + 1):
        logits_TV = torch.cat([logits[k] for logits, _ in found if k < len(logits)])
        targets_T = torch.cat([targets[k:] for row in rows for _, targets in row])
        further.append(cross_entropy(logits_TV, targets_T, ignore_index=-1, reduction="sum"))
    # Equation 24 divides every module's loss by the main model's number of targets.
    count = sum((targets >= 0).sum() for row in rows for _, targets in row)
    layers = range(max(len(balance) for _, balance in found))
    means = [torch.stack([balance[i] for _, balance in found if i < len(balance)]).mean() for i in layers]
    return torch.cat([logits[0] for logits, _ in found]), {
        "prediction": further[0] / count,
        "mtp": hyper["mtp_loss"] * sum(further[1:]) / count / max(depth, 1),
        "sequence": torch.stack(means).sum(),
    }


def run(weights: Weights, hyper: Hyper, row: Sequence[Document]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of the model and of each MTP module, and the balance loss of each MoE layer."""
    lengths, balance = [len(ids) for ids, _ in row], []
    x_TD = emb_TD = weights["embed.weight"][torch.cat([ids for ids, _ in row])]
    for i in range(hyper["layers"]):
        x_TD = block(below(weights, f"layers.{i}."), hyper, x_TD, lengths, balance)
    x_TD = norm(x_TD, weights["norm.weight"], hyper)
    logits = [x_TD @ weights["head.weight"].T]
    for k in range(hyper["mtp_depth"]):
        # Equations 21 to 23; the released projection takes [embedding; hidden], hidden as the head reads it.
        part = below(weights, f"mtp.{k}.")
        emb_TD = torch.cat([e_ND[1:] for e_ND in emb_TD.split(lengths)])
        x_TD = torch.cat([x_ND[:-1] for x_ND in x_TD.split(lengths)])
        lengths = [length - 1 for length in lengths if length > 1]
        if not lengths:
            break
        x_TD = norm(x_TD, part["hidden_norm.weight"], hyper)
        x_TD = torch.cat((norm(emb_TD, part["embed_norm.weight"], hyper), x_TD), 1) @ part["project.weight"].T
        x_TD = norm(block(below(part, "block."), hyper, x_TD, lengths, balance), part["norm.weight"], hyper)
        logits.append(x_TD @ weights["head.weight"].T)
    return logits, balance


def block(part: Weights, hyper: Hyper, x_TD: Tensor, lengths: Sequence[int], balance: list[Tensor]) -> Tensor:
    normed = norm(x_TD, part["attention_norm.weight"], hyper).split(lengths)
    x_TD = x_TD + torch.cat([attention(below(part, "attention."), hyper, x_ND) for x_ND in normed])
    normed_TD = norm(x_TD, part["feed_forward_norm.weight"], hyper)
    if "feed_forward.up.weight" in part:
        return x_TD + swiglu(normed_TD, part["feed_forward.up.weight"], part["feed_forward.down.weight"])
    y_TD, loss = mixture(below(part, "moe."), hyper, normed_TD)
    balance.append(loss)
    return x_TD + y_TD


def mixture(part: Weights, hyper: Hyper, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 12 to 16 with the released factor on the routed experts; the loss of equations 17 to 20."""
    scores_TE = (x_TD @ part["router.projection.weight"].T).sigmoid()
    biases_E = part["balance.bias_E"].tolist()
    y_TD = swiglu(x_TD, part["shared.up.weight"], part["shared.down.weight"])
    f_E = torch.zeros_like(scores_TE[0])
    for t, scores_E in enumerate(scores_TE):
        plain = scores_E.tolist()
        chosen = node_limited([s + b for s, b in zip(plain, biases_E, strict=True)], hyper)
        counted = chosen if hyper["counts"] == "routed" else best(plain, range(len(plain)), hyper["k"])
        for expert in counted:
            f_E[expert] += len(f_E) / (hyper["k"] * len(x_TD))
        for expert in chosen:
            weight = hyper["scale"] * scores_E[expert] / scores_E[chosen].sum()
            y_TD[t] += weight * swiglu(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
    p_E = (scores_TE / scores_TE.sum(1, keepdim=True)).mean(0)
    return y_TD, hyper["sequence_loss"] * (f_E * p_E).sum()


def node_limited(biased_E: list[float], hyper: Hyper) -> list[int]:
    """The k best within the nodes whose two highest scores have the largest sums; scores carry the bias."""
    size = len(biased_E) // hyper["groups"]
    sums = [sum(sorted(biased_E[g * size : (g + 1) * size])[-2:]) for g in range(hyper["groups"])]
    nodes = best(sums, range(hyper["groups"]), hyper["keep_groups"])
    return best(biased_E, [e for e in range(len(biased_E)) if e // size in nodes], hyper["k"])


def best(values: Sequence[float], among: Sequence[int], k: int) -> list[int]:
    return sorted(among, key=lambda i: -values[i])[:k]


def attention(part: Weights, hyper: Hyper, x_ND: Tensor) -> Tensor:
    """Equations 1 to 11; the released code normalises both latents."""
    nope, rope, value, latent = (hyper[name] for name in ("nope_dim", "rope_dim", "v_dim", "kv_rank"))
    down, q_up, kv_up = (part[f"{name}.weight"] for name in ("kv_down", "q_up", "kv_up"))
    q_NL = norm(x_ND @ part["q_down.weight"].T, part["q_norm.weight"], hyper)
    c_NL, k_rope_NR = norm(x_ND @ down[:latent].T, part["kv_norm.weight"], hyper), x_ND @ down[latent:].T
    scale = (0.1 * hyper["mscale"] * math.log(hyper["factor"]) + 1) ** 2 / math.sqrt(nope + rope)
    outputs = []
    for q, kv in zip(q_up.split(nope + rope), kv_up.split(nope + value), strict=True):
        q_NH, k_nope_NH, v_NH = q_NL @ q.T, c_NL @ kv[:nope].T, c_NL @ kv[nope:].T
        scores_NN = q_NH[:, :nope] @ k_nope_NH.T + rotate(q_NH[:, nope:], hyper) @ rotate(k_rope_NR, hyper).T
        future_NN = torch.ones_like(scores_NN, dtype=torch.bool).triu(1)
        outputs.append((scores_NN * scale).masked_fill(future_NN, -math.inf).softmax(1) @ v_NH)
    return torch.cat(outputs, 1) @ part["o.weight"].T


def rotate(x_NR: Tensor, hyper: Hyper) -> Tensor:
    """Turn the pair (2i, 2i+1), a complex number, at position n by n * YaRN's frequency i (2309.00071)."""
    dim, theta, length = hyper["rope_dim"], hyper["theta"], hyper["original_length"]
    turns = hyper["beta_fast"], hyper["beta_slow"]
    low, high = (dim * math.log(length / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    index_R = torch.arange(dim // 2, dtype=x_NR.dtype)
    slowed_R = ((index_R - low) / (high - low)).clamp(0, 1)
    frequency_R = theta ** (-2 * index_R / dim) * (slowed_R / hyper["factor"] + 1 - slowed_R)
    angle_NR = torch.arange(len(x_NR), dtype=x_NR.dtype)[:, None] * frequency_R
    turned_NR = torch.view_as_complex(x_NR.reshape(len(x_NR), -1, 2)) * torch.exp(1j * angle_NR)
    return torch.view_as_real(turned_NR).flatten(1)


def swiglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (x @ up.T).chunk(2, -1)
    return (silu(gate) * value) @ down.T


def norm(x_ND: Tensor, weight_D: Tensor, hyper: Hyper) -> Tensor:
    return weight_D * x_ND / torch.sqrt((x_ND * x_ND).mean(1, keepdim=True) + hyper["norm_epsilon"])


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
