"""What the vectors route: the same kinds of batches for every system, in numbers of three decimals."""

from __future__ import annotations

import random
from typing import Any

Data = dict[str, Any]


def cases(moe: Data, seed: int = 0) -> list[Data]:
    """Inputs without expectations; ``tied`` marks those where equal values decide."""
    experts, made = moe["experts"], [*plain(moe, seed), *biased(moe, seed), *with_other_sizes(moe, seed)]
    for case in made:
        if moe["router"]["select"]["kind"] == "hash":
            case["parameters"] = {**case.get("parameters", {}), "table": table(moe)}
        if moe["router"]["select"]["kind"] == "two_level" and case.get("tied"):
            # Ties inside groups: between groups the sums of a softmax would decide.
            groups = moe["router"]["select"]["groups"]
            case["parameters"] = {"primary.weight": distinct(random.Random("levels"), groups, experts)}
        assert all(len(row) == experts for row in case["x_TD"]) or "parameters" in case
    return made


def plain(moe: Data, seed: int) -> list[Data]:
    draw, experts = random.Random(f"plain {seed}"), moe["experts"]
    # Of different heights: tokens that compete for places must not differ by a rounding error alone.
    one_hot = [[(3 + t / 4) * (e == (3 * t + 1) % experts) for e in range(experts)] for t in range(6)]
    coarse = [[draw.randrange(-2, 3) / 2 for _ in range(experts)] for _ in range(6)]
    padded = distinct(draw, 7, experts)
    padded[2], padded[6] = [30.0] * experts, [-30.0] * experts
    valid = [t not in (2, 6) for t in range(7)]
    return [
        {"name": "ordinary", "x_TD": distinct(draw, 6, experts), "sequence_T": [0, 0, 0, 1, 1, 1]},
        {"name": "ties", "x_TD": coarse, "tied": True},
        {"name": "uniform", "x_TD": [[0.0] * experts] * 3, "tied": True},
        {"name": "one-hot", "x_TD": one_hot, "tied": True},
        {"name": "padding", "x_TD": padded, "valid_T": valid, "sequence_T": [0, 0, 0, 0, 1, 1, 1]},
        {"name": "fewer tokens than experts", "x_TD": distinct(draw, 3, experts)},
        {"name": "one token", "x_TD": distinct(draw, 1, experts)},
        {"name": "a gate matrix", "x_TD": distinct(draw, 4, 5), "parameters": matrices(draw, moe, 5)},
    ]


def distinct(draw: random.Random, tokens: int, columns: int) -> list[list[float]]:
    """Rows of normal values, no two equal in a row."""
    rows = []
    while len(rows) < tokens:
        row = [round(draw.gauss(0, 1), 3) for _ in range(columns)]
        if len(set(row)) == columns:
            rows.append(row)
    return rows


def matrices(draw: random.Random, moe: Data, inputs: int) -> Data:
    """Every matrix of a router of ``inputs`` inputs, drawn, so that a transposed one is noticed.

    Small values keep sigmoids apart: near 1 they are equal in float32.
    """
    router, experts = moe["router"], moe["experts"]
    match router["projection"]["kind"]:
        case "mlp":
            shapes = {
                "projection.hidden.weight": (experts, inputs),
                "projection.output.weight": (experts, experts),
            }
        case "none":
            shapes = {}
        case _:
            shapes = {"projection.weight": (experts, inputs)}
            if router["projection"]["bias"]:
                shapes["projection.bias"] = (1, experts)
    if router["noise"]["kind"] == "learned":
        shapes["noise.weight"] = (experts, inputs)
    if router["select"]["kind"] == "two_level":
        shapes["primary.weight"] = (router["select"]["groups"], inputs)
        shapes["primary_noise.weight"] = (router["select"]["groups"], inputs)
    return {
        name: [[round(v / 4, 4) for v in row] for row in distinct(draw, *shape)]
        for name, shape in shapes.items()
    }


def biased(moe: Data, seed: int) -> list[Data]:
    """Selection biases of size 2; a system without one must not notice them."""
    experts = moe["experts"]
    spread = [((5 * e) % 7 - 3) / 16 for e in range(experts)]
    biases = {
        "negative biases": [-2 + v for v in spread],
        "positive biases": [2 + v for v in spread],
        "biases of both signs": [(2 if e % 3 else -2) + spread[e] for e in range(experts)],
    }
    draw = random.Random(f"biased {seed}")
    if moe["router"]["offset"] == "none":
        return [
            {
                "name": "a bias to ignore",
                "x_TD": distinct(draw, 3, experts),
                "bias_E": biases["biases of both signs"],
            }
        ]
    return [
        {"name": name, "x_TD": distinct(draw, 4, experts), "bias_E": bias} for name, bias in biases.items()
    ]


def with_other_sizes(moe: Data, seed: int) -> list[Data]:
    draw, experts, made = random.Random(f"sizes {seed}"), moe["experts"], []
    if everyone := all_experts(moe):
        made.append({"name": "every expert", "x_TD": distinct(draw, 3, experts), "sizes": everyone})
    if moe["admission"]["kind"] != "dropless":
        skewed = [[*row[:-1], 3 + abs(row[-1])] for row in distinct(draw, 9, experts)]
        skewed[5] = distinct(draw, 1, experts)[0]
        # Eight valid tokens fill a capacity exactly: counting the padded one would make room.
        valid = [t != 4 for t in range(9)]
        for factor in ("0.5", "1.0"):
            name = f"crowded, capacity factor {factor}"
            made.append(
                {"name": name, "x_TD": skewed, "valid_T": valid, "sizes": {"admission.factor": factor}}
            )
    if moe["admission"].get("group_tokens"):
        made.append(
            {**made[-1], "name": "crowded, in groups of three", "sizes": {"admission.group_tokens": "3"}}
        )
    return made


def all_experts(moe: Data) -> dict[str, str]:
    """Sizes with which a token uses every expert, where the selector has such."""
    select, experts = moe["router"]["select"], moe["experts"]
    match select["kind"]:
        case "top_k":
            if select["k"] == experts or (
                select["k"] == 1 and moe["router"]["weight"]["kind"] == "normalised"
            ):
                return {}
            groups = select["groups"] and {"router.select.groups.keep": str(select["groups"]["count"])}
            return {"router.select.k": str(experts), **(groups or {})}
        case "expert_choice":
            return {"router.select.factor": str(experts)}
        case "two_level":
            size = experts // select["groups"]
            return {"router.select.keep": str(select["groups"]), "router.select.k": str(size)}
    return {}


def table(moe: Data) -> list[list[float]]:
    """Distinct experts for each token id of a hash router."""
    draw, select = random.Random("table"), moe["router"]["select"]
    rows = range(select["vocab_size"])
    return [[float(e) for e in draw.sample(range(moe["experts"]), select["k"])] for _ in rows]
