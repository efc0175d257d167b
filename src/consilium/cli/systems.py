"""``consilium systems``: the published systems, and the choices of one."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import json_flag
from consilium.cli.table import columns, counted
from consilium.config.model import Model
from consilium.planner.parameters import parameters
from consilium.recipes import catalogue
from consilium.recipes.recipe import Recipe


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="explain this system (without: list all)")
    json_flag(parser)


def run(options: Namespace) -> int:
    if options.name is not None:
        found = catalogue.find(options.name)
        print(json.dumps(_details(found), indent=2) if options.json else _explanation(found))
    elif options.json:
        print(json.dumps({"systems": [_data(found) for found in catalogue.systems()]}, indent=2))
    else:
        print(_listing(catalogue.systems()))
    return 0


def _data(found: Recipe) -> dict[str, object]:
    return {
        "name": found.name,
        "title": found.title,
        "year": found.year,
        "paper": found.paper,
        "sizes": {size: _shape(model) for size, model in found.sizes.items()},
    }


def _details(found: Recipe) -> dict[str, object]:
    published = {
        size: {"total": facts.total, "active": facts.active, "note": facts.note}
        for size, facts in found.published.items()
    }
    words = {"choices": list(found.choices), "deviations": list(found.deviations)}
    return {**_data(found), "published": published, **words}


def _shape(model: Model) -> dict[str, int]:
    counts = parameters(model)
    return {
        "layers": model.layers,
        "hidden_size": model.hidden_size,
        "experts": model.moe.experts if model.moe else 0,
        "top_k": model.moe.most_active if model.moe else 0,
        "total": counts.total,
        "active": counts.active,
    }


_HEADINGS = ("layers", "hidden", "experts", "top-k", "total", "active")


def _listing(found: tuple[Recipe, ...]) -> str:
    rows: list[tuple[str, ...]] = [("model", "year", "paper", *_HEADINGS)]
    for one in found:
        for size, model in one.sizes.items():
            rows.append((f"{one.name}:{size}", str(one.year), one.paper, *_cells(_shape(model))))
    return columns(rows, right=range(3, 9)) + "\n\nconsilium systems NAME explains one."


def _cells(shape: dict[str, int]) -> tuple[str, ...]:
    experts = str(shape["experts"] or "-"), str(shape["top_k"] or "-")
    return str(shape["layers"]), str(shape["hidden_size"]), *experts, *map(counted, _totals(shape))


def _totals(shape: dict[str, int]) -> tuple[int, int]:
    return shape["total"], shape["active"]


def _explanation(found: Recipe) -> str:
    rows: list[tuple[str, ...]] = [("size", *_HEADINGS, "published total / active")]
    for size, model in found.sizes.items():
        facts = found.published.get(size)
        rows.append((size, *_cells(_shape(model)), f"{facts.total} / {facts.active}" if facts else "-"))
    notes = [f"{size}: {facts.note}" for size, facts in found.published.items() if facts.note]
    parts = [f"{found.title} ({found.year}, {found.paper})", columns(rows, right=range(1, 7))]
    parts += [_list("choices", found.choices), _list("where code or this recipe differs", found.deviations)]
    parts.append(_list("published counts", notes))
    return "\n\n".join(part for part in parts if part)


def _list(title: str, lines: tuple[str, ...] | list[str]) -> str:
    return "\n".join([title, *(f"  - {line}" for line in lines)]) if lines else ""
