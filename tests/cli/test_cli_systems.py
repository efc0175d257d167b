from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from consilium.cli.main import main
from consilium.config.model import Model
from consilium.planner.kv import values_per_token
from consilium.planner.parameters import parameters
from consilium.planner.shapes import shapes
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
            assert shape["active_without_input_embedding"] == counts.active_without_input_embedding
            assert shape["kv_bytes_per_token"] == 2 * values_per_token(model)


@pytest.mark.parametrize("name", names())
def test_one_system_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = find(name)
    assert main(["systems", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{recipe.title} ({recipe.year}, {recipe.paper})\n")
    for sentence in (*recipe.choices, *recipe.equations, *recipe.deviations):
        assert f"  - {sentence}\n" in shown
    for facts in recipe.published.values():
        assert f"{facts.total} / {facts.active or '-'}" in shown
        assert facts.note in shown
    for key, shape in shapes(recipe.model()):
        if key.startswith("layers.0."):
            assert re.search(
                rf" {re.escape(key.removeprefix('layers.0.'))} +{re.escape(str(list(shape)))}", shown
            )
    assert f"{parameters(recipe.model()).total:,}" in shown


@pytest.mark.parametrize("name", names())
def test_one_system_as_json_has_all_that_its_recipe_has(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = find(name)
    data = answered(capsys, name)
    assert data["choices"] == list(recipe.choices)
    assert data["equations"] == list(recipe.equations)
    assert data["deviations"] == list(recipe.deviations)
    assert {size: one["total"] for size, one in data["published"].items()} == {
        size: facts.total for size, facts in recipe.published.items()
    }
    for size, model in recipe.sizes.items():
        parts = data["tensors"][size]
        ends = {key: tuple(shape) for key, shape in parts["model"].items()}
        assert ends == ends_of(model)
        assert len(parts) >= 2


def ends_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes(model) if not key.startswith(("layers.", "mtp."))}


def test_a_size_of_a_system_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems", "deepseek-v3:tiny"]) == 0
    shown = capsys.readouterr().out
    assert "tensors of deepseek-v3:tiny" in shown
    assert "[32, 128, 192]" in shown
    assert "multi-token prediction" in shown


def test_the_list_marks_what_is_not_causal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems"]) == 0
    marks = {
        line.split()[0]: re.split(r" {2,}", line)[-1]
        for line in capsys.readouterr().out.splitlines()
        if ":" in line
    }
    assert marks["expert-choice:8b-64e"] == "no"
    assert marks["gshard:600b"] == marks["deepseek-v2:236b"] == "not in training"
    assert marks["deepseek-v3:671b"] == marks["llama:7b"] == "yes"


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; from consilium.cli.main import main; main(['systems']);"
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_system_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems", "mixtrl"]) == 2
    assert "Did you mean 'mixtral'?" in capsys.readouterr().err
    assert main(["systems", "mixtral:8x7"]) == 2
    assert "mixtral has no size '8x7'. Did you mean '8x7b'?" in capsys.readouterr().err
