"""What a model costs, as the page asks: a recipe or a folder, perhaps with other experts, in tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from consilium.checkpoint.described import model_at
from consilium.config.attention import GQA, MLA
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Hash, Sinkhorn, TopK
from consilium.errors import ConsiliumError
from consilium.planner import exchange, kv, memory, plan
from consilium.recipes.catalogue import find, names, parse, recipe
from consilium.records.plan import Plan, Serving
from consilium.report.plain import counted, operations, sized
from consilium.serving.body import Refused
from consilium.words.say import say

LARGEST_FILE: Final = 2**20
"""Bytes of a configuration that is read."""
MOST_EXPERTS: Final = 2**16
BF16: Final = 2

Object = dict[str, Any]
Rows = list[list[str]]
Count = Annotated[int, Field(ge=1, lt=2**31)]


@final
class PlanRequest(BaseModel):
    """A model, and what is changed about it and its use."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    context: Count | None = None
    batch: Annotated[int, Field(ge=1, le=2**16)] = 1
    experts: Annotated[int, Field(ge=1, le=2**15)] | None = None
    experts_per_token: Annotated[int, Field(ge=1, le=2**15)] | None = None
    dtype: Literal["float32", "bfloat16", "int8", "int4"] = "bfloat16"
    processes: Annotated[int, Field(ge=1, le=4096)] = 1
    gigabytes_per_second: Annotated[float, Field(gt=0, le=1e6)] = 50.0


def recipes() -> list[str]:
    """Every recipe and size, as they are asked for."""
    return [f"{name}:{size}" for name in names() for size in find(name).sizes]


def planned(asked: PlanRequest, place: Path) -> Object:
    """Raises ConsiliumError, as the planner says it, for what cannot be; folders lie in ``place``."""
    own = _model(asked.model, place)
    model = _changed(own, asked)
    found = plan.plan(model)
    used = memory.serving(model, context=asked.context, batch=asked.batch, dtype=asked.dtype)
    tables = [
        _parameters(model, found),
        _memory(used),
        _caches(model),
        _arithmetic(found),
        _speed(model, asked),
    ]
    if model.moe is not None and asked.processes > 1:
        tables.append(_communication(model, model.moe, asked.processes))
    return {
        "name": _name(asked.model, own),
        "own": _own(own),
        "sentence": _resident(model, used),
        "tables": tables,
        "plan": dataclasses.asdict(found),
        "serving": dataclasses.asdict(used) | {"total_bytes": used.total_bytes},
        "tokens_per_second": _tokens_per_second(model, asked),
    }


def _name(text: str, model: Model) -> str:
    if text.partition(":")[0] not in names():
        return f"{text}: {model.family}"
    found, size = parse(text)
    return f"{found.name}:{size}"


def _own(model: Model) -> Object:
    experts = None if model.moe is None else model.moe.experts
    top = None if model.moe is None else model.moe.most_active
    return {"length": model.max_length, "experts": experts, "experts_per_token": top}


def _model(text: str, place: Path) -> Model:
    if text.partition(":")[0] in names():
        return recipe(text)
    path = _below(text, place.resolve())
    found = model_at(path)
    if found is None:
        raise ConsiliumError(f"plan: {text} is no model; give a recipe, a folder, a .yaml or a .gguf file.")
    experts = 0 if found.moe is None else found.moe.experts
    if max(experts, found.mtp.depth) > MOST_EXPERTS:
        raise ConsiliumError(
            f"plan: {text} has more than {MOST_EXPERTS:,} experts a layer, or modules that predict further"
            " ahead, too many to be counted here."
        )
    return found


def _below(text: str, place: Path) -> Path:
    """A path that is there and does not lead out of ``place``."""
    try:
        path = (place / text).resolve()
        inside, there = path.is_relative_to(place), path.exists()
    except (OSError, ValueError, RuntimeError):
        return _unknown(text)
    if not inside:
        raise ConsiliumError(f"plan: {text} lies outside of the folder that this server was started in.")
    if not there:
        return _unknown(text)
    for name in ("config.yaml", "config.json"):
        _check_file(path / name if path.is_dir() else path, place)
    return path


