"""Blocks of the documents that the planner computes: cache arithmetic, scaling laws, what fits a laptop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from consilium.config.attention import GQA, MLA
from consilium.config.model import Model
from consilium.planner.compare import kv_ratio
from consilium.planner.laws import LAWS, find
from consilium.planner.plan import plan
from consilium.planner.predictions import Point, point, predict
from consilium.recipes.catalogue import recipe
from consilium.records.plan import Plan
from consilium.records.prediction import Prediction
from consilium.report.plain import counted, markdown, operations, sized

GPU_HOURS = MappingProxyType({"DeepSeek 67B": 300.6, "DeepSeek-V2": 172.8})
"""Thousands of H800 hours a trillion tokens, as 2405.04434 prints them."""

LAPTOP, SYSTEM = 32 * 2**30, 4 * 2**30
"""Memory of the laptop, and what its system and a browser keep of it."""


def saved(ratio: float) -> str:
    return f"{100 * (1 - ratio):.1f} %"


def cache_block() -> str:
    """The 93.3 % and the 42.5 % of DeepSeek-V2, each with the division that gives it."""
    large, latent = recipe("llama:deepseek-67b"), recipe("deepseek-v2")
    dense, sparse = plan(large), plan(latent)
    rows = [cache_row("DeepSeek 67B", large, dense, 16, dense)]
    rows += [cache_row("DeepSeek-V2", latent, sparse, bits, dense) for bits in (16, 8, 6)]
    before, after = GPU_HOURS.values()
    forward = sparse.flops_per_token.forward / dense.flops_per_token.forward
    return (
        markdown(("Model", "Cached values a token", "Bits a value", "Bytes a token", "Saved"), rows)
        + f"\nTraining hours: 1 - {after} / {before} = {saved(after / before)}."
        f" Arithmetic, which the planner counts: 1 - {operations(sparse.flops_per_token.forward)} /"
        f" {operations(dense.flops_per_token.forward)} = {saved(forward)} a token forward.\n"
    )


def cache_row(name: str, model: Model, planned: Plan, bits: int, base: Plan) -> tuple[str, ...]:
    size = planned.kv_values_per_token * bits // 8
    share = "" if planned is base else saved(kv_ratio(planned, base, bits))
    return name, f"{widths(model)} = {planned.kv_values_per_token:,}", str(bits), f"{size:,}", share


def widths(model: Model) -> str:
    match model.attention:
        case GQA(kv_heads=heads, head_dim=width):
            return f"2 x {heads} x {width} x {model.layers}"
        case MLA(kv_rank=rank, rope_dim=rotary):
            return f"({rank} + {rotary}) x {model.layers}"


CLARK_POINTS = (("s-base", 21e9), ("rl-r", 21e9), ("hash", 21e9), ("s-base", 2.1e9), ("s-base", 1.3e9))


def clark_block() -> str:
    """Both slopes of the three routers at the point that articles quote, and where the quoted number is."""
    columns = ("Router", "N", "E", "Loss", "a + c log E", "b + c log N", "d log L/d log N", "d log L/d log E")
    rows = [clark_row(router, n) for router, n in CLARK_POINTS]
    return markdown((*columns, "Equals a dense"), rows)


def clark_row(router: str, n: float) -> tuple[str, ...]:
    (found,) = predict(find(f"clark:{router}"), Point(active=n, experts=8.0)).predictions
    slopes = [
        f"{slope:.4f}"
        for pair in (found.raw_slopes, found.slopes)
        if pair is not None
        for slope in (pair.parameters, pair.experts)
    ]
    return router, amount(n), "8", f"{found.loss:.3f}", *slopes, amount(found.dense_equivalent)


def laws_block() -> str:
    rows = [(f"`{law.name}`", paper(law.paper), law.counts, law.fitted) for law in LAWS]
    return markdown(("Law", "Paper", "N", "Bounds"), rows)


def paper(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})"


TRAINED = (
    ("deepseek-v3:671b", 14_800_000_000_000),
    ("deepseek-v2:236b", 8_100_000_000_000),
    ("deepseek-v2:lite", 5_700_000_000_000),
    ("deepseek-moe:16b", 2_000_000_000_000),
)
"""Models and the tokens that their papers say they read."""


def models_block() -> str:
    """What the laws that see experts make of real models."""
    columns = ("Model", "Tokens", "Active", "E", "G", "`clark:s-base`", "`joint`", "`krajewski`", "`ling`")
    return markdown(columns, [model_row(name, tokens) for name, tokens in TRAINED])


def model_row(name: str, tokens: int) -> tuple[str, ...]:
    at = point(recipe(name), tokens)
    found = {one.law: one for one in predict(LAWS, at).predictions}
    sizes = [equals(found[law]) for law in ("clark:s-base", "joint", "krajewski")]
    leverage = f"{found['ling'].leverage:.1f} x"
    return (
        f"`{name}`",
        amount(tokens),
        amount(at.active),
        f"{at.experts:.3g}",
        f"{at.granularity:.3g}",
        *sizes,
        leverage,
    )


def equals(found: Prediction) -> str:
    return "none" if found.dense_equivalent is None else amount(found.dense_equivalent)


def amount(value: float | None) -> str:
    return "" if value is None else counted(round(value))


def laptop_block() -> str:
    """Three models that people download, in the memory of a laptop."""
    free = LAPTOP - SYSTEM
    models = {
        "OLMoE-1B-7B": recipe("olmoe:7b"),
        "Qwen1.5-MoE-A2.7B": recipe("qwen-moe:a2.7b"),
        "DeepSeek-V2-Lite": recipe("deepseek-v2:lite"),
    }
    columns = ("Model", "Parameters", "Active", "bfloat16", f"In {sized(free)}?", "Cached tokens beside it")
    rows = [laptop_row(name, plan(model), free) for name, model in models.items()]
    return markdown((*columns, "8 bits a weight", "4 bits a weight"), rows)


def laptop_row(name: str, planned: Plan, free: int) -> tuple[str, ...]:
    need = planned.weight_bytes_by_dtype
    left = free - planned.weight_bytes
    fits = "yes" if left >= 0 else f"no, {sized(-left)} too much"
    room = f"{left // planned.kv_bytes_per_token:,}" if left >= 0 else ""
    counts = f"{planned.parameters.total:,}", counted(planned.parameters.active)
    return name, *counts, sized(planned.weight_bytes), fits, room, sized(need["int8"]), sized(need["int4"])


BLOCKS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "cache": cache_block,
        "clark": clark_block,
        "laws": laws_block,
        "models": models_block,
        "laptop": laptop_block,
    }
)
