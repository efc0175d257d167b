"""docs/generate.py writes what records say, and --check finds what they no longer say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

from consilium.records.bench import BenchRecord, Figure
from house.tree import ROOT


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def record(name: str, *figures: Figure) -> BenchRecord:
    return BenchRecord(
        name=name,
        machine="two cores",
        commit="abc",
        command="run it",
        date=datetime(2026, 1, 2, tzinfo=UTC),
        figures=figures,
    )


def figure(name: str, value: float, unit: str = "") -> Figure:
    return Figure(name=name, unit=unit, median=value, minimum=value, maximum=value, n=1)


def test_a_record_becomes_a_table_with_its_source(generate: ModuleType) -> None:
    text = generate.record_block(record("demo", figure("speed", 1234.5, "tokens/s")), generate.ENGLISH)
    assert "| speed | 1,234 tokens/s |" in text
    assert "Measured 2026-01-02 on two cores: `run it`." in text


def test_a_missing_record_says_so(generate: ModuleType) -> None:
    assert "Not measured yet" in generate.record_block(None, generate.ENGLISH)
    assert "尚未测量" in generate.record_block(None, generate.CHINESE)


def test_a_promise_shows_trials_and_failures(generate: ModuleType) -> None:
    done = record("promise-resume", figure("trials", 50), figure("failures", 0))
    promise = next(promise for promise in generate.PROMISES if promise.record == "promise-resume")
    assert generate.promise_row(promise, done, generate.ENGLISH)[2:] == ("50", "0", "2026-01-02")


def test_every_promise_names_tests_that_exist(generate: ModuleType) -> None:
    assert not [
        promise.test for promise in generate.PROMISES if not any((ROOT / promise.test).rglob("test_*.py"))
    ]


def test_a_typed_number_is_replaced_and_found(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "before\n<!-- generated:demo -->\n99 tokens/s\n<!-- end:demo -->\nafter\n", encoding="utf-8"
    )
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "RECORDS", tmp_path / "records")
    assert generate.main(["--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert page.read_text(encoding="utf-8").startswith("before\n<!-- generated:demo -->\nNot measured")
