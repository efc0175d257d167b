"""The folders open where there is an architecture for them, in transformers with the same logits."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium.checkpoint import store
from consilium.checkpoint.folders import checkpoint_in
from consilium.cli.main import main
from consilium.config.model import Model
from consilium.config.router import Jitter
from consilium.config.upcycling import Qwen, VirtualGroup
from consilium.upcycling.run import upcycle
from support import relative_error
from upcycling.sources import LLAMA, MISTRAL, QWEN2, QWEN3, saved, text

LAYOUTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "copies of llama": (LLAMA, {"method": "copy", "experts": 4, "top_k": 2}, "mixtral"),
    "a split of llama": (LLAMA, {"method": "split-random", "experts": 4, "top_k": 2}, "mixtral"),
    "groups, normalised": (
        LLAMA,
        {"method": VirtualGroup(granularity=2, weights="normalised"), "experts": 2, "top_k": 2},
        "mixtral",
    ),
    "qwen": (LLAMA, {"method": Qwen(granularity=2), "experts": 2, "top_k": 2}, "qwen2_moe"),
    "copies beside the whole": (
        LLAMA,
        {"method": "copy", "experts": 2, "top_k": 2, "shared": 1},
        "qwen2_moe",
    ),
    "copies of qwen3": (QWEN3, {"method": "drop", "experts": 4, "top_k": 2}, "qwen3_moe"),
    "copies of mistral behind its window": (MISTRAL, {"method": "copy", "experts": 4, "top_k": 2}, "mixtral"),
    "a split of mistral behind its window": (
        MISTRAL,
        {"method": "split-graph", "experts": 4, "top_k": 2},
        "mixtral",
    ),
    "qwen of a tied qwen2": (QWEN2, {"method": Qwen(granularity=2), "experts": 2, "top_k": 2}, "qwen2_moe"),
    "copies of qwen2, without a shared one": (
        QWEN2,
        {"method": "copy", "experts": 4, "top_k": 2},
        "consilium",
    ),
    "groups, raw": (
        LLAMA,
        {"method": VirtualGroup(granularity=2), "experts": 2, "top_k": 2},
        "deepseek",
    ),
    "standardised": (
        LLAMA,
        {"method": "copy", "experts": 2, "top_k": 2, "gate": "standardised"},
        "skywork_moe",
    ),
}
NATIVE = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("spread", [{}, {"spread": 0.7}], ids=["as it begins", "far apart"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_result_has_the_layout_of_the_architecture_that_computes_it(
    name: str, spread: dict[str, float], tmp_path: Path
) -> None:
    config, options, kind = LAYOUTS[name]
    saved(config, tmp_path / "dense")
    assert kind_in(tmp_path / "dense") == config.family
    upcycle(tmp_path / "dense", tmp_path / "moe", data=text(tmp_path / "a.txt"), **options, **spread)
    assert kind_in(tmp_path / "moe") == kind
    made = store.load(tmp_path / "moe").config
    assert (made.attention, made.tied) == (config.attention, config.tied)
    if kind not in NATIVE:
        return
    library = pytest.importorskip("transformers", reason="the oracle is transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = library.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    # So many that scores which tie in float32 would be among them.
    ids_BS = torch.randint(0, 259, (4, 200), generator=torch.Generator().manual_seed(0))
    ours = store.load(tmp_path / "moe").eval()
    with torch.no_grad():
        assert relative_error(ours(ids_BS).logits, theirs(ids_BS).logits) < 1e-5


def kind_in(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (LLAMA, {}),
        (LLAMA, {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}),
        (MISTRAL, {}),
        (QWEN2, {}),
        (QWEN3, {}),
    ],
    ids=["llama", "mistral without a window", "mistral", "qwen2", "qwen3"],
)
def test_a_folder_that_others_wrote_gives_what_ours_gives(
    config: Model, keys: dict[str, Any], tmp_path: Path
) -> None:
    saved(config, tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    told = json.loads((tmp_path / "ours/config.json").read_text()) | keys
    del told["consilium"]
    (tmp_path / "theirs/config.json").write_text(json.dumps(told))
    (tmp_path / "theirs/manifest.json").unlink()
    options: dict[str, Any] = {"data": text(tmp_path / "a.txt"), "method": "carve", "experts": 4, "top_k": 2}
    ours = upcycle(tmp_path / "ours", tmp_path / "one", **options)
    assert upcycle(tmp_path / "theirs", tmp_path / "two", **options) == ours
    one, two = (tmp_path / name for name in ("one", "two"))
    assert kind_in(one) == kind_in(two)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_result_is_exported_for_llama_cpp_and_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(LLAMA, tmp_path / "dense")
    upcycle(
        tmp_path / "dense",
        tmp_path / "moe",
        method="copy",
        experts=2,
        top_k=2,
        data=text(tmp_path / "a.txt"),
    )
    assert main(["convert", str(tmp_path / "moe"), str(tmp_path / "moe.gguf"), "--to", "gguf"]) == 0
    words = ["--data", str(tmp_path / "a.txt"), "--steps", "3", "--batch", "2", "--seq", "32"]
    words += ["--threads", "1", "--set", "eval_tokens=64"]
    run = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "moe.gguf"), "--out", run, *words]) == 0
    assert main(["generate", run, "--prompt", "line", "--max-tokens", "4"]) == 0
    capsys.readouterr()


def test_a_result_is_trained_with_noise_in_its_routers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(LLAMA, tmp_path / "dense")
    words = ["--data", str(text(tmp_path / "a.txt")), "--steps", "2", "--batch", "2", "--seq", "32"]
    words += ["--threads", "1", "--set", "eval_tokens=64"]
    upcycle(tmp_path / "dense", tmp_path / "moe", method="copy", experts=2, top_k=1, data=words[1])
    noise = ["--set", "model.moe.router.noise.epsilon=0.1", "--set", "model.moe.router.noise.kind=jitter"]
    for name, more in (("plain", []), ("noisy", noise)):
        assert main(["train", str(tmp_path / "moe"), "--out", str(tmp_path / name), *words, *more]) == 0
    plain, noisy = (store.load(checkpoint_in(tmp_path / name)) for name in ("plain", "noisy"))
    assert noisy.config.moe is not None
    assert noisy.config.moe.router.noise == Jitter(epsilon=0.1)
    assert kind_in(checkpoint_in(tmp_path / "noisy")) == kind_in(tmp_path / "moe")
    gate = "layers.0.moe.router.projection.weight"
    assert not torch.equal(noisy.state_dict()[gate], plain.state_dict()[gate])
    refused = ["--set", "model.moe.router.noise.kind=learned", "--out", str(tmp_path / "learned")]
    assert main(["train", str(tmp_path / "moe"), *words, *refused]) == 2
    assert "has no weight layers.0.moe.router.noise.weight" in capsys.readouterr().err
