"""Routers and balance losses over plain lists of Python numbers, one expert at a time, from the papers.

Reads a configuration as plain data and shares nothing with the package. Ties go to the lower expert.
"""

from __future__ import annotations

import math
from typing import Any

from conformance.naive_losses import losses

Row = list[float]
Data = dict[str, Any]


def expected(moe: Data, case: Data) -> Data:
    """What a case must give: experts used, weights, which are admitted in training, loads and losses."""
    count, router = len(case["x_TD"]), moe["router"]
    valid = case.get("valid_T") or [True] * count
    clean = [logits(router, case, moe["experts"], x) for x in case["x_TD"]]
    z = [transformed(router["transforms"], row) for row in clean]
    s = [scores(router["score"]["kind"], row) for row in z]
    chosen = choices(moe, case, z, s, valid)
    weights = [weighed(router, z[t], s[t], row) for t, row in enumerate(chosen)]
    admitted = admissions(moe, case, s, chosen, valid)
    load = [0] * moe["experts"]
    for row, fits in zip(chosen, admitted, strict=True):
        for e, fit in zip(row, fits, strict=True):
            load[e] += fit
    routed = {"clean": clean, "scores": s, "chosen": chosen, "weights": weights, "valid": valid}
    routed["sequence"] = case.get("sequence_T") or [0] * count
    if router["noise"]["kind"] == "learned":
        routed |= noisy_gates(router, case, moe["experts"])
    return {
        "experts_TK": chosen,
        "weights_TK": weights,
        "admitted_TK": admitted,
        "load_E": load,
        "losses": losses(moe, routed),
    }


def matrix(case: Data, name: str, rows: int, columns: int) -> list[Row]:
    """The named matrix of the case; the identity where it has none."""
    given = case.get("parameters", {}).get(name)
    return given or [[float(r == c) for c in range(columns)] for r in range(rows)]


def times(m: list[Row], x: Row) -> Row:
    return [sum(a * b for a, b in zip(row, x, strict=True)) for row in m]


def logits(router: Data, case: Data, experts: int, x: Row) -> Row:
    z = secondary(router, case, experts, x)
    if router["select"]["kind"] == "two_level":
        return two_level_logits(router["select"]["groups"], case, x, z)
    return z


def secondary(router: Data, case: Data, experts: int, x: Row) -> Row:
    """The gate of the experts, which is the only one unless groups have theirs."""
    match router["projection"]["kind"]:
        case "none":
            return [0.0] * experts
        case "mlp":
            hidden = [
                math.tanh(h) for h in times(matrix(case, "projection.hidden.weight", experts, len(x)), x)
            ]
            return times(matrix(case, "projection.output.weight", experts, experts), hidden)
    z = times(matrix(case, "projection.weight", experts, len(x)), x)
    (bias,) = case.get("parameters", {}).get("projection.bias", [[0.0] * experts])
    return [a + b for a, b in zip(z, bias, strict=True)]


def two_level_logits(groups: int, case: Data, x: Row, z: Row) -> Row:
    """Log of primary times secondary probability (Shazeer 2017 appendix B), so that softmax gives it back."""
    primary = scores("softmax", times(matrix(case, "primary.weight", groups, len(x)), x))
    size = len(z) // groups
    out = []
    for g in range(groups):
        secondary = scores("softmax", z[g * size : (g + 1) * size])
        out += [math.log(primary[g]) + math.log(p) for p in secondary]
    return out


def noisy_gates(router: Data, case: Data, experts: int) -> Data:
    """Clean logits of each gate, and the standard deviations of their learned noise."""
    sizes = {"": experts}
    if router["select"]["kind"] == "two_level":
        sizes["primary_"] = router["select"]["groups"]
    floor, out = (
        router["noise"]["floor"],
        {"gate": [secondary(router, case, experts, x) for x in case["x_TD"]]},
    )
    for prefix, size in sizes.items():
        noise = [times(matrix(case, f"{prefix}noise.weight", size, len(x)), x) for x in case["x_TD"]]
        out[f"{prefix}deviation"] = [[math.log1p(math.exp(v)) + floor for v in row] for row in noise]
    if "primary_" in sizes:
        out["primary"] = [
            times(matrix(case, "primary.weight", sizes["primary_"], len(x)), x) for x in case["x_TD"]
        ]
    return out