def _unknown(text: str) -> Path:
    """Raises ConsiliumError: the catalogue says what is near."""
    if "/" not in text and "\0" not in text:
        recipe(text)
    raise ConsiliumError(f"plan: there is no {text[:200]!r} here; give a recipe, or a folder below this one.")


def _check_file(path: Path, place: Path) -> None:
    if not path.exists():
        return
    if not path.is_file() or not path.resolve().is_relative_to(place):
        raise ConsiliumError(f"plan: {path} is no ordinary file of this folder, so it is not read.")
    if path.suffix != ".gguf" and path.stat().st_size > LARGEST_FILE:
        raise ConsiliumError(
            f"plan: {path} has more than {LARGEST_FILE:,} bytes, too many for a configuration."
        )


def _changed(model: Model, asked: PlanRequest) -> Model:
    """With other numbers of experts, where asked for. Raises ConsiliumError where they do not fit."""
    moe = model.moe
    if moe is None:
        return model
    experts, top = asked.experts or moe.experts, asked.experts_per_token
    router = moe.router
    match router.select:
        case TopK() | Sinkhorn() | Hash() as select if top is not None:
            router = dataclasses.replace(router, select=dataclasses.replace(select, k=top))
        case _ if top not in {None, moe.most_active}:
            raise Refused(
                400, "this router has no fixed number of experts a token", param="experts_per_token"
            )
        case _:
            pass
    return dataclasses.replace(model, moe=dataclasses.replace(moe, experts=experts, router=router))


def _table(title: str, rows: Rows, note: str = "") -> Object:
    return {"title": title, "rows": rows, "note": note}


def _parameters(model: Model, found: Plan) -> Object:
    counts = found.parameters
    rows = [
        [say("total"), f"{counts.total:,} ({counted(counts.total)})"],
        [say("active a token"), f"{counts.active:,} ({counted(counts.active)})"],
        [say("active share"), f"{counts.active / counts.total:.1%}"],
    ]
    if model.moe is not None:
        rows.append([say("experts"), f"{model.moe.most_active} / {model.moe.experts}"])
    return _table(say("parameters"), rows)


def _arithmetic(found: Plan) -> Object:
    flops = found.flops_per_token
    rows = [
        [say("forward"), operations(flops.forward)],
        [say("training (3 x forward)"), operations(flops.training)],
        [say("training, float32 AdamW"), sized(found.training_bytes)],
    ]
    return _table(say("arithmetic a token, in sequences of {context:,}", context=flops.context), rows)


def _memory(used: Serving) -> Object:
    rows = [
        [say("weights, {dtype}", dtype=used.dtype), sized(used.weight_bytes)],
        [say("KV cache"), sized(used.cache_bytes)],
        [say("activations of one pass, about"), sized(used.activation_bytes)],
        [say("in all"), sized(used.total_bytes)],
    ]
    return _table(say("serving {batch:,} x {context:,} tokens", batch=used.batch, context=used.context), rows)


def _caches(model: Model) -> Object:
    rows = [
        [name, say("{bytes:,} B a token", bytes=BF16 * model.layers * width)]
        for name, width in _widths(model)
    ]
    note = say(
        "The other kinds keep the number and width of the heads; the latent of MLA is as wide as four heads,"
        " its shared key as half of one, the rule of DeepSeek-V2."
    )
    return _table(say("KV cache, bfloat16"), rows, note)


