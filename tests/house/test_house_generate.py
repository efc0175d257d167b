"""docs/generate.py writes what records say, and --check finds what they no longer say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

from consilium.records.bench import BenchRecord, Figure
from consilium.records.io import read_json, write_json
from consilium.records.promise import Promise, Promises
from house.scripts import loaded
from house.tree import ROOT


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    with loaded("docs/generate.py") as module:
        yield module


PROMISES = ROOT / "bench" / "promises.json"


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
    assert "Not measured yet" in generate.records_block([], generate.ENGLISH)
    assert "尚未测量" in generate.records_block([], generate.CHINESE)


def test_records_of_two_kinds_of_processors_stand_one_after_the_other(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tmp_path / "bench/records"
    other = dataclasses.replace(record("demo", figure("speed", 2.0)), machine="four cores")
    write_json(records / "demo.json", record("demo", figure("speed", 1.0)))
    write_json(records / "four/demo.json", other)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/page.md"
    page.write_text("<!-- generated:demo -->\n<!-- end:demo -->\n")
    monkeypatch.setattr(generate, "RECORDS", records)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.main([]) == 0
    text = page.read_text()
    assert text.index("on two cores") < text.index("on four cores")
    assert generate.main(["--check"]) == 0


def test_no_block_of_a_page_is_overlooked(generate: ModuleType) -> None:
    """Names of records may hold dots."""
    for page in (*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- generated:") == len(generate.BLOCK.findall(text)), page


def test_a_table_of_single_values_has_no_column_for_spread(generate: ModuleType) -> None:
    text = generate.record_block(record("demo", figure("bits", 1.5)), generate.ENGLISH)
    assert text.startswith("| What | Value | Against | Ratio |\n")
    assert "数值" in generate.record_block(record("demo", figure("bits", 1.5)), generate.CHINESE)


def test_a_median_is_called_one_and_a_single_value_beside_it_is_told_apart(generate: ModuleType) -> None:
    three = Figure(name="fast", unit="s", median=2, minimum=1, maximum=3, n=3)
    text = generate.record_block(record("speed", three, figure("slow", 9, "s")), generate.ENGLISH)
    assert "Median (n = 1: only value) | Range | n" in text
    assert "| fast | 2 s | 1 to 3 | 3 |" in text
    assert "| slow | 9 s |  | 1 |" in text


def test_a_promise_shows_trials_and_failures(generate: ModuleType) -> None:
    done = record("promise-x", figure("trials", 50), figure("failures", 0))
    promise = Promise(
        record="promise-x",
        sentence="It holds",
        tests=("tests/a", "tests/b.py"),
        broken=("SIGKILL", "disk full"),
    )
    row = generate.promise_row(promise, done, generate.ENGLISH)
    assert row == ("It holds", "`tests/a`, `tests/b.py`", "SIGKILL, disk full", "50", "0", "2026-01-02")
    assert generate.promise_row(promise, None, generate.ENGLISH)[3:] == ("not run yet", "", "")


def test_every_promise_names_tests_that_exist() -> None:
    named = [test for promise in read_json(Promises, PROMISES).promises for test in promise.tests]
    files = {
        test: [ROOT / test] if test.endswith(".py") else (ROOT / test).rglob("test_*.py") for test in named
    }
    assert not [test for test, found in files.items() if not any(file.is_file() for file in found)]


def test_the_arithmetic_of_deepseek_v2_gives_the_published_savings(generate: ModuleType) -> None:
    text = generate.block("cache", {}, generate.ENGLISH)
    assert "2 x 8 x 128 x 95 = 194,560 | 16 | 389,120" in text
    assert "(512 + 64) x 60 = 34,560 | 16 | 69,120 | 82.2 %" in text
    assert "(512 + 64) x 60 = 34,560 | 6 | 25,920 | 93.3 %" in text
    assert "1 - 172.8 / 300.6 = 42.5 %" in text


def test_the_quoted_slopes_stand_at_the_points_where_they_are(generate: ModuleType) -> None:
    text = generate.block("clark", {}, generate.ENGLISH)
    assert "| s-base | 21.00 B | 8 | 1.752 | -0.0739 | -0.0151 | -0.0736 | -0.0133 |" in text
    assert "| s-base | 2.100 B | 8 | 2.075 | -0.0739 | -0.0241 |" in text


def test_olmoe_on_the_laptop_is_the_published_one(generate: ModuleType) -> None:
    assert "| OLMoE-1B-7B | 6,919,161,856 | 1.282 B | 12.89 GiB | yes |" in generate.block(
        "laptop", {}, generate.ENGLISH
    )


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
