"""Sources and results in 16 bits, gates that a narrow dtype still tells apart, weights beyond its range."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.checkpoint import store
from consilium.checkpoint.convert import convert
from consilium.cli.main import main
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.evaluation.walk import Passage, importances, walk
from consilium.model.types import Inputs
from consilium.records.io import read_json
from consilium.records.upcycling import NAME, Lineage
from consilium.upcycling.rounding import raised
from consilium.upcycling.run import upcycle
from small import lively
from support import relative_error
from upcycling.sources import LLAMA, saved, text

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
GATE = "layers.0.moe.router.projection.weight"


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(8, 4096), st.floats(-9, 3), st.integers(0, 2**20))
def test_rows_that_float16_would_flatten_are_raised_all_alike(
    experts: int, size: int, exponent: float, seed: int
) -> None:
    rows_ED = 10**exponent * torch.randn(experts, size, generator=torch.Generator().manual_seed(seed))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(raised(rows_ED, dtype), rows_ED), "their steps next to zero are no matter"
    found_ED = raised(rows_ED, torch.float16)
    factor = float((found_ED.norm() / rows_ED.norm()).double())
    assert factor > 1 - 1e-6
    assert relative_error(found_ED, rows_ED * factor) < 1e-6, "directions and order stay"
    assert relative_error(found_ED.half(), found_ED) < 8e-3, "as fine as bfloat16"
    assert factor < 1 + 1e-6 or float(found_ED.square().mean().sqrt()) < 4e-6, "and no larger than it must"


@pytest.mark.parametrize("options", [{"method": "copy", "top_k": 1}, {"method": "split-random", "top_k": 8}])
def test_a_gate_in_float16_keeps_its_rows_apart(options: dict[str, Any], tmp_path: Path) -> None:
    """Norms of 30, as trained models have some, make a gate of equal weights so small that all rows are 0."""
    wide = dataclasses.replace(LLAMA, hidden_size=256, layers=1)
    model = lively(wide, seed=1)
    with torch.no_grad():
        model.layers[0].feed_forward_norm.weight.fill_(30.0)
    store.save(model.half(), tmp_path / "dense", tokenizer=Tokenizer.of_bytes())
    made = upcycle(tmp_path / "dense", tmp_path / "moe", experts=8, data=text(tmp_path / "a.txt"), **options)
    gate_ED = store.load(tmp_path / "moe").state_dict()[GATE]
    assert gate_ED.dtype == torch.float16
    assert len(gate_ED.unique()) > 100
    assert made.kept
    assert made.relative < 2e-3
    if options["top_k"] == 1:
        assert max(made.layers[0].load) < 1.35 * sum(made.layers[0].load) / 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_doubles_of_an_expert_have_rows_of_their_own(dtype: str, tmp_path: Path) -> None:
    moe = MoE(experts=4, width=16, router=Router(select=TopK(k=2)))
    saved(dataclasses.replace(LLAMA, family="mixtral", moe=moe), tmp_path / "sparse", dtype=dtype)
    upcycle(
        tmp_path / "sparse",
        tmp_path / "more",
        method="expand",
        experts=8,
        top_k=4,
        data=text(tmp_path / "a.txt"),
    )
    rows_ED = store.load(tmp_path / "more").state_dict()[GATE].float()
    apart_ED = (rows_ED[4:] - rows_ED[:4]).abs()
    assert float((apart_ED > 0).float().mean()) > 0.3
    assert relative_error(rows_ED[4:], rows_ED[:4]) < 1e-2


@pytest.mark.parametrize(
    "method",
    [
        ["--method", "virtual-group", "--granularity", "8", "--experts", "8", "--top-k", "8"],
        ["--method", "split-random", "--experts", "16", "--top-k", "1", "--set", "scale=ratio"],
    ],
)
def test_weights_beyond_float16_are_told_and_nothing_is_left(
    method: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Factors of 64 and 256."""
    folder = tmp_path / "in"
    model = lively(LLAMA, seed=1)
    with torch.no_grad():
        model.layers[1].feed_forward.down.weight[3, 5] = 2000.0
    store.save(model.half(), folder / "dense", tokenizer=Tokenizer.of_bytes())
    asked = [*method, "--data", str(text(folder / "a.txt")), "--set", "calibration_tokens=1100"]
    assert main(["upcycle", str(folder / "dense"), str(tmp_path / "out"), *asked]) == 2
    told = capsys.readouterr()
    assert "layers.1.moe.experts.down goes beyond 65504, where float16 ends" in told.err
    announced, error = told.err.splitlines()
    assert "the new model takes" in announced
    assert error.startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(folder / "dense"), str(folder / "wide"), "--dtype", "bfloat16"]) == 0
    assert main(["upcycle", str(folder / "wide"), str(tmp_path / "out"), *asked]) != 2
    assert all(bool(v.isfinite().all()) for v in store.load(tmp_path / "out").state_dict().values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_asked_for_is_that_of_a_source_converted_before(dtype: str, tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "narrow", dtype=dtype)
    options: dict[str, Any] = {"method": "copy", "experts": 4, "top_k": 2, "data": text(tmp_path / "a.txt")}
    made = upcycle(tmp_path / "dense", tmp_path / "one", dtype=dtype, **options)
    upcycle(tmp_path / "narrow", tmp_path / "two", **options)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert made.promise == 1e-5, "both sides of the certificate are in the dtype that is written"
    assert made.kept
    lineage = read_json(Lineage, tmp_path / "one" / NAME)
    assert (lineage.dtype, lineage.device) == (dtype, "cpu")
    assert lineage.source_sha256 == _lineage_of_float32(tmp_path, options).source_sha256


def _lineage_of_float32(folder: Path, options: dict[str, Any]) -> Lineage:
    upcycle(folder / "dense", folder / "wide", **options)
    return read_json(Lineage, folder / "wide" / NAME)


def test_a_wider_dtype_keeps_the_promise_of_its_source(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "dense", dtype="bfloat16")
    options: dict[str, Any] = {"method": "copy", "experts": 3, "top_k": 2, "data": text(tmp_path / "a.txt")}
    made = upcycle(tmp_path / "dense", tmp_path / "moe", dtype="float32", **options)
    assert store.load(tmp_path / "moe").state_dict()[GATE].dtype == torch.float32
    assert made.promise == 1e-5
    assert made.kept


def test_a_lineage_of_before_dtypes_is_read(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "dense")
    upcycle(
        tmp_path / "dense", tmp_path / "moe", method="copy", experts=2, top_k=1, data=text(tmp_path / "a.txt")
    )
    found = json.loads((tmp_path / "moe" / NAME).read_text())
    assert (found.pop("dtype"), found.pop("device")) == (None, "cpu")
    (tmp_path / "moe" / NAME).write_text(json.dumps(found))
    assert read_json(Lineage, tmp_path / "moe" / NAME).device == "cpu"


@pytest.mark.parametrize(
    "verb", [["convert"], ["upcycle", *["--method", "copy", "--experts", "2", "--top-k", "1"]]]
)
def test_what_a_narrower_dtype_cannot_hold_is_told_and_nothing_is_left(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lively(LLAMA, seed=1)
    with torch.no_grad():
        model.embed.weight[3, 5] = 1e5
    store.save(model, tmp_path / "dense", tokenizer=Tokenizer.of_bytes())
    data = ["--data", str(text(tmp_path / "a.txt"))] if verb[0] == "upcycle" else []
    asked = [*verb, str(tmp_path / "dense"), str(tmp_path / "out"), *data]
    assert main([*asked, "--dtype", "float16"]) == 2
    told = capsys.readouterr().err
    assert "model.embed_tokens.weight goes beyond 65504, where float16 ends; give --dtype bfloat16" in told
    assert not (tmp_path / "out").exists()
    assert main([*asked, "--dtype", "bfloat16"]) == 0


def test_a_device_that_is_not_here_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    saved(LLAMA, tmp_path / "dense")
    asked = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "out")]
    options = ["--method", "copy", "--experts", "2", "--top-k", "1", "--device", "cuda"]
    assert main([*asked, *options]) == 2
    assert "device cuda is not here" in capsys.readouterr().err
    with pytest.raises(ConsiliumError, match="device cuda is not here"):
        upcycle(tmp_path / "dense", tmp_path / "out", method="copy", experts=2, top_k=1, device="cuda")
    assert not (tmp_path / "out").exists()


