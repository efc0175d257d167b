"""bench/balance.py trains every method alike, and docs/generate_balance.py says what its records say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from consilium.benchmarking.record import once, record
from consilium.config.data import TextPath
from consilium.config.router import Sinkhorn
from consilium.data.corpus import build_corpus
from consilium.errors import ConsiliumError
from consilium.planner.parameters import parameters
from consilium.recipes.balances import TEXTS
from consilium.recipes.balancing import BALANCES
from consilium.records.io import write_json
from house.scripts import loaded


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with loaded("bench/balance.py") as module:
        yield module


@pytest.fixture(scope="module")
def studies() -> Iterator[ModuleType]:
    with loaded("bench/studies.py") as module:
        yield module


@pytest.fixture(scope="module")
def docs() -> Iterator[ModuleType]:
    with loaded("docs/generate_balance.py") as module:
        yield module


def test_every_method_is_trained_on_both_scores_and_nothing_else_differs(bench: ModuleType) -> None:
    assert len(bench.names()) == len(set(bench.names())) == 2 * len(TEXTS) + 3 * len(bench.BY_K)
    for score in bench.SCORES:
        plain = bench.training_of(f"{score}-none", 5, 1)
        for method in TEXTS:
            config = bench.training_of(f"{score}-{method}", 5, 1)
            moe, base = config.model.moe, plain.model.moe
            assert moe.balance == BALANCES[method](base)
            assert moe.router.score.kind == score
            assert isinstance(moe.router.select, Sinkhorn) == (method == "sinkhorn")
            same = dataclasses.replace(
                moe, balance=base.balance, router=base.router, admission=base.admission
            )
            assert same == base
            assert dataclasses.replace(config, model=plain.model) == plain


def test_k_changes_neither_active_nor_total_width(bench: ModuleType) -> None:
    models = [bench.model_of(f"k{k}-switch") for k in bench.CHOICES]
    gates = [2 * 64 * model.moe.experts for model in models]
    counts = [parameters(model) for model in models]
    assert len({count.total - gate for count, gate in zip(counts, gates, strict=True)}) == 1
    assert len({count.active - gate for count, gate in zip(counts, gates, strict=True)}) == 1


def test_spikes_are_above_the_median_before_and_nothing_finite_hides_nan(bench: ModuleType) -> None:
    values = [2.0] * 30 + [2.29, 2.31, 2.0, math.nan, math.inf] + [2.0] * 5
    assert bench.above_median(values, 1.15) == 3
    assert bench.above_median([5.0, *[1.0] * 30], 1.15) == 0


def test_balance_is_reached_where_ten_steps_hold_it(bench: ModuleType) -> None:
    assert bench.steps_to_balance([1.0] * 7 + [0.4] * 10 + [3.0]) == 6
    assert bench.steps_to_balance([0.4] * 9) == math.inf
    assert bench.steps_to_balance([0.6, 0.4] * 20) == math.inf
    assert bench.curve([0.0, 2.0] * 24)[:2] == [(2, 1.0), (4, 1.0)]


def test_a_run_gives_every_figure_and_its_record_is_done(
    bench: ModuleType, studies: ModuleType, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for name in "ab":
        (text / f"{name}.txt").write_text("".join(f"{name} {i} lines of {i * i}.\n" for i in range(300)))
    config = bench.training_of("sigmoid-quantile", 24, 0)
    data = dataclasses.replace(config.data, sources=(TextPath(path=str(text)),), held_out=0.5)
    small = dataclasses.replace(config, data=data, batch=2)
    corpus = build_corpus(data, small.model.vocab_size, start=small.tokenizer)
    run = bench.trained(small, corpus)
    assert all(load.margins is None for result in run.results for load in result.loads.values())
    names = {figure.name for figure in bench.figures(run, 7)}
    assert {"bits per byte, seed 7", "MaxVio global, seed 7", "MaxVio at step 24, seed 7"} <= names
    study, settings = bench.STUDY, bench.Settings(24, 1, tmp_path)
    study.measure("sigmoid-quantile", settings, lambda name, _: bench.figures(run, 0))
    assert study.is_done("sigmoid-quantile", settings)
    assert not study.is_done("sigmoid-quantile", dataclasses.replace(settings, steps=25))
    assert not study.is_done("sigmoid-none", settings)
    words = ["sigmoid-quantile", "--steps=24", "--seeds=1", f"--records={tmp_path}"]
    assert studies.main(study, words, "about") == 0


def test_an_unknown_run_is_answered_with_the_nearest(
    bench: ModuleType, studies: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(ConsiliumError, match="Did you mean 'sigmoid-quantile'"):
        studies.main(bench.STUDY, ["sigmoid-quantil", f"--records={tmp_path}"], "about")


def made(docs: ModuleType, folder: Path, name: str, **figures: list[float]) -> object:
    """A study of as many seeds as there are values; a value that is not finite is none."""
    found = [
        once(f"{docs.BITS if key == 'bits' else key}, seed {seed}", "", value)
        for key, values in figures.items()
        for seed, value in enumerate(values)
        if math.isfinite(value)
    ]
    path = folder / f"{name}.json"
    write_json(path, record(name, f"python bench/balance.py {name} --steps 9 --seeds 3", found))
    return docs.Study.read(path)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "reproduced, 3 of 3 seeds"),
        ([1.5, 2.5, 3.5], [1.0, 2.0, 3.0], "opposite, 3 of 3 seeds"),
        ([1.0, 2.0, 3.0], [1.5, 1.9, 3.5], "undecided, 2 of 3 seeds"),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "undecided, 0 of 3 seeds"),
        ([1.0, 2.0], [1.5, 2.5, 3.5], "reproduced, 2 of 2 seeds"),
    ],
)
def test_a_claim_holds_where_it_holds_for_every_seed(
    docs: ModuleType, tmp_path: Path, left: list[float], right: list[float], expected: str
) -> None:
    found = {"a": made(docs, tmp_path, "a", bits=left), "b": made(docs, tmp_path, "b", bits=right)}
    assert docs.Claim("text", docs.BITS, "a", "b").verdict(found) == expected
    assert docs.Claim("text", docs.BITS, "a", "c").verdict(found) == "not measured"


def test_what_never_happened_is_later_than_everything(docs: ModuleType, tmp_path: Path) -> None:
    some = {docs.TIME: [3.0, math.inf, 5.0]}
    study = made(docs, tmp_path, "a", bits=[1.0] * 3, **some)
    assert docs.when(study) == "4 (3 to 5), 2 of 3 seeds"
    never = made(docs, tmp_path, "b", bits=[1.0] * 3)
    assert docs.when(never) == "never"
    claim = docs.Claim("text", docs.TIME, "a", "b")
    assert claim.verdict({"a": study, "b": never}) == "undecided, 2 of 3 seeds"


def test_the_page_shows_means_spreads_and_paired_differences(docs: ModuleType, tmp_path: Path) -> None:
    found = {
        "softmax-none": made(docs, tmp_path, "x", bits=[2.0, 3.0, 4.0], **{"MaxVio at step 5": [1.0] * 3}),
        "softmax-switch": made(docs, tmp_path, "y", bits=[2.5, 3.5, 4.5]),
    }
    text = docs.page(found)
    assert "| `switch` | 3.5 (2.5 to 4.5) | +0.500 |" in text
    assert text.count("Not measured yet;") == 2
    assert "Not measured yet: `switch-z`, `global`" in text
    assert all(f"| `{method}` | " in text for method in TEXTS)
    drawing = docs.picture("softmax", found)
    assert "prefers-color-scheme: dark" in drawing
    assert "MaxVio over the steps" in drawing


def test_the_page_is_what_the_records_say(docs: ModuleType) -> None:
    assert docs.main(["--check"]) == 0