def transformed(steps: list[Data], z: Row) -> Row:
    for step in steps:
        if step["kind"] == "softcap":
            z = [step["cap"] * math.tanh(v / step["cap"]) for v in z]
        else:
            mean = sum(z) / len(z)
            variance = sum((v - mean) ** 2 for v in z) / (len(z) - 1)
            z = [step["scale"] * (v - mean) / math.sqrt(variance + step["epsilon"]) for v in z]
    return z


def scores(kind: str, z: Row) -> Row:
    match kind:
        case "softmax":
            exps = [math.exp(v - max(z)) for v in z]
            return [e / sum(exps) for e in exps]
        case "sigmoid":
            return [1 / (1 + math.exp(-v)) for v in z]
        case "sqrt_softplus":
            return [math.sqrt(math.log1p(math.exp(v))) for v in z]
        case "relu":
            return [max(v, 0.0) for v in z]
    raise AssertionError(kind)


def ranked(values: Row) -> list[int]:
    return sorted(range(len(values)), key=lambda e: (-values[e], e))


def choices(moe: Data, case: Data, z: list[Row], s: list[Row], valid: list[bool]) -> list[list[int]]:
    router, bias = moe["router"], case.get("bias_E") or [0.0] * moe["experts"]
    values = [selection(router, z[t], s[t], bias) for t in range(len(z))]
    if router["select"]["kind"] == "expert_choice":
        return chosen_by_experts(router["select"]["factor"], values, valid)
    if router["select"]["kind"] == "hash":
        table = case["parameters"]["table"]
        return [[int(e) for e in table[t]] if valid[t] else [] for t in range(len(z))]
    if router["select"]["kind"] == "two_level":
        groups = router["select"]["groups"]
        gate = [times(matrix(case, "primary.weight", groups, len(x)), x) for x in case["x_TD"]]
        return [
            in_best_levels(router["select"], gate[t], values[t]) if valid[t] else [] for t in range(len(z))
        ]
    return [chosen(router["select"], values[t], s[t]) if valid[t] else [] for t in range(len(z))]


def selection(router: Data, z: Row, s: Row, bias: Row) -> Row:
    match router["offset"]:
        case "scores":
            return [a + b for a, b in zip(s, bias, strict=True)]
        case "logits":
            return scores(router["score"]["kind"], [a + b for a, b in zip(z, bias, strict=True)])
    return s


def chosen_by_experts(factor: float, values: list[Row], valid: list[bool]) -> list[list[int]]:
    tokens, experts = [t for t, v in enumerate(valid) if v], len(values[0])
    each = min(len(tokens), math.ceil(factor * len(tokens) / experts))
    taken: list[set[int]] = [set() for _ in values]
    for e in range(experts):
        for t in sorted(tokens, key=lambda t, e=e: (-values[t][e], t))[:each]:
            taken[t].add(e)
    return [[e for e in ranked(values[t]) if e in taken[t]] for t in range(len(values))]


def chosen(select: Data, values: Row, s: Row) -> list[int]:
    order = ranked(values)
    match select["kind"]:
        case "top_k":
            allowed = (
                range(len(values)) if select["groups"] is None else in_best_groups(select["groups"], values)
            )
            return [e for e in order if e in allowed][: select["k"]]
        case "sampled_second":
            return order[:2]
        case "threshold":
            return [e for e in order if values[e] > select["minimum"]][: select["most"]]
        case "top_p":
            kept: list[int] = []
            while len(kept) < select["most"] and sum(s[e] for e in kept) < select["p"]:
                kept.append(order[len(kept)])
            return kept
    raise AssertionError(select)


def members(count: int, experts: int) -> list[list[int]]:
    size = experts // count
    return [list(range(g * size, (g + 1) * size)) for g in range(count)]


