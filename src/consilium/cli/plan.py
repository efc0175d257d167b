"""``consilium plan``: what a model costs before it is built."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from types import MappingProxyType

from consilium.cli.arguments import count, json_flag, size
from consilium.cli.models import full_name, read_model
from consilium.cli.table import columns, counted, operations, sized
from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.planner.plan import plan
from consilium.records.plan import Plan

EVERY_LAW = "all"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="recipe name[:size], a folder, or a .yaml file of a model"
    )
    parser.add_argument("--fit", type=size, metavar="SIZE", help="memory to fit into, such as 24GiB")
    parser.add_argument("--tokens", type=count, metavar="N", help="training tokens to cost, such as 8.1T")
    parser.add_argument("--against", metavar="MODEL", help="another model beside this one")
    parser.add_argument(
        "--law",
        nargs="?",
        const=EVERY_LAW,
        metavar="NAME",
        help="what scaling laws predict: all, or one such as clark, clark:s-base, chinchilla",
    )
    parser.add_argument("--params", type=count, metavar="N", help="with --law, in place of MODEL: active")
    parser.add_argument("--experts", type=count, metavar="E", help="with --params: experts, one active")
    json_flag(parser)


def run(options: Namespace) -> int:
    if options.model is None:
        return _run_without_model(options)
    if options.params is not None or options.experts is not None:
        raise ConsiliumError(
            "plan: --params and --experts ask a law about a model that does not exist; leave out MODEL,"
            " or leave them out."
        )
    model = read_model(options.model)
    planned = plan(model)
    other = None if options.against is None else plan(read_model(options.against))
    print(
        json.dumps(_data(model, planned, other, options), indent=2)
        if options.json
        else _text(model, planned, other, options)
    )
    return 0


def _run_without_model(options: Namespace) -> int:
    """Ask scaling laws at N and E alone."""
    from consilium.cli import predictions

    if options.law is None:
        raise ConsiliumError(
            "consilium plan: the following arguments are required: MODEL, or --law with --params N and"
            " --experts E; consilium plan --help shows the arguments."
        )
    found = predictions.of_point(options)
    if options.params is None and not options.json:
        print("no MODEL and no --params: the N and E that articles quote")
    data = {"laws": dataclasses.asdict(found)}
    print(json.dumps(data, indent=2) if options.json else predictions.predictions_text(found).lstrip())
    return 0


def _data(model: Model, planned: Plan, other: Plan | None, options: Namespace) -> dict[str, object]:
    data = _costs(planned, options.fit, options.tokens)
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


def _text(model: Model, planned: Plan, other: Plan | None, options: Namespace) -> str:
    name = full_name(options.model)
    parts = [name, _parameters(planned), _arithmetic(planned), _memory(planned)]
    if options.fit is not None:
        parts.append(_fit(planned, options.fit))
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


def _training(planned: Plan, tokens: int) -> str:
    flops = planned.flops_per_token
    rows = [("main model", operations(tokens * flops.training))]
    if flops.mtp:
        rows.append(("multi-token prediction", operations(tokens * 3 * flops.mtp)))
    return f"\ntraining on {counted(tokens)} tokens\n" + columns(rows, indent="  ")
