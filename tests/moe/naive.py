"""One token, one expert at a time, in float64: the same layer written from the papers with plain loops.

Shares no code with the package: it reads a configuration, a state dict and the hash table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.config.moe import Capacity, MoE
from consilium.config.router import Hash, Router, TwoLevel
from consilium.moe.types import Tokens
from moe import naive_levels

State = dict[str, Tensor]


@dataclass
class Naive:
    y: list[Tensor]
    logits: list[Tensor]
    scores: list[Tensor]
    chosen: list[dict[int, Tensor]]
    """For every token, expert -> weight, in the order of preference, before admission."""
    admitted: list[list[int]]


def run(
    config: MoE, state: State, table: Tensor | None, x: Tensor, tokens: Tokens, bias: Tensor | None
) -> Naive:
    logits = [_logits(config.router, state, row) for row in x]
    scores = [_scores(config.router.score.kind, z) for z in logits]
    values = [_values(config.router, z, s, bias) for z, s in zip(logits, scores, strict=True)]
    orders = _orders(config, values, scores, table, tokens)
    chosen = [_weights(config.router, z, s, o) for z, s, o in zip(logits, scores, orders, strict=True)]
    if isinstance(config.router.select, TwoLevel):
        levels = [naive_levels.weights(config.router, state, row) for row in x]
        chosen = [w if ok else {} for w, ok in zip(levels, tokens.valid_T.tolist(), strict=True)]
        orders = [list(w) for w in chosen]
    admitted = _admitted(config, scores, orders, tokens)
    y = [
        _routed(config, state, row, {e: chosen[t][e] for e in admitted[t]}) + _shared(config, state, row)
        for t, row in enumerate(x)
    ]
    return Naive(y, logits, scores, chosen, admitted)


def _routed(config: MoE, state: State, row: Tensor, used: dict[int, Tensor]) -> Tensor:
    inner = row if config.latent is None else state["latent.down.weight"] @ row
    out = torch.zeros_like(inner)
    for e, w in used.items():
        if config.router.weight_on == "input":
            out = out + _expert(config, state, e, w * inner)
        else:
            out = out + w * _expert(config, state, e, inner)
    return out if config.latent is None else state["latent.up.weight"] @ out


def _logits(config: Router, state: State, row: Tensor) -> Tensor:
    if config.projection.kind == "none":
        return torch.zeros(state["experts.up"].shape[0], dtype=row.dtype)
    if isinstance(config.select, TwoLevel):
        return naive_levels.joint_logits(config.select, state, row)
    if config.projection.kind == "mlp":
        hidden = torch.tanh(state["router.projection.hidden.weight"] @ row)
        z = state["router.projection.output.weight"] @ hidden
    else:
        z = state["router.projection.weight"] @ row
    for step in config.transforms:
        if step.kind == "softcap":
            z = step.cap * torch.tanh(z / step.cap)
        else:
            z = step.scale * (z - z.mean()) / (z.var(correction=1) + step.epsilon) ** 0.5
    return z


def _scores(kind: str, z: Tensor) -> Tensor:
    if kind == "softmax":
        exps = [torch.exp(v - z.max()) for v in z]
        return torch.stack([e / sum(exps) for e in exps])
    one = {
        "sigmoid": lambda v: 1 / (1 + torch.exp(-v)),
        "sqrt_softplus": lambda v: torch.log1p(torch.exp(v)) ** 0.5,
        "relu": lambda v: v.clamp(min=0),
    }[kind]
    return torch.stack([one(v) for v in z])


def _values(config: Router, z: Tensor, s: Tensor, bias: Tensor | None) -> list[float]:
    if config.offset == "scores":
        s = s + bias
    if config.offset == "logits":
        s = _scores(config.score.kind, z + bias)
    return s.tolist()


def _ranked(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda e: (-values[e], e))


def _orders(
    config: MoE, values: list[list[float]], scores: list[Tensor], table: Tensor | None, tokens: Tokens
) -> list[list[int]]:
    select = config.router.select
    valid = tokens.valid_T.tolist()
    if select.kind == "expert_choice":
        each = math.ceil(select.factor * sum(valid) / config.experts)
        taken: list[set[int]] = [set() for _ in values]
        for e in range(config.experts):
            queue = sorted((t for t in range(len(values)) if valid[t]), key=lambda t: (-values[t][e], t))
            for t in queue[:each]:
                taken[t].add(e)
        return [[e for e in _ranked(v) if e in taken[t]] for t, v in enumerate(values)]
    orders = []
    for t, v in enumerate(values):
        if not valid[t]:
            orders.append([])
        elif isinstance(select, Hash):
            assert table is not None
            orders.append(table[tokens.ids_T[t]].tolist())
        elif isinstance(select, TwoLevel):
            orders.append([])
        else:
            orders.append(_order(select, v, scores[t].tolist()))
    return orders


def _order(select: object, values: list[float], scores: list[float]) -> list[int]:
    match select.kind:
        case "top_k":
            open_ = range(len(values)) if select.groups is None else _open(select.groups, values)
            return [e for e in _ranked(values) if e in open_][: select.k]
        case "sampled_second":
            return _ranked(values)[:2]
        case "threshold":
            return [e for e in _ranked(values) if values[e] > select.minimum][: select.most]
        case "top_p":
            order, total = [], 0.0
            for e in _ranked(values)[: select.most]:
                if total >= select.p:
                    break
                order.append(e)
                total += scores[e]
            return order
    raise AssertionError(select)


def _open(groups: object, values: list[float]) -> set[int]:
    size = len(values) // groups.count
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups.count)]
    top = 1 if groups.score == "max" else 2
    totals = [sum(sorted((values[e] for e in m), reverse=True)[:top]) for m in members]
    return {e for g in _ranked(totals)[: groups.keep] for e in members[g]}


def _weights(config: Router, z: Tensor, s: Tensor, order: list[int]) -> dict[int, Tensor]:
    if not order:
        return {}
    rule = config.weight
    match rule.kind:
        case "raw":
            raw = {e: s[e] for e in order}
        case "normalised":
            total = sum(s[e] for e in order)
            raw = {e: s[e] / (total + rule.epsilon) for e in order}
        case "clamped_sum":
            total = sum(s[e] for e in order)
            raw = {e: s[e] / (max(total, rule.minimum)) for e in order}
        case "softmax_of_selected":
            total = sum(torch.exp(z[e]) for e in order)
            raw = {e: torch.exp(z[e]) / total for e in order}
        case "uniform":
            raw = {e: torch.ones((), dtype=s.dtype) for e in order}
    return {e: w * config.scale for e, w in raw.items()}


def _admitted(config: MoE, scores: list[Tensor], orders: list[list[int]], tokens: Tokens) -> list[list[int]]:
    if not isinstance(config.admission, Capacity):
        return orders
    valid = [t for t, ok in enumerate(tokens.valid_T.tolist()) if ok]
    size = config.admission.group_tokens or len(valid)
    parts = [valid[start : start + size] for start in range(0, len(valid), size)]
    admitted: list[list[int]] = [[] for _ in orders]
    for part in parts:
        for t, row in zip(
            part, _within(config, [scores[t] for t in part], [orders[t] for t in part]), strict=True
        ):
            admitted[t] = row
    return admitted


def _within(config: MoE, scores: list[Tensor], orders: list[list[int]]) -> list[list[int]]:
    """One local group of tokens."""
    assert isinstance(config.admission, Capacity)
    limit = math.ceil(config.admission.factor * len(orders) * config.most_active / config.experts - 1e-9)
    copies = [(rank, t, e) for t, order in enumerate(orders) for rank, e in enumerate(order)]
    copies.sort()
    if config.admission.by == "probability":
        copies.sort(key=lambda c: -scores[c[1]][c[2]].item())
    load = [0] * config.experts
    kept: set[tuple[int, int]] = set()
    for _, t, e in copies:
        if load[e] < limit:
            load[e] += 1
            kept.add((t, e))
    return [[e for e in order if (t, e) in kept] for t, order in enumerate(orders)]


def _activate(kind: str, h: Tensor) -> Tensor:
    half = len(h) // 2
    gelu = torch.nn.GELU(approximate="tanh")
    match kind:
        case "swiglu":
            return h[:half] / (1 + torch.exp(-h[:half])) * h[half:]
        case "geglu":
            return gelu(h[:half]) * h[half:]
        case "gelu":
            return gelu(h)
        case "relu":
            return h.clamp(min=0)
    return h.clamp(min=0) ** 2


def _expert(config: MoE, state: State, e: int, row: Tensor) -> Tensor:
    return state["experts.down"][e] @ _activate(config.activation, state["experts.up"][e] @ row)


def _shared(config: MoE, state: State, row: Tensor) -> Tensor:
    if config.shared.kind == "none":
        return torch.zeros_like(row)
    y = state["shared.down.weight"] @ _activate(config.activation, state["shared.up.weight"] @ row)
    if config.shared.kind == "sigmoid_gated":
        y = y / (1 + torch.exp(-(state["shared.gate.weight"][0] @ row)))
    return y
