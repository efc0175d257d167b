from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from consilium.cli.main import main
from consilium.config.attention import GQA
from consilium.config.io import to_data
from consilium.planner.laws import LAWS
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


def test_serving_costs_weights_cache_and_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    words = "deepseek-v2", "--context", "1000", "--batch", "3"
    half, quarter = planned(capsys, *words)["serving"], planned(capsys, *words, "--dtype", "int8")["serving"]
    assert half["cache_bytes"] == 3 * 1000 * plan(recipe("deepseek-v2")).kv_bytes_per_token
    assert quarter["cache_bytes"] == half["cache_bytes"]
    assert 2 * quarter["weight_bytes"] == half["weight_bytes"]
    assert half["total_bytes"] == half["weight_bytes"] + half["cache_bytes"] + half["activation_bytes"]
    twice = planned(capsys, *words[:-1], "6")["serving"]
    assert twice["activation_bytes"] == 2 * half["activation_bytes"]
    assert planned(capsys, *words, "--fit", "1G")["serving"]["fits"] is False
    assert "serving 3 x 1,000 tokens" in shown(capsys, *words)
    assert main(["plan", "llama:tiny", "--context", "1T"]) == 2
    assert "lower --context" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("80G", "80GiB"), ("24g", "24GiB"), ("512M", "512MiB")])
def test_a_letter_alone_is_a_power_of_1024(text: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        planned(capsys, "llama:tiny", "--fit", text)["fit"]
        == planned(capsys, "llama:tiny", "--fit", size)["fit"]
    )


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_what_fits_exactly_fits(spare: int, *, fits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = plan(recipe("llama:tiny"))
    fit = planned(capsys, "llama:tiny", "--fit", f"{model.weight_bytes + spare}B")["fit"]
    assert fit["weights"]["bfloat16"] is fits
    assert (
        planned(capsys, "llama:tiny", "--fit", f"{model.training_bytes + spare}B")["fit"]["training"] is fits
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


def test_a_window_is_told_with_what_is_read_behind_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = GQA(heads=32, kv_heads=8, head_dim=128, window=4096, full_layers=(0, 1))
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(to_data(dataclasses.replace(recipe("llama:7b"), attention=attention))))
    lines = shown(capsys, str(file))
    assert "KV cache, bfloat16 131,072 B a token (65,536 values)" in lines
    assert "behind a window of 4,096 in 30 layers 8,192 B a token are read, and all stay" in lines
    data = planned(capsys, str(file))
    assert data["window"] == {"tokens": 4096, "layers": 30, "kv_values_beyond": 4096}
    assert planned(capsys, "llama:7b")["window"] is None


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ("deepseek-v3", "recipes.deepseek_v3"),
        ("llama:7b --upcycle method=copy --upcycle experts=8 --upcycle top_k=2", "planner.upcycled"),
        ("llama:7b --upcycle method=mla --upcycle method.kv_rank=512", "planner.latent"),
    ],
)
def test_planning_imports_no_torch_and_no_other_recipe(words: str, own: str) -> None:
    code = (
        f"import sys; from consilium.cli.main import main; assert not main({['plan', *words.split()]});"
        "print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stderr.split())
    assert f"consilium.{own}" in imported
    # The values of --upcycle are read as YAML.
    heavy = {"torch", "numpy", "rich"} | (set() if "--upcycle" in words else {"yaml"})
    assert not (heavy | {"consilium.recipes.deepseek_v2", "consilium.planner.laws"}) & imported


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> set[str]:
    """Lines for people, with single spaces, none of them wide."""
    assert main(["plan", *words]) == 0
    text = capsys.readouterr().out
    assert all(line == line.rstrip() and len(line) < 100 for line in text.splitlines())
    return {" ".join(line.split()) for line in text.splitlines()}


def test_all_laws_are_asked_about_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    data = planned(capsys, "deepseek-v2", "--law", "--tokens", "8.1T")
    assert data["parameters"]["total"] == plan(recipe("deepseek-v2")).parameters.total
    assert [one["law"] for one in data["laws"]["predictions"]] == [law.name for law in LAWS]
    clark = data["laws"]["predictions"][0]
    assert clark["loss"] < clark["dense_loss"]
    assert clark["dense_equivalent"] > clark["parameters"]
    lines = shown(capsys, "deepseek-v2", "--law", "--tokens", "8.1T")
    loss, dense = f"{clark['loss']:.3f}", f"{clark['dense_loss']:.3f}"
    assert any(line.startswith(f"clark:s-base 20.33 B {loss} {dense}") for line in lines)
    assert any("not between laws" in line for line in lines)


def test_a_law_without_tokens_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "mixtral", "--law", "joint")["laws"]["unanswered"] == {"joint": "needs --tokens"}
    assert "joint needs --tokens" in shown(capsys, "mixtral", "--law", "joint")


def test_the_quoted_slope_can_be_asked_for_and_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--law", "clark:s-base", "--params", "21B", "--experts", "8"
    (found,) = planned(capsys, *words)["laws"]["predictions"]
    assert round(found["raw_slopes"]["parameters"], 4) == -0.0739
    assert round(found["raw_slopes"]["experts"], 4) == -0.0151
    lines = shown(capsys, *words)
    assert "clark:s-base -0.0736 -0.0133 -0.0739 -0.0151" in lines
    assert any("articles quote -0.025" in line for line in lines)


def test_two_models_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    ratio = planned(capsys, "deepseek-v2", "--against", "llama:7b")["against"]["ratio"]
    assert ratio["kv_values"] == 34_560 / 262_144
    assert ratio["kv_bytes_by_bits"]["8"] == ratio["kv_values"] / 2
    assert ratio["forward"] > 1
    lines = shown(capsys, "deepseek-v2", "--against", "llama:7b")
    assert "cached values a token 34,560 262,144 86.8 %" in lines


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "required: MODEL, or --law"),
        (["--law", "--experts", "8"], "needs --params N beside it"),
        (["--law", "deepseek-v2"], "MODEL comes first: consilium plan deepseek-v2 --law"),
        (["mixtral", "--law", "clarc"], "Did you mean 'clark'?"),
        (["mixtral", "--law", "--params", "1B"], "leave out MODEL"),
        (["--experts", "8"], "required: MODEL, or --law"),
        (["--law", "clark", "--params", "1B", "--fit", "1GiB"], "--fit and --against need a MODEL"),
        (["mixtral", "--against", "mixtrall"], "Did you mean 'mixtral'?"),
    ],
)
def test_questions_that_make_no_sense(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.count("\n") == 1


def test_without_anything_the_laws_are_asked_what_articles_quote(capsys: pytest.CaptureFixture[str]) -> None:
    """N = 21e9 and E = 8: -0.0739 and -0.0151, not -0.025."""
    laws = planned(capsys, "--law")["laws"]
    assert (laws["active"], laws["experts"]) == (21e9, 8.0)
    (base,) = (one for one in laws["predictions"] if one["law"] == "clark:s-base")
    slopes = base["raw_slopes"]
    assert (round(slopes["parameters"], 4), round(slopes["experts"], 4)) == (-0.0739, -0.0151)
    assert main(["plan", "--law"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("no MODEL and no --params: the N and E that articles quote\n")
    assert "chinchilla" in shown
    assert "kaplan" in shown
