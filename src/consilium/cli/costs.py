"""What ``consilium plan`` shows of a model: counts, arithmetic and memory, as data and as text."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Final

from consilium.cli.models import full_name
from consilium.config.model import Model
from consilium.planner.memory import serving
from consilium.records.plan import Plan, Serving
from consilium.report.plain import columns, counted, operations, sized
from consilium.words.say import say

_BF16_BYTES: Final = 2


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
    if options.upcycle is not None:
        name = say("{model}, upcycled: {keys}", model=name, keys=say(", ").join(options.upcycle))
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
        (say("total"), counts.total),
        (say("active a token"), counts.active),
        (say("active without input embedding"), counts.active_without_input_embedding),
    ]
    if counts.mtp:
        rows.append((say("multi-token prediction, not in the total"), counts.mtp))
    if counts.buffers:
        rows.append((say("selection biases, not parameters"), counts.buffers))
    cells = [(label, f"{value:,}", counted(value)) for label, value in rows]
    return f"\n{say('parameters')}\n" + columns(cells, right=(1,), indent="  ")


def _arithmetic(planned: Plan) -> str:
    flops = planned.flops_per_token
    rows = [
        (say("forward"), operations(flops.forward)),
        (say("training (3 x forward)"), operations(flops.training)),
    ]
    if flops.mtp:
        rows.append((say("multi-token prediction, forward, not in these"), operations(flops.mtp)))
    title = say("arithmetic a token, in sequences of {context:,}", context=flops.context)
    return f"\n{title}\n" + columns(rows, indent="  ")


def _memory(planned: Plan) -> str:
    cache = say(
        "{bytes:,} B a token ({values:,} values)",
        bytes=planned.kv_bytes_per_token,
        values=planned.kv_values_per_token,
    )
    rows = [(say("KV cache, bfloat16"), cache), *_window(planned)]
    rows += [(_weights(dtype), sized(need)) for dtype, need in planned.weight_bytes_by_dtype.items()]
    training = say("{size} and activations", size=sized(planned.training_bytes))
    rows.append((say("training, float32 AdamW"), training))
    return f"\n{say('memory')}\n" + columns(rows, indent="  ")


def _window(planned: Plan) -> list[tuple[str, str]]:
    """What is still read of a token that windows have left behind, where there are windows."""
    if (found := planned.window) is None:
        return []
    which = say(
        "behind a window of {tokens:,} in {layers:,} layers", tokens=found.tokens, layers=found.layers
    )
    read = say("{bytes:,} B a token are read, and all stay", bytes=_BF16_BYTES * found.kv_values_beyond)
    return [(which, read)]


def _weights(dtype: str) -> str:
    return say("weights, {dtype}", dtype=dtype)


def _answer(yes: bool) -> str:  # noqa: FBT001 - what is answered
    return say("yes") if yes else say("no")


def _too_much(over: int) -> str:
    return say("{size} too much", size=sized(over))


def _fit(planned: Plan, fit: int) -> str:
    rows: list[tuple[str, str, str]] = []
    for dtype, need in planned.weight_bytes_by_dtype.items():
        left = _cached_tokens(planned, fit, need)
        room = say("and {tokens:,} cached tokens", tokens=left) if need <= fit else _too_much(need - fit)
        rows.append((_weights(dtype), _answer(need <= fit), room))
    short = planned.training_bytes - fit
    room = _too_much(short) if short > 0 else say("{size} left for activations", size=sized(-short))
    rows.append((say("training, float32 AdamW"), _answer(short <= 0), room))
    return f"\n{say('fits into {size}?', size=sized(fit))}\n" + columns(rows, indent="  ")


def serving_asked(model: Model, options: Namespace) -> Serving | None:
    """The memory of ``--context``, ``--batch`` and ``--dtype``, where one of them was given."""
    if options.context is None and options.batch is None and options.dtype is None:
        return None
    return serving(
        model, context=options.context, batch=options.batch or 1, dtype=options.dtype or "bfloat16"
    )


def _serving(asked: Serving, fit: int | None) -> str:
    rows = [
        (_weights(asked.dtype), sized(asked.weight_bytes)),
        (say("KV cache"), sized(asked.cache_bytes)),
        (say("activations of one pass, about"), sized(asked.activation_bytes)),
        (say("in all"), sized(asked.total_bytes)),
    ]
    if fit is not None:
        rows.append((say("fits into {size}", size=sized(fit)), _answer(asked.total_bytes <= fit)))
    title = say("serving {batch:,} x {context:,} tokens", batch=asked.batch, context=asked.context)
    return f"\n{title}\n" + columns(rows, indent="  ")


def _training(planned: Plan, tokens: int) -> str:
    flops = planned.flops_per_token
    rows = [(say("main model"), operations(tokens * flops.training))]
    if flops.mtp:
        rows.append((say("multi-token prediction"), operations(tokens * 3 * flops.mtp)))
    return f"\n{say('training on {tokens} tokens', tokens=counted(tokens))}\n" + columns(rows, indent="  ")
