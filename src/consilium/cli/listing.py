"""What ``consilium systems`` shows: the published systems, and one of them explained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from consilium.config.model import Model
from consilium.planner.facts import BF16_BYTES, causality, shape_text, shared_experts
from consilium.planner.kv import values_per_token
from consilium.planner.parameters import parameters
from consilium.planner.shapes import parts
from consilium.recipes.recipe import LEGEND, Recipe
from consilium.report.plain import columns, counted
from consilium.words.say import say


def system_data(found: Recipe) -> dict[str, object]:
    return {
        "name": found.name,
        "title": found.title,
        "year": found.year,
        "paper": found.paper,
        "sizes": {size: _shape(model) for size, model in found.sizes.items()},
    }


def _shape(model: Model) -> dict[str, object]:
    moe, counts, values = model.moe, parameters(model), values_per_token(model)
    return {
        "layers": model.layers,
        "hidden_size": model.hidden_size,
        "experts": moe.experts if moe else 0,
        "top_k": moe.most_active if moe else 0,
        "active_experts": moe.active_experts if moe else 0,
        "shared": shared_experts(moe),
        "causal": moe is None or moe.causal,
        "causal_in_training": moe is None or moe.causal_in_training,
        **dataclasses.asdict(counts),
        "kv_values_per_token": values,
        "kv_bytes_per_token": BF16_BYTES * values,
    }


def system_details(found: Recipe) -> dict[str, object]:
    known = found.hugging_face
    return {
        **system_data(found),
        "published": {size: dataclasses.asdict(facts) for size, facts in found.published.items()},
        "choices": list(found.choices),
        "equations": list(found.equations),
        "deviations": list(found.deviations),
        "hugging_face": known and {"model_type": known.model_type, "architecture": known.architecture},
        "tensors": {
            size: {part.name: dict(part.tensors) for part in parts(model)}
            for size, model in found.sizes.items()
        },
    }


def _headings() -> tuple[str, ...]:
    names = (say("layers"), say("hidden"), say("experts"), "top-k", say("shared"))
    return *names, say("total"), say("active")


def _causal(model: Model) -> str:
    words = {"yes": say("yes"), "no": say("no"), "not in training": say("not in training")}
    return words[causality(model.moe)]


def _cells(model: Model) -> tuple[str, ...]:
    moe, counts = model.moe, parameters(model)
    sparse = (moe.experts, moe.active_experts, shared_experts(moe)) if moe else (0, 0, 0)
    numbers = (f"{number:g}" if number else "-" for number in (model.layers, model.hidden_size, *sparse))
    return *numbers, counted(counts.total), counted(counts.active)


def listing(found: Iterable[Recipe]) -> str:
    rows: list[tuple[str, ...]] = [(say("model"), say("year"), say("paper"), *_headings(), say("causal"))]
    for one in found:
        for size, model in one.sizes.items():
            facts = (f"{one.name}:{size}", str(one.year), one.paper)
            rows.append((*facts, *_cells(model), _causal(model)))
    return columns(rows, right=range(3, 10)) + f"\n\n{say('consilium systems NAME explains one.')}"


def explanation(found: Recipe, size: str) -> str:
    notes = [f"{named}: {facts.note}" for named, facts in found.published.items() if facts.note]
    sections = [
        f"{found.title} ({found.year}, {found.paper})",
        _sizes(found),
        _list(say("choices"), found.choices),
        _list(say("equations ({legend})", legend=LEGEND), found.equations),
        _counts(f"{found.name}:{size}", found.sizes[size]),
        _tensors(f"{found.name}:{size}", found.sizes[size]),
        _list(say("published counts"), notes),
        _list(say("where code or this recipe differs"), found.deviations),
    ]
    return "\n\n".join(section for section in sections if section)


def _sizes(found: Recipe) -> str:
    rows: list[tuple[str, ...]] = [(say("size"), *_headings(), say("published total / active"))]
    for size, model in found.sizes.items():
        facts = found.published.get(size)
        rows.append((size, *_cells(model), f"{facts.total} / {facts.active or '-'}" if facts else "-"))
    return columns(rows, right=range(1, 8))


def _counts(name: str, model: Model) -> str:
    counts, values = parameters(model), values_per_token(model)
    rows = [
        (say("total"), f"{counts.total:,}"),
        (say("active a token"), f"{counts.active:,}"),
        (say("active without input embedding"), f"{counts.active_without_input_embedding:,}"),
        (say("multi-token prediction, not in these"), f"{counts.mtp:,}"),
        (say("selection biases and coefficients, not parameters"), f"{counts.buffers:,}"),
        (say("KV cache, bytes a token in bfloat16"), f"{BF16_BYTES * values:,}"),
    ]
    shown = [row for row in rows if row[1] != "0"]
    causal = (say("routing is causal"), _causal(model))
    return say("counts of {name}", name=name) + "\n" + columns([*shown, causal], right=(1,), indent="  ")


def _tensors(name: str, model: Model) -> str:
    rows: list[tuple[str, ...]] = []
    for part in parts(model):
        names = [part.name] + [""] * (len(part.tensors) - 1)
        rows += [
            (here, key, shape_text(shape)) for here, (key, shape) in zip(names, part.tensors, strict=True)
        ]
    return say("tensors of {name}", name=name) + "\n" + columns(rows, indent="  ")


def _list(title: str, lines: Iterable[str]) -> str:
    listed = [f"  - {line}" for line in lines]
    return "\n".join([title, *listed]) if listed else ""