def _widths(model: Model) -> Iterator[tuple[str, int]]:
    """Cached values a token and layer: of this attention, then of the others with heads as wide."""
    match model.attention:
        case GQA(heads=heads, kv_heads=kv_heads, head_dim=width):
            key, value = width, width
            yield say("this model, {name}", name=_kind(heads, kv_heads)), model.attention.cache_width
        case MLA(heads=heads, nope_dim=nope, rope_dim=rope, v_dim=value):
            key, width, kv_heads = nope + rope, value, 0
            yield say("this model, {name}", name="MLA"), model.attention.cache_width
    if kv_heads != heads:
        yield "MHA", heads * (key + value)
    if heads > 8 and kv_heads != 8:
        yield say("GQA, {groups} groups", groups=8), 8 * (key + value)
    if kv_heads:
        yield "MLA", 4 * width + width // 2


def _kind(heads: int, kv_heads: int) -> str:
    return (
        "MHA"
        if heads == kv_heads
        else "MQA"
        if kv_heads == 1
        else say("GQA, {groups} groups", groups=kv_heads)
    )


def _communication(model: Model, moe: MoE, processes: int) -> Object:
    one = exchange.balanced(moe, 1, processes=processes)
    sent = exchange.exchange_bytes(moe, model.hidden_size, one, processes=processes, itemsize=BF16)
    layers = len(_decoder(model).moe_layers)
    there, back = layers * sent.dispatch, layers * sent.combine
    gradients = layers * (sent.dispatch_back + sent.combine_back)
    rows = [
        [say("to the experts"), say("{bytes:,} B a token", bytes=there)],
        [say("and back"), say("{bytes:,} B a token", bytes=back)],
        [say("gradients, in training"), say("{bytes:,} B a token", bytes=gradients)],
    ]
    note = say("Where every expert is as likely as every other; all layers, rows in bfloat16.")
    return _table(say("sent between {processes} processes", processes=processes), rows, note)


def _decoder(model: Model) -> Model:
    return dataclasses.replace(model, mtp=dataclasses.replace(model.mtp, depth=0))


def _resident(model: Model, used: Serving) -> str:
    if model.moe is None:
        return ""
    return say(
        "All {experts} experts of each layer have to be in memory, not only the {k} that a token uses: {size}"
        " in {dtype}.",
        experts=model.moe.experts,
        k=model.moe.most_active,
        size=sized(used.weight_bytes),
        dtype=used.dtype,
    )


def _speed(model: Model, asked: PlanRequest) -> Object:
    speed = _tokens_per_second(model, asked)
    rows = [
        [say("tokens/s, all sequences"), f"{speed:,.1f}"],
        [say("tokens/s, each sequence"), f"{speed / asked.batch:,.1f}"],
        [say("bytes read a step"), sized(_bytes_read(model, asked))],
    ]
    note = say(
        "At most: a step reads once the weights that its tokens use and their cache, at {speed:g} GB/s, and"
        " nothing else takes time.",
        speed=asked.gigabytes_per_second,
    )
    return _table(say("generating, by what memory allows"), rows, note)


def _tokens_per_second(model: Model, asked: PlanRequest) -> float:
    return asked.batch * asked.gigabytes_per_second * 1e9 / _bytes_read(model, asked)


def _bytes_read(model: Model, asked: PlanRequest) -> int:
    """By one step of decoding: of the experts those that any of its tokens chooses, were all as likely."""
    counts = plan.plan(model).parameters
    embedding = counts.active - counts.active_without_input_embedding
    read = float(counts.total - embedding)
    if (moe := model.moe) is not None:
        each = moe.matrices * moe.expert_size(model.hidden_size) * moe.width
        routed = each * moe.experts * len(_decoder(model).moe_layers)
        idle = (1 - min(moe.active_experts / moe.experts, 1.0)) ** asked.batch
        read -= routed * idle
    context = model.max_length if asked.context is None else asked.context
    bits = memory.BITS[asked.dtype]
    return round(read * bits / 8) + asked.batch * _cache_read(model, context) * max(bits, 16) // 8


def _cache_read(model: Model, context: int) -> int:
    """Values of the cache of one sequence: layers with a window leave out what is behind it."""
    values, window = kv.values_per_token(model), kv.windowed(model)
    if window is None:
        return values * context
    near = min(context, window.tokens)
    return values * near + window.kv_values_beyond * (context - near)
