from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import ConsiliumError
from consilium.records.bench import BenchRecord, Figure
from consilium.records.io import from_json, read_json, read_json_if_present, to_json, write_json, write_text
from consilium.records.run import BitsPerByte, Dense, Hardware, RunMeta, Sample, Summary, Versions

META = RunMeta(
    model="deepseek-v3:tiny",
    parameters_total=8_000_000,
    parameters_active=2_000_000,
    corpus="builtin",
    corpus_sha256="ab" * 32,
    seed=0,
    started=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    versions=Versions(consilium="0.1.0", torch="2.13.0", python="3.11.9"),
    hardware=Hardware(cpu="a CPU", threads=2, memory_bytes=2**34),
)
BENCH = BenchRecord(
    name="train",
    machine="a CPU, 2 cores",
    commit="0" * 40,
    command="consilium bench train",
    date=datetime(2026, 1, 2, tzinfo=UTC),
    figures=(Figure(name="speed", unit="tokens/s", median=2.0, minimum=1.0, maximum=3.0, n=5),),
)

numbers = st.floats(allow_nan=False, allow_infinity=False)
scores = st.builds(BitsPerByte, domains=st.dictionaries(st.text(max_size=8), numbers, min_size=1, max_size=5))
summaries = st.builds(
    Summary,
    steps=st.integers(0, 10**9),
    tokens=st.integers(0, 10**15),
    seconds=st.floats(0, 1e9),
    tokens_per_second=st.floats(0, 1e9),
    trained=scores,
    untrained=st.none() | scores,
    trigram=st.none() | scores,
    xz=st.none() | scores,
    dense=st.none()
    | st.builds(
        Dense, bits_per_byte=scores, parameters=st.integers(1, 10**12), tokens_per_second=st.floats(0, 1e9)
    ),
    sample=st.none() | st.builds(Sample, prompt=st.text(), text=st.text()),
)


@given(summaries)
def test_a_summary_survives_json(summary: Summary) -> None:
    assert from_json(Summary, to_json(summary), where="test") == summary


@pytest.mark.parametrize("record", [META, BENCH])
def test_a_record_survives_a_file(record: object, tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "record.json", record)
    assert read_json(type(record), tmp_path / "deep" / "record.json") == record


@given(st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_diverged_score_is_null_in_the_file_and_nan_when_read(value: float) -> None:
    text = to_json(BitsPerByte(domains={"code": value, "prose": 1.0}))
    assert "null" in text
    again = from_json(BitsPerByte, text, where="test")
    assert math.isnan(again.domains["code"])
    assert math.isnan(again.macro)


@given(st.dictionaries(st.text(max_size=4), st.floats(0, 100), min_size=1, max_size=6))
def test_macro_is_the_mean_over_domains(domains: dict[str, float]) -> None:
    slow = 0.0
    for value in domains.values():
        slow += value
    assert BitsPerByte(domains=domains).macro == pytest.approx(slow / len(domains), rel=1e-12)


def test_an_unknown_key_is_refused_by_file_and_key() -> None:
    with pytest.raises(
        ConsiliumError, match=r"meta\.json: parameters_totl: .*damaged, or of another version"
    ):
        from_json(RunMeta, to_json(META).replace('"seed"', '"parameters_totl": 1, "seed"'), where="meta.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"domains": {}}', "\x00\x00"])
def test_damaged_json_is_one_sentence(text: str) -> None:
    with pytest.raises(ConsiliumError, match=r"^a\.json: ") as caught:
        from_json(BitsPerByte, text, where="a.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match=r"cannot read .*meta\.json: No such file"):
        read_json(RunMeta, tmp_path / "meta.json")
    assert read_json_if_present(RunMeta, tmp_path / "meta.json") is None


def test_writing_replaces_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new, 新\n")
    assert path.read_text(encoding="utf-8") == "new, 新\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConsiliumError, match="cannot save to"):
        write_text(tmp_path / "file" / "a.txt", "text")


def test_a_figure_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"speed: median 5\.0 lies outside 1\.0 to 3\.0"):
        Figure(name="speed", unit="ms", median=5, minimum=1, maximum=3, n=3)


def test_a_ratio_needs_a_rival() -> None:
    with pytest.raises(ValueError, match="both 'against' and 'ratio'"):
        Figure(name="speed", unit="ms", median=2, minimum=1, maximum=3, n=3, ratio=1.5)
