"""What ``consilium plan`` shows of a model: counts, arithmetic and memory, as data and as text."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from types import MappingProxyType

from consilium.cli.models import full_name
from consilium.config.model import Model
from consilium.planner.memory import serving
from consilium.records.plan import Plan, Serving
from consilium.report.plain import columns, counted, operations, sized


def plan_data(model: Model, planned: Plan, other: Plan | None, options: Namespace) -> dict[str, object]:
    data = _costs(planned, options.fit, options.tokens)
    if (asked := serving_asked(model, options)) is not None:
        fits = {} if options.fit is None else {"fits": asked.total_bytes <= options.fit}
        data["serving"] = {**dataclasses.asdict(asked), "total_bytes": asked.total_bytes, **fits}
    if other is not None:
        from consilium.cli.comparison import comparison_data

        data["against"] = comparison_data(planned, other)
    if options.law is not None:
        from consilium.cli.predictions import of_model

        data["laws"] = dataclasses.asdict(of_model(model, options))
    return data


def _costs(planned: Plan, fit: int | None, tokens: int | None) -> dict[str, object]:
    data: dict[str, object] = dataclasses.asdict(planned)
    if fit is not None:
        data["fit"] = {
            "bytes": fit,
            "weights": {dtype: need <= fit for dtype, need in planned.weight_bytes_by_dtype.items()},
            "cached_tokens": {
                dtype: _cached_tokens(planned, fit, need)
                for dtype, need in planned.weight_bytes_by_dtype.items()
            },
            "training": planned.training_bytes <= fit,
        }
    if tokens is not None:
        data["training"] = {"tokens": tokens, "flops": tokens * planned.flops_per_token.training}
    return data


def _cached_tokens(planned: Plan, fit: int, weights: int) -> int:
    """Tokens whose keys and values, in bfloat16, fit beside the weights."""
    return max(0, fit - weights) // planned.kv_bytes_per_token


def plan_text(model: Model, planned: Plan, other: Plan | None, options: Namespace) -> str:
    name = full_name(options.model)
    parts = [name, _parameters(planned), _arithmetic(planned), _memory(planned)]
    if options.fit is not None:
        parts.append(_fit(planned, options.fit))
    if (asked := serving_asked(model, options)) is not None:
        parts.append(_serving(asked, options.fit))
    if options.tokens is not None:
        parts.append(_training(planned, options.tokens))
    if other is not None:
        from consilium.cli.comparison import comparison_text

        parts.append(comparison_text(name, planned, full_name(options.against), other))
    if options.law is not None:
        from consilium.cli.predictions import of_model, predictions_text

        parts.append(predictions_text(of_model(model, options)))
    return "\n".join(parts)


def _parameters(planned: Plan) -> str:
    counts = planned.parameters
    rows = [
        ("total", counts.total),
        ("active a token", counts.active),
        ("active without input embedding", counts.active_without_input_embedding),
    ]
    if counts.mtp:
        rows.append(("multi-token prediction, not in the total", counts.mtp))
    if counts.buffers:
        rows.append(("selection biases, not parameters", counts.buffers))
    cells = [(label, f"{value:,}", counted(value)) for label, value in rows]
    return "\nparameters\n" + columns(cells, right=(1,), indent="  ")


def _arithmetic(planned: Plan) -> str:
    flops = planned.flops_per_token
    rows = [("forward", operations(flops.forward)), ("training (3 x forward)", operations(flops.training))]
    if flops.mtp:
        rows.append(("multi-token prediction, forward, not in these", operations(flops.mtp)))
    return f"\narithmetic a token, in sequences of {flops.context:,}\n" + columns(rows, indent="  ")


def _memory(planned: Plan) -> str:
    cache = f"{planned.kv_bytes_per_token:,} B a token ({planned.kv_values_per_token:,} values)"
    rows = [("KV cache, bfloat16", cache)]
    rows += [(f"weights, {dtype}", sized(need)) for dtype, need in planned.weight_bytes_by_dtype.items()]
    rows.append(("training, float32 AdamW", f"{sized(planned.training_bytes)} and activations"))
    return "\nmemory\n" + columns(rows, indent="  ")


_ANSWER = MappingProxyType({True: "yes", False: "no"})


def _fit(planned: Plan, fit: int) -> str:
    rows: list[tuple[str, str, str]] = []
    for dtype, need in planned.weight_bytes_by_dtype.items():
        left = _cached_tokens(planned, fit, need)
        room = f"and {left:,} cached tokens" if need <= fit else f"{sized(need - fit)} too much"
        rows.append((f"weights, {dtype}", _ANSWER[need <= fit], room))
    short = planned.training_bytes - fit
    room = f"{sized(short)} too much" if short > 0 else f"{sized(-short)} left for activations"
    rows.append(("training, float32 AdamW", _ANSWER[short <= 0], room))
    return f"\nfits into {sized(fit)}?\n" + columns(rows, indent="  ")


def serving_asked(model: Model, options: Namespace) -> Serving | None:
    """The memory of ``--context``, ``--batch`` and ``--dtype``, where one of them was given."""
    if options.context is None and options.batch is None and options.dtype is None:
        return None
    return serving(
        model, context=options.context, batch=options.batch or 1, dtype=options.dtype or "bfloat16"
    )


def _serving(asked: Serving, fit: int | None) -> str:
    rows = [
        (f"weights, {asked.dtype}", sized(asked.weight_bytes)),
        ("KV cache", sized(asked.cache_bytes)),
        ("activations of one pass, about", sized(asked.activation_bytes)),
        ("in all", sized(asked.total_bytes)),
    ]
    if fit is not None:
        rows.append((f"fits into {sized(fit)}", _ANSWER[asked.total_bytes <= fit]))
    heading = f"\nserving {asked.batch:,} x {asked.context:,} tokens\n"
    return heading + columns(rows, indent="  ")


def _training(planned: Plan, tokens: int) -> str:
    flops = planned.flops_per_token
    rows = [("main model", operations(tokens * flops.training))]
    if flops.mtp:
        rows.append(("multi-token prediction", operations(tokens * 3 * flops.mtp)))
    return f"\ntraining on {counted(tokens)} tokens\n" + columns(rows, indent="  ")
