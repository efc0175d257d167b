"""``consilium plan``: what a model costs before it is built."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from types import MappingProxyType

from consilium.cli.arguments import count, json_flag, size
from consilium.cli.models import full_name, read_model
from consilium.cli.table import columns, counted, operations, sized
from consilium.planner.plan import plan
from consilium.records.plan import Plan


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="recipe name[:size], a folder, or a .yaml file of a model"
    )
    parser.add_argument("--fit", type=size, metavar="SIZE", help="memory to fit into, such as 24GiB")
    parser.add_argument("--tokens", type=count, metavar="N", help="training tokens to cost, such as 8.1T")
    json_flag(parser)


def run(options: Namespace) -> int:
    planned = plan(read_model(options.model))
    if options.json:
        print(json.dumps(_data(planned, options.fit, options.tokens), indent=2))
    else:
        print(_text(full_name(options.model), planned, options.fit, options.tokens))
    return 0


def _data(planned: Plan, fit: int | None, tokens: int | None) -> dict[str, object]:
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


def _text(name: str, planned: Plan, fit: int | None, tokens: int | None) -> str:
    parts = [name, _parameters(planned), _arithmetic(planned), _memory(planned)]
    if fit is not None:
        parts.append(_fit(planned, fit))
    if tokens is not None:
        parts.append(_training(planned, tokens))
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
