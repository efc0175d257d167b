"""Every balance loss as a sum of Python numbers, from its paper. Shares nothing with the package."""

from __future__ import annotations

import math
from typing import Any

Row = list[float]
Data = dict[str, Any]


def losses(moe: Data, routed: Data) -> dict[str, float]:
    """Losses of the router's decision before drops, coefficients included; two of one kind are added."""
    out: dict[str, float] = {}
    for rule in moe["balance"]["losses"]:
        coefficient = rule["start"] if rule["kind"] == "adaptive" else rule["coefficient"]
        out[rule["kind"]] = out.get(rule["kind"], 0.0) + coefficient * loss(rule, moe, routed)
    return out


def loss(rule: Data, moe: Data, routed: Data) -> float:
    tokens = [t for t, ok in enumerate(routed["valid"]) if ok]
    match rule["kind"]:
        case "z":
            return sum(math.log(sum(map(math.exp, routed["clean"][t]))) ** 2 for t in tokens) / len(tokens)
        case "importance":
            return squared_variation(importance(moe["experts"], routed))
        case "load":
            return load_loss(moe, routed, tokens)
    if rule["kind"] != "sequence" and rule.get("scope", "batch") != "sequence":
        return balance(rule, moe, routed, tokens)
    parts = [[t for t in tokens if routed["sequence"][t] == s] for s in sorted(set(routed["sequence"]))]
    values = [balance(rule, moe, routed, part) for part in parts if part]
    return sum(values) / len(values)


def squared_variation(values: Row) -> float:
    """Population variance over the square of the mean."""
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def importance(experts: int, routed: Data) -> Row:
    total = [0.0] * experts
    for row, weights in zip(routed["chosen"], routed["weights"], strict=True):
        for e, w in zip(row, weights, strict=True):
            total[e] += w
    return total


def load_loss(moe: Data, routed: Data, tokens: list[int]) -> float:
    """Shazeer 2017 equations 8 to 11 where the noise came out as zero: noisy and clean logits are one."""
    select, experts = moe["router"]["select"], moe["experts"]
    if select["kind"] == "two_level":
        return squared_variation(hierarchical_load(select, experts, routed, tokens))
    load = [0.0] * experts
    for t in tokens:
        for e, p in enumerate(chances(routed["gate"][t], routed["deviation"][t], select["k"])):
            load[e] += p
    return squared_variation(load)


def chances(z: Row, deviation: Row, k: int) -> Row:
    """Each output's chance to be among the k highest on a fresh draw of its own noise; 1 where k is all."""
    out = []
    for e, clean in enumerate(z):
        others = sorted((v for j, v in enumerate(z) if j != e), reverse=True)
        gap = math.inf if k > len(others) else (clean - others[k - 1]) / deviation[e]
        out.append(0.5 * (1 + math.erf(gap / math.sqrt(2))))
    return out


def hierarchical_load(levels: Data, experts: int, routed: Data, tokens: list[int]) -> Row:
    """Appendix B: Load_primary(i) times Load_i(j) over the tokens sent to group i, over their number."""
    size, out = experts // levels["groups"], []
    primary = {
        t: chances(routed["primary"][t], routed["primary_deviation"][t], levels["keep"]) for t in tokens
    }
    for i in range(levels["groups"]):
        here = slice(i * size, (i + 1) * size)
        sent = [t for t in tokens if any(e // size == i for e in routed["chosen"][t])]
        inside = [0.0] * size
        for t in sent:
            for j, p in enumerate(
                chances(routed["gate"][t][here], routed["deviation"][t][here], levels["k"])
            ):
                inside[j] += p
        load = sum(primary[t][i] for t in tokens)
        out += [load * v / max(len(sent), 1) for v in inside]
    return out


def balance(rule: Data, moe: Data, routed: Data, part: list[int]) -> float:
    """The losses that pair load fractions with probabilities, over the tokens of ``part``."""
    experts = moe["experts"]
    p = [
        sum(routed["scores"][t][e] / sum(routed["scores"][t]) for t in part) / len(part)
        for e in range(experts)
    ]
    if rule["kind"] == "adaptive":
        return sum((1 / experts - x) ** 2 for x in p)
    rows = [counted(rule, routed, t) for t in part]
    f = [experts * sum(e in row for row in rows) / sum(map(len, rows)) for e in range(experts)]
    if rule["kind"] in ("switch", "sequence"):
        return sum(a * b for a, b in zip(f, p, strict=True))
    devices, size, total = rule["devices"], experts // rule["devices"], 0.0
    for d in range(devices):
        here = range(d * size, (d + 1) * size)
        if rule["kind"] == "device":
            share = sum(f[e] for e in here) / size
        else:
            sent = sum(any(e in here for e in row) for row in rows)
            share = devices / (rule["most"] * len(part)) * sent
        total += share * sum(p[e] for e in here)
    return total


def counted(rule: Data, routed: Data, t: int) -> list[int]:
    """Which choices of a token make f: all, the first, or the best by score alone."""
    match rule.get("counts", "all"):
        case "first":
            return routed["chosen"][t][:1]
        case "scores":
            s = routed["scores"][t]
            return sorted(range(len(s)), key=lambda e: (-s[e], e))[: len(routed["chosen"][t])]
    return routed["chosen"][t]
