"""bench/upcycle.py and bench/real_upcycling.py try every method, and docs/generate_upcycle.py shows all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from consilium.checkpoint import store
from consilium.config.attention import GQA, MLA
from consilium.config.data import Data, TextPath
from consilium.config.training import Bytes
from consilium.data.corpus import build_corpus
from consilium.model.build import build
from consilium.planner.parameters import parameters
from consilium.records.io import read_json
from consilium.records.upcycling import NAME, Lineage
from house.scripts import loaded
from upcycling.sources import LLAMA, saved, text


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with loaded("bench/upcycle.py") as module:
        yield module


@pytest.fixture(scope="module")
def docs() -> Iterator[ModuleType]:
    with loaded("docs/generate_upcycle.py") as module:
        yield module


def test_the_pages_show_what_the_studies_try(bench: ModuleType, docs: ModuleType) -> None:
    assert set(docs.NAMES) == set(bench.STUDY.names)
    with loaded("bench/real_upcycling.py") as real:
        assert set(docs.REAL_NAMES) == set(real.STUDY.names)
    claimed = {name for claim in docs.claims() for name in (claim.left, claim.right)}
    assert claimed <= set(docs.NAMES)
    count = parameters(bench.DENSE)
    assert 3e6 < count.total - 2 * bench.DENSE.vocab_size * bench.DENSE.hidden_size < 4e6
    assert f"bits per byte at step {bench.STUDY.steps}" == docs.LAST


def test_the_page_is_what_the_records_say(docs: ModuleType) -> None:
    assert docs.main(["--check"]) == 0


def test_the_help_names_the_defaults_that_hold() -> None:
    for script in ("bench/balance.py", "bench/upcycle.py", "bench/real_upcycling.py"):
        with loaded(script) as module:
            study = module.STUDY
            usage = f"{script} [NAME ...] [--jobs {study.jobs}] [--again] [--steps {study.steps}]"
            assert f"usage: python {usage} [--seeds {study.seeds}]\n" in module.__doc__


def test_a_dense_model_is_named_by_the_hash_that_lineages_have(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(LLAMA, tmp_path / "dense-1")
    made = {"method": "copy", "experts": 2, "top_k": 1, "data": text(tmp_path / "a.txt")}
    bench.upcycle(tmp_path / "dense-1", tmp_path / "moe", **made)
    expected = read_json(Lineage, tmp_path / "moe" / NAME).source_sha256
    monkeypatch.setattr(bench, "read_text", lambda: None)
    monkeypatch.setattr(bench, "work_of", lambda corpus: tmp_path)
    assert bench.sources(bench.Settings(9, 3, tmp_path)) == {"seed 1": expected}, "the others are not there"


def test_every_method_makes_a_model(bench: ModuleType, tmp_path: Path) -> None:
    """Those of the study with sizes of their own, on a smaller model."""
    config = dataclasses.replace(LLAMA, attention=GQA(heads=6, kv_heads=6, head_dim=32), max_length=64)
    saved(config, tmp_path / "dense")
    for name in ("copy-shared", "virtual-group-1", "mla-half"):
        options = {**bench.METHODS[name], "data": text(tmp_path / "a.txt"), "calibration_tokens": 512}
        with bench.made(tmp_path / "dense", 0, options) as (model, relative):
            assert relative < 1e-5 or name == "mla-half"
            assert (model.config.moe is None) == (name == "mla-half")
    assert isinstance(model.config.attention, MLA)
    assert 2 * model.config.attention.cache_width == 6 * 2 * 32


def test_a_run_gives_every_figure(bench: ModuleType, docs: ModuleType, tmp_path: Path) -> None:
    files = tmp_path / "text"
    files.mkdir()
    for name in "ab":
        text(files / f"{name}.txt")
    data = Data(sources=(TextPath(path=str(files)),), sequence_length=32, held_out=0.5)
    corpus = build_corpus(data, 300, start=Bytes())
    saved(LLAMA, tmp_path / "dense")
    options = {**bench.METHODS["copy"], "data": files / "a.txt"}
    bench.upcycle(tmp_path / "dense", tmp_path / "moe", **options)
    model = store.load(tmp_path / "moe")
    assert bench.similarity(model) == pytest.approx(1.0, abs=1e-5)
    assert bench.similarity(build(LLAMA)) is None
    with pytest.MonkeyPatch.context() as patch:
        small = dataclasses.replace(bench.training_of(model.config, 3, 0, data), batch=2)
        patch.setattr(
            bench, "training_of", lambda config, steps, seed, data: dataclasses.replace(small, steps=steps)
        )
        torch.manual_seed(0)
        names = {figure.name for figure in bench.figures(model, bench.Text(corpus, data), 3, 5)}
    for figure in ("bits per byte at step 0", "bits per byte at step 3", "busiest expert, before"):
        assert f"{figure}, seed 5" in names
    assert "expert similarity, after, seed 5" in names


def test_filtered_text_keeps_whole_documents_and_what_is_measured(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for domain in ("mixed", "alien"):
        (tmp_path / domain).mkdir()
        for number in range(8):
            kind = "bad" if domain == "alien" or number % 2 else "good"
            (tmp_path / domain / f"{number}.txt").write_text(
                f"{kind} number {number} of the {domain} texts\n"
            )
    data = Data(sources=(TextPath(path=str(tmp_path)),), sequence_length=8, held_out=0.3)
    corpus = build_corpus(data, 300, start=Bytes())

    @dataclasses.dataclass
    class Judge:
        def score(self, document: str) -> float:
            return float("good" in document)

    monkeypatch.setattr(bench, "classifier", lambda kind: Judge())
    found = bench.fluent(corpus)
    assert found.held_out is corpus.held_out
    assert found.train["alien"] is corpus.train["alien"], "a domain of which nothing is left stays whole"
    mixed = found.train["mixed"]
    assert 0 < len(mixed.starts_N) < len(corpus.train["mixed"].starts_N)
    for start, end in zip(mixed.starts_N, mixed.ends_N, strict=True):
        assert corpus.tokenizer.decode(mixed.ids_T[start:end].tolist()).count("good") == 1