def test_a_walk_is_where_its_text_is(tmp_path: Path) -> None:
    """On the meta device a constant that was made for another one raises."""
    saved(LLAMA, tmp_path / "dense")
    source = store.open_folder(tmp_path / "dense")
    ids_BS = torch.zeros(2, 9, dtype=torch.int64)
    passage = Passage(Inputs(ids_BS), ids_BS, 18).to("meta")
    before: dict[int, tuple[torch.Tensor, ...]] = {}
    for seen in walk(source, [passage]):
        before[seen.layer], before[LLAMA.layers] = seen.before, seen.after
        assert {x_BSD.device.type for x_BSD in (*seen.normed, *seen.fed, *seen.after)} == {"meta"}
    for _, importance_TF in importances(source, [passage], before):
        assert importance_TF.is_meta


@needs_cuda
@pytest.mark.parametrize("method", ["copy", "split-inner", "split-cluster", "carve", "mla"])
def test_on_a_device_it_is_what_it_is_here(method: str, tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "dense")
    sizes: dict[str, Any] = {} if method == "mla" else {"experts": 4, "top_k": 4}
    options: dict[str, Any] = {"method": method, "data": text(tmp_path / "a.txt"), **sizes}
    here = upcycle(tmp_path / "dense", tmp_path / "here", **options)
    there = upcycle(tmp_path / "dense", tmp_path / "there", device="cuda", **options)
    assert there.promise == here.promise
    assert there.kept
    assert there.bits_per_byte_before == pytest.approx(here.bits_per_byte_before, rel=1e-4)
