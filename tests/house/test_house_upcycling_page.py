"""docs/generate_upcycle.py on records and answers that are made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from consilium.benchmarking.record import once, record
from consilium.records.bench import BenchRecord
from consilium.records.io import read_json, write_json
from consilium.report.lines import COLOURS
from house.scripts import loaded

SOURCES = {f"seed {seed}": f"hash {seed}" for seed in range(3)}
OTHERS = SOURCES | {"seed 1": "another"}
Values = Mapping[str, Sequence[float]]


@pytest.fixture(scope="module")
def docs() -> Iterator[ModuleType]:
    with loaded("docs/generate_upcycle.py") as module:
        yield module


@pytest.fixture(scope="module")
def sayings() -> Iterator[ModuleType]:
    with loaded("docs/upcycling_claims.py") as module:
        yield module


@pytest.fixture(scope="module")
def real() -> Iterator[ModuleType]:
    with loaded("docs/upcycling_real.py") as module:
        yield module


def made(docs: ModuleType, path: Path, values: Values, sources: Mapping[str, str] = SOURCES) -> Any:
    """A study of as many seeds as there are values."""
    found = [
        once(f"{name}, seed {seed}", "", value)
        for name, of in values.items()
        for seed, value in enumerate(of)
    ]
    written = record(path.stem, f"python bench/x.py {path.stem} --steps 9 --seeds 3", found)
    write_json(path, dataclasses.replace(written, sources=sources))
    return docs.Study.read(path)


@pytest.mark.parametrize(
    ("left", "difference", "verdict"),
    [
        ([1.0, 1.1, 0.9], "-1.0000 ± 0.0577", "reproduced"),
        ([3.0, 3.1, 2.9], "+1.0000 ± 0.0577", "not reproduced"),
        ([1.9, 1.9, 2.1], "-0.0333 ± 0.0667", "within noise"),
        ([1.99, 1.99, 1.4], "-0.2067 ± 0.1967", "within noise"),
        ([2.0, 2.0, 2.0], "+0.0000 ± 0.0000", "within noise"),
        ([1.0], "-1.0000", "within noise"),
    ],
    ids=["below", "above", "seeds disagree", "less than two errors", "equal", "one seed"],
)
def test_a_verdict_needs_seeds_that_agree_and_two_standard_errors(
    docs: ModuleType, sayings: ModuleType, tmp_path: Path, left: list[float], difference: str, verdict: str
) -> None:
    found = {
        "a": made(docs, tmp_path / "a.json", {"bits": left}),
        "b": made(docs, tmp_path / "b.json", {"bits": [2.0] * 3}),
    }
    told = sayings.Said("text", "bits", "a", "b").row(found)
    assert told == ("text", "bits: `a` < `b`", difference, str(len(left)), verdict)


def test_runs_of_other_dense_models_are_not_paired(
    docs: ModuleType, sayings: ModuleType, tmp_path: Path
) -> None:
    values = {"bits": [1.0, 1.1, 1.2], "before": [1.5, 1.6, 1.7]}
    base = made(docs, tmp_path / "base.json", {"bits": [2.0] * 3})
    claim = sayings.Said("text", "bits", "a", "b")
    for sources, verdict in ((SOURCES, "reproduced"), (OTHERS, "not paired"), ({}, "not paired")):
        found = {"a": made(docs, tmp_path / "a.json", values, sources), "b": base}
        assert claim.row(found)[-1] == verdict
        own = sayings.Said("text", "bits", "a", "a", "before")
        assert own.row(found)[2:] == ("-0.5000 ± 0.0000", "3", "reproduced"), "a run is paired with itself"
    nameless = {name: made(docs, tmp_path / f"{name}.json", values, {}) for name in "ab"}
    assert claim.row(nameless)[2:] == ("", "", "not paired")
    assert claim.row({"b": base})[-1] == "not measured"


def test_near_is_near_for_every_seed(docs: ModuleType, sayings: ModuleType, tmp_path: Path) -> None:
    claim = sayings.Said("text", "bits", "a", "b", within=1e-3)
    base = made(docs, tmp_path / "b.json", {"bits": [2.0] * 3})
    for left, verdict in (([2.0009, 1.9991, 2.0], "reproduced"), ([2.0, 2.0, 2.0011], "not reproduced")):
        found = {"a": made(docs, tmp_path / "a.json", {"bits": left}), "b": base}
        assert claim.row(found)[-1] == verdict
    assert claim.rule == "bits: `a` within 0.001 of `b`"


def test_the_claims_of_the_issue_are_there(sayings: ModuleType) -> None:
    rules = {(claim.left, claim.right, claim.figure) for claim in sayings.claims()}
    assert ("virtual-group", "dense", sayings.START) in rules
    assert ("copy", "scratch-long", sayings.LAST) in rules
    alike = {claim.left for claim in sayings.claims() if claim.beside == sayings.BEFORE}
    assert alike == {"copy", "drop", "qwen"}


def test_pictures_have_room_for_every_method(docs: ModuleType) -> None:
    assert all(len(names) <= COLOURS for names in docs.PANELS.values())
    assert docs.PANELS.keys() == docs.ABOUT.keys()


def small(docs: ModuleType, folder: Path) -> dict[str, Any]:
    """Every method but one; one of them of another dense model."""
    found: dict[str, Any] = {}
    for place, name in enumerate(docs.NAMES[:-1]):
        values = {
            f"bits per byte at step {step}": [2.0 - step / 500 + place / 100 + seed for seed in range(3)]
            for step in (0, 60, 122, 244)
        }
        values |= {"seconds": [1200.0] * 3, "processor seconds": [600.0] * 3} if place < 2 else {}
        sources = OTHERS if name == "qwen" else SOURCES
        found[name] = made(docs, folder / f"{name}.json", values, sources)
    return found


def test_the_page_shows_four_decimals_seeds_times_and_what_stands_apart(
    docs: ModuleType, tmp_path: Path
) -> None:
    found = small(docs, tmp_path)
    text = docs.page(found, {}, {})
    first = docs.NAMES[0]
    assert f"| `{first}` | 3.0000 (2.0000 to 4.0000) | 2.5120 (1.5120 to 3.5120) |" in text
    assert text.count(" 3,600 | 3 |") == 2
    assert f"2 of {len(found)} records say what they took: 2.0 hours by the clock and 1.0 of" in text
    assert f"Not measured yet: `{docs.NAMES[-1]}`." in text
    assert docs.apart(found) == {"qwen"}
    assert "| `qwen` * |" in text
    assert "| `drop` |" in text
    assert "finer groups such as E8G8T8" in text
    assert docs.page({}, {}, {}).count("Not measured yet;") == 2


def test_every_method_measured_is_in_a_picture(docs: ModuleType, tmp_path: Path) -> None:
    found = small(docs, tmp_path)
    files = docs.texts(found, {}, {})
    drawn = "".join(text for path, text in files.items() if path.suffix == ".svg")
    assert all(f">{name}</text>" in drawn for name in found)
    page = files[docs.DOCS / "upcycling.md"]
    assert all(f"pictures/{path.name}" in page for path in files if path.suffix == ".svg")
    assert 'class="dashed c5"' in files[docs.DOCS / "pictures" / "upcycling-copies.svg"]
    base = found["dense"]
    assert docs.late(found["qwen"], base) == (), "it is not paired"
    places = [docs.NAMES.index("scratch"), docs.NAMES.index("dense")]
    far = (places[0] - places[1]) / 100
    steps, distances = zip(*docs.late(found["scratch"], base), strict=True)
    assert steps == (60.0, 122.0, 244.0)
    assert distances == pytest.approx([far] * 3)
    assert docs.late(found["btx"], base) == (), "it is too far away"


def test_the_real_half_shows_states_layouts_and_answers(
    docs: ModuleType, real: ModuleType, tmp_path: Path
) -> None:
    values = {
        **{f"bits per byte {when}": [1.23456] for when in real.WHENS},
        **{f"bits per byte at {tokens} tokens": [2.0] for tokens in (0, 20480, 120832)},
        "busiest expert at step 0": [1.5],
        "busiest expert after training": [1.25],
        "largest error of logits in transformers": [2.1e-6],
    }
    name = "virtual-group-normalised-half"
    found = {
        "dense": made(docs, tmp_path / "dense.json", {"bits per byte at step 0": [1.0, 1.5]}),
        name: made(docs, tmp_path / f"{name}.json", values),
    }
    said = {"Why?": "a | b\n<b>*one*</b> `two` [x](y)"}
    told = {"answers": dict.fromkeys(real.WHENS, said), "layout": "mixtral", "gguf": "written, 9 MB"}
    refused = {"answers": {real.WHENS[0]: said}, "layout": "llama", "transformers": "not installed here"}
    text = real.real_section(found, {name: json.loads(json.dumps(told)), "dense": refused})
    assert f"| `{name}` | 1.2346 | 1.2346 | 1.2346 | 1 |" in text
    assert "| `dense` | 1.2500 |  |  | 2 |" in text
    assert "| `mixtral` | 2e-06 | written, 9 MB |" in text
    assert "| `llama` | not installed here |  |" in text
    assert "| 1.5 | 1.25 |" in text
    assert text.count("<details>") == 2
    answer = r"a \| b &lt;b&gt;\*one\*&lt;/b&gt; \`two\` \[x\]\(y\)"
    assert f"| Why? | {answer} | {answer} | {answer} |" in text
    assert "`carve-half`" in text.partition("Not measured yet: ")[2]
    pictures = real.curves(found)
    assert set(pictures) == {real.file_of(share) for share in real.SHARES}
    assert all(f"pictures/{file}" in text for file in pictures)
    assert f">{name}</text>" in pictures[real.file_of("half")]
    assert real.curves({}) == {}


@pytest.mark.parametrize(
    ("dense", "worse", "below"),
    [(0.6, "`carve-half`", "none"), (0.7, "`carve-half`", "`carve-quarter`"), (None, "`carve-half`", "none")],
)
def test_the_real_half_says_whose_warm_up_harmed_and_who_wins(
    docs: ModuleType, real: ModuleType, tmp_path: Path, dense: float | None, worse: str, below: str
) -> None:
    def study(name: str, *means: float | None) -> Any:
        known = {f"bits per byte {when}": [of] for when, of in zip(real.WHENS, means, strict=True) if of}
        return made(docs, tmp_path / f"{name}.json", known)

    found = {
        "dense": study("dense", 1.0, None, dense),
        "carve-half": study("carve-half", 1.0, 1.5, 0.9),
        "carve-quarter": study("carve-quarter", 2.0, 1.5, 0.65),
    }
    text = real.real_section(found, {})
    assert f"Worse after their gates warmed up: {worse}.\nBelow `dense` in the end: {below}.\n" in text


def test_records_of_before_have_no_sources(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", record("x", "x", [once("bits", "", 1.0)]))
    plain = json.loads((tmp_path / "x.json").read_text())
    del plain["sources"]
    (tmp_path / "x.json").write_text(json.dumps(plain))
    assert read_json(BenchRecord, tmp_path / "x.json").sources == {}