def in_best_groups(groups: Data, values: Row) -> set[int]:
    """DeepSeek-V2 ranks a group by its best value, V3 by the sum of its two best."""
    best = {"max": 1, "top2_sum": 2}[groups["score"]]
    parts = members(groups["count"], len(values))
    totals = [sum(sorted((values[e] for e in part), reverse=True)[:best]) for part in parts]
    return {e for g in ranked(totals)[: groups["keep"]] for e in parts[g]}


def in_best_levels(levels: Data, primary: Row, values: Row) -> list[int]:
    """The best groups by the primary gate, then the best inside each; all by falling joint probability."""
    parts = members(levels["groups"], len(values))
    kept = ranked(primary)[: levels["keep"]]
    inside = [e for g in kept for e in sorted(parts[g], key=lambda e: (-values[e], e))[: levels["k"]]]
    return sorted(inside, key=lambda e: (-values[e], e))


def weighed(router: Data, z: Row, s: Row, order: list[int]) -> Row:
    """Weights from scores or logits without bias, normalised over what is used, then scaled."""
    rule, total = router["weight"], sum(s[e] for e in order)
    match rule["kind"]:
        case "raw":
            raw = [s[e] for e in order]
        case "normalised":
            raw = [s[e] / (total + rule["epsilon"]) for e in order]
        case "clamped_sum":
            raw = [s[e] / max(total, rule["minimum"]) for e in order]
        case "softmax_of_selected" if router["select"]["kind"] == "two_level":
            raw = level_weights(router["select"], s, order)
        case "softmax_of_selected":
            exps = [math.exp(z[e] - max(z)) for e in order]
            raw = [v / sum(exps) for v in exps]
        case _:
            raw = [1.0 for _ in order]
    return [w * router["scale"] for w in raw]


def level_weights(levels: Data, s: Row, order: list[int]) -> Row:
    """Softmax over the kept groups times softmax over the kept experts of the group."""
    size = len(s) // levels["groups"]
    group = {g: sum(s[g * size : (g + 1) * size]) for g in {e // size for e in order}}
    inside = {g: sum(s[e] for e in order if e // size == g) for g in group}
    return [group[e // size] / sum(group.values()) * s[e] / inside[e // size] for e in order]


def admissions(
    moe: Data, case: Data, s: list[Row], chosen: list[list[int]], valid: list[bool]
) -> list[list[bool]]:
    """Who fits in training. The limit is ceil(factor * tokens * k / experts), exact for these small sizes."""
    rules, kept = moe["admission"], [[True] * len(row) for row in chosen]
    if rules["kind"] == "dropless":
        return kept
    order = sorted((rank, t) for t, row in enumerate(chosen) for rank in range(len(row)))
    if rules["kind"] == "device_capacity" or rules["by"] == "probability":
        order.sort(key=lambda c: -s[c[1]][chosen[c[1]][c[0]]])
    runs, parts = run_of(valid, rules.get("group_tokens")), moe["experts"]
    if rules["kind"] == "device_capacity":
        parts = rules["devices"]
    copies = {r: sum(len(row) for t, row in enumerate(chosen) if runs[t] == r) for r in runs}
    k = most_chosen(moe)
    tokens = {r: sum(valid[t] and runs[t] == r for t in range(len(runs))) for r in runs}
    taken: dict[tuple[int, int], int] = {}
    for rank, t in order:
        place = (runs[t], chosen[t][rank] * parts // moe["experts"])
        wanted = copies[runs[t]] if rules["kind"] == "device_capacity" else tokens[runs[t]] * k
        limit = math.ceil(rules["factor"] * wanted / parts - 1e-9)
        kept[t][rank] = taken.get(place, 0) < limit
        taken[place] = taken.get(place, 0) + 1
    return kept


def run_of(valid: list[bool], group_tokens: int | None) -> list[int]:
    """Number of each token's run of ``group_tokens`` valid tokens; one run without groups."""
    if group_tokens is None:
        return [0] * len(valid)
    seen, out = 0, []
    for ok in valid:
        out.append(seen // group_tokens)
        seen += ok
    return out


def most_chosen(moe: Data) -> int:
    select = moe["router"]["select"]
    match select["kind"]:
        case "sampled_second":
            return 2
        case "two_level":
            return select["keep"] * select["k"]
        case "expert_choice":
            return moe["experts"]
    return select.get("k") or select["most"]
