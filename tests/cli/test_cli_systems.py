from __future__ import annotations

import json
from typing import Any

import pytest

from consilium.cli.main import main
from consilium.planner.parameters import parameters
from consilium.recipes.catalogue import find, names


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["systems", *words, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def test_the_list_names_every_size_of_every_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if ":" in line}
    assert listed == {f"{name}:{size}" for name in names() for size in find(name).sizes}


def test_the_list_as_json_has_shapes_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    data = answered(capsys)
    assert {one["name"] for one in data["systems"]} == set(names())
    for one in data["systems"]:
        recipe = find(one["name"])
        assert (one["year"], one["paper"]) == (recipe.year, recipe.paper)
        for size, shape in one["sizes"].items():
            model = recipe.sizes[size]
            counts = parameters(model)
            assert (shape["total"], shape["active"]) == (counts.total, counts.active)
            assert shape["experts"] == (model.moe.experts if model.moe else 0)
            assert shape["top_k"] == (model.moe.most_active if model.moe else 0)


@pytest.mark.parametrize("name", names())
def test_one_system_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = find(name)
    assert main(["systems", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{recipe.title} ({recipe.year}, {recipe.paper})\n")
    for sentence in (*recipe.choices, *recipe.deviations):
        assert f"  - {sentence}\n" in shown
    for facts in recipe.published.values():
        assert f"{facts.total} / {facts.active}" in shown
        assert facts.note in shown
    data = answered(capsys, name)
    assert data["choices"] == list(recipe.choices)
    assert data["deviations"] == list(recipe.deviations)
    assert set(data["published"]) == set(recipe.published)


def test_an_unknown_system_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems", "mixtrl"]) == 2
    assert "Did you mean 'mixtral'?" in capsys.readouterr().err
