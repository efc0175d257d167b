from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from consilium.cli.main import main
from consilium.planner.plan import plan
from consilium.recipes.catalogue import find, names, recipe

MODELS = [f"{name}:{size}" for name in names() for size in find(name).sizes]


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


@pytest.mark.parametrize("name", MODELS)
def test_json_has_the_keys_that_scripts_rely_on(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = planned(capsys, name)
    expected = plan(recipe(name))
    assert data["parameters"]["total"] == expected.parameters.total
    assert data["parameters"]["active"] == expected.parameters.active
    without = expected.parameters.active_without_input_embedding
    assert data["parameters"]["active_without_input_embedding"] == without
    assert data["kv_bytes_per_token"] == expected.kv_bytes_per_token
    assert data["flops_per_token"]["forward"] == expected.flops_per_token.forward
    assert data["flops_per_token"]["training"] == expected.flops_per_token.training
    assert data["weight_bytes"] == expected.weight_bytes
    assert "fit" not in data
    assert "training" not in data


def test_without_a_size_the_largest_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "deepseek-v3")["parameters"]["total"] == 671_026_404_352


def test_training_costs_tokens_times_flops(capsys: pytest.CaptureFixture[str]) -> None:
    data = planned(capsys, "deepseek-v2", "--tokens", "8.1T")
    flops = data["flops_per_token"]["training"]
    assert data["training"] == {"tokens": 8_100_000_000_000, "flops": 8_100_000_000_000 * flops}


def test_fit_says_what_fits_and_how_much_cache_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    data = planned(capsys, "mixtral", "--fit", "80GiB")
    assert data["fit"]["weights"] == {"float32": False, "bfloat16": False, "int8": False, "int4": True}
    left = 80 * 2**30 - data["weight_bytes_by_dtype"]["int4"]
    assert data["fit"]["cached_tokens"]["int4"] == left // data["kv_bytes_per_token"]
    assert data["fit"]["cached_tokens"]["int8"] == 0
    assert data["fit"]["training"] is False


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_what_fits_exactly_fits(spare: int, *, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = plan(recipe("llama:tiny"))
    fit = planned(capsys, "llama:tiny", "--fit", str(model.weight_bytes + spare))["fit"]
    assert fit["weights"]["bfloat16"] is fits
    assert (
        planned(capsys, "llama:tiny", "--fit", str(model.training_bytes + spare))["fit"]["training"] is fits
    )


def test_the_table_for_people_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "deepseek-v3", "--fit", "24GiB", "--tokens", "14.8T"]) == 0
    shown = capsys.readouterr().out
    lines = {" ".join(line.split()) for line in shown.splitlines()}
    assert {
        "deepseek-v3:671b",
        "total 671,026,404,352 671.0 B",
        "active a token 37,552,282,624 37.55 B",
        "selection biases, not parameters 14,848 14.85 k",
        "KV cache, bfloat16 70,272 B a token (35,136 values)",
        "fits into 24.00 GiB?",
        "training on 14.80 T tokens",
    } <= lines
    assert all(line == line.rstrip() and len(line) < 100 for line in shown.splitlines())


def test_a_dense_model_has_no_lines_about_experts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama:7b"]) == 0
    shown = capsys.readouterr().out
    assert "bias" not in shown
    assert "prediction" not in shown


def test_planning_imports_no_torch_and_no_other_recipe() -> None:
    code = (
        "import sys; from consilium.cli.main import main; main(['plan', 'deepseek-v3']);"
        "print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stderr.split())
    assert "consilium.recipes.deepseek_v3" in imported
    assert not {"torch", "numpy", "rich", "yaml", "consilium.recipes.deepseek_v2"} & imported
