"""DeepSeek-V2 (2405.04434), as its equations say it: one document, one head, one token, one expert at a time.

Legend: N tokens of one document, T tokens of all, D hidden size, V vocabulary, H width of a head,
R rotated width, L width of the latent, E routed experts, G devices.
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

    A token sees its own document; balance losses are those of a row, which holds one sequence.
    """
    documents = [document for row in rows for document in row]
    sizes = [sum(len(ids) for ids, _ in row) for row in rows]
    lengths = [len(ids) for ids, _ in documents]
    x_TD = weights["embed.weight"][torch.cat([ids for ids, _ in documents])]
    losses: dict[str, Tensor] = {}
    for i in range(hyper["layers"]):
        layer = below(weights, f"layers.{i}.")
        normed = norm(x_TD, layer["attention_norm.weight"], hyper).split(lengths)
        x_TD = x_TD + torch.cat([attention(below(layer, "attention."), hyper, x_ND) for x_ND in normed])
        normed_TD = norm(x_TD, layer["feed_forward_norm.weight"], hyper)
        if i < hyper["dense_first"]:
            y_TD = swiglu(normed_TD, layer["feed_forward.up.weight"], layer["feed_forward.down.weight"])
        else:
            y_TD, balance = mixture(below(layer, "moe."), hyper, normed_TD, sizes)
            losses = {name: losses.get(name, 0) + value for name, value in balance.items()}
        x_TD = x_TD + y_TD
    logits_TV = norm(x_TD, weights["norm.weight"], hyper) @ weights["head.weight"].T
    targets_T = torch.cat([targets for _, targets in documents])
    return logits_TV, losses | {"prediction": cross_entropy(logits_TV, targets_T, ignore_index=-1)}


def mixture(
    part: Weights, hyper: Hyper, x_TD: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equations 20 to 22 with the released factor on the routed experts, and the rows' mean losses."""
    scores_TE = (x_TD @ part["router.projection.weight"].T).softmax(1)
    chosen = [device_limited(scores_E, hyper) for scores_E in scores_TE.tolist()]
    kept = admitted(chosen, scores_TE.tolist(), hyper) if hyper["drops"] else chosen
    y_TD = swiglu(x_TD, part["shared.up.weight"], part["shared.down.weight"])
    for t, experts in enumerate(kept):
        for expert in experts:
            output_D = swiglu(x_TD[t], part["experts.up"][expert], part["experts.down"][expert])
            y_TD[t] += hyper["scale"] * scores_TE[t, expert] * output_D
    start, found = 0, []
    for size in sizes:
        found.append(balance_losses(scores_TE[start : start + size], chosen[start : start + size], hyper))
        start += size
    return y_TD, {name: torch.stack([each[name] for each in found]).mean() for name in found[0]}


def device_limited(scores_E: list[float], hyper: Hyper) -> list[int]:
    """Section 2.2.2: the k best experts within the M devices that hold the experts of highest affinity."""
    size = len(scores_E) // hyper["devices"]
    maximum = [max(scores_E[g * size : (g + 1) * size]) for g in range(hyper["devices"])]
    devices = sorted(range(hyper["devices"]), key=lambda g: -maximum[g])[: hyper["most_devices"]]
    allowed = [expert for expert in range(len(scores_E)) if expert // size in devices]
    return sorted(allowed, key=lambda expert: -scores_E[expert])[: hyper["k"]]


def admitted(chosen: list[list[int]], scores_TE: list[list[float]], hyper: Hyper) -> list[list[int]]:
    """Section 2.2.4 at capacity factor 1: a device over the average drops its copies of lowest affinity."""
    size = hyper["experts"] // hyper["devices"]
    # Of equal affinities, which the paper leaves open, first choices and then earlier tokens stay.
    pairs = [(scores_TE[t][row[i]], t, row[i]) for i in range(hyper["k"]) for t, row in enumerate(chosen)]
    kept = [list[int]() for _ in chosen]
    for device in range(hyper["devices"]):
        here = sorted((pair for pair in pairs if pair[2] // size == device), key=lambda pair: -pair[0])
        for _, t, expert in here[: math.ceil(len(pairs) / hyper["devices"])]:
            kept[t].append(expert)
    return kept


def balance_losses(scores_TE: Tensor, chosen: list[list[int]], hyper: Hyper) -> dict[str, Tensor]:
    """Equations 23 to 31 in one row."""
    tokens, experts, devices = len(chosen), hyper["experts"], hyper["devices"]
    size = experts // devices
    count = [sum(expert in mine for mine in chosen) for expert in range(experts)]
    f_E = scores_TE.new_tensor(count) * experts / (hyper["k"] * tokens)
    sent = [sum(any(expert // size == g for expert in mine) for mine in chosen) for g in range(devices)]
    sent_G = scores_TE.new_tensor(sent) * devices / (hyper["most_devices"] * tokens)
    p_E = scores_TE.mean(0)
    f_G, p_G = f_E.reshape(devices, size).mean(1), p_E.reshape(devices, size).sum(1)
    return {
        "sequence": hyper["sequence_loss"] * (f_E * p_E).sum(),
        "device": hyper["device_loss"] * (f_G * p_G).sum(),
        "communication": hyper["communication_loss"] * (sent_G * p_G).sum(),
    }


def attention(part: Weights, hyper: Hyper, x_ND: Tensor) -> Tensor:
    """Equations 37 to 47 of appendix C; the released code normalises both latents."""
    nope, rope, value, latent = (hyper[name] for name in ("nope_dim", "rope_dim", "v_dim", "kv_rank"))
    down = part["kv_down.weight"]
    c_NL, k_rope_NR = norm(x_ND @ down[:latent].T, part["kv_norm.weight"], hyper), x_ND @ down[latent:].T
    if "q_down.weight" in part:
        x_ND = norm(x_ND @ part["q_down.weight"].T, part["q_norm.weight"], hyper)
    query = part["q_up.weight"] if "q_down.weight" in part else part["q.weight"]
    scale = (0.1 * hyper["mscale"] * math.log(hyper["factor"]) + 1) ** 2 / math.sqrt(nope + rope)
    outputs = []
    for q, kv in zip(query.split(nope + rope), part["kv_up.weight"].split(nope + value), strict=True):
        q_NH, k_nope_NH, v_NH = x_ND @ q.T, c_NL @ kv[:nope].T, c_NL @ kv[nope:].T
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
