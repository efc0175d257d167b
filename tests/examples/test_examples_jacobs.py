"""The examples of 1991 run from anywhere, say how far they are, and judge by rules that they state."""

from __future__ import annotations

import importlib
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from consilium.records.bench import BenchRecord
from consilium.records.io import read_json

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["jacobs_regression", "jacobs_vowels"]
ERRORS = ["cooperative", "competitive", "log likelihood"]


def run(name: str, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / f"{name}.py", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """One of the examples, imported as their own folder sees them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module(request.param)


def example(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", [name], indirect=True)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_from_any_folder(name: str, tmp_path: Path) -> None:
    done = run(name, tmp_path, "--seeds", "1", "--epochs", "20")
    assert done.returncode == 0, done.stderr
    for error in ERRORS:
        assert re.search(rf"^{error} +\d\.\d\d +#+ ", done.stdout, re.MULTILINE)
        assert f"seed 1 of 1: {error}" in done.stderr
    assert len(re.findall(r"^  (?:not )?reproduced ", done.stdout, re.MULTILINE)) >= 4
    assert not list(tmp_path.iterdir())


def test_a_count_below_one_is_refused_in_one_sentence(tmp_path: Path) -> None:
    done = run("jacobs_vowels", tmp_path, "--seeds", "0")
    assert done.returncode == 2
    assert "--seeds: 0 is below 1" in done.stderr
    assert "Traceback" not in done.stderr


@example("jacobs_vowels")
def test_vowels_are_spoken_by_50_and_25_speakers_around_the_published_means(module: ModuleType) -> None:
    assert sum(module.SPEAKERS) == 75
    group_S = torch.arange(3).repeat_interleave(4000)
    spoken_TI = module.speak(group_S, torch.Generator().manual_seed(0)).view(3, 4000, 4, 2)
    means_GVI = torch.tensor(list(module.FORMANTS.values())).transpose(0, 1)
    relative_TI = spoken_TI / means_GVI[:, None]
    assert (relative_TI.mean(dim=1) - 1).abs().max() < 5 * module.SPREAD / math.sqrt(4000)
    assert relative_TI.std(dim=1) == pytest.approx(module.SPREAD, rel=0.1)
    task = module.make_task(0)
    assert (len(task.train.x_TI), len(task.fresh.x_TI)) == (200, 100)


@example("jacobs_vowels")
def test_a_seed_decides_the_speakers_and_inputs_are_standardised_by_the_training_ones(
    module: ModuleType,
) -> None:
    task, same, other = (module.make_task(seed) for seed in (0, 0, 1))
    assert torch.equal(task.fresh.x_TI, same.fresh.x_TI)
    assert not torch.equal(task.fresh.x_TI, other.fresh.x_TI)
    assert task.train.x_TI.mean(dim=0).abs().max() < 1e-5
    assert task.train.x_TI.std(dim=0) == pytest.approx(1, rel=1e-5)
    assert torch.equal(task.train.target_TO.argmax(dim=1), task.train.label_T)


@example("jacobs_regression")
def test_every_cluster_has_a_linear_map_that_its_fresh_cases_share(module: ModuleType) -> None:
    task = module.make_task(3)
    for cluster in range(4):
        parts = [
            (c.x_TI[c.label_T == cluster], c.target_TO[c.label_T == cluster])
            for c in (task.train, task.fresh)
        ]
        (x, y), (fresh_x, fresh_y) = ((torch.cat((x, torch.ones(len(x), 1)), 1), y) for x, y in parts)
        fitted = torch.linalg.lstsq(x, y).solution
        assert float((fresh_x @ fitted - fresh_y).square().mean()) < 1.5 * module.NOISE**2


@example("jacobs_study")
def test_medians_infinite_epochs_and_verdicts_are_told_as_they_are(module: ModuleType) -> None:
    def result(entropy: float, epochs: float) -> object:
        return module.Result(entropy, math.exp(entropy), 1.0, 2, 0.5, 0.25, epochs)

    results = {"slow": [result(1.0, math.inf)] * 2 + [result(0.0, 7)], "fast": [result(0.0, 7)]}
    assert module.median(results, "slow", "epochs") == math.inf
    told = module.table(results, {"epochs": "epochs"})
    assert re.search(r"^slow +2\.72 +#{14} +never$", told, re.MULTILINE)
    assert re.search(r"^fast +1\.00 +#{5} +7$", told, re.MULTILINE)
    fast = module.Claim("it is fast", "under 10", lambda r: module.median(r, "fast", "epochs") < 10)
    slow = module.Claim("so is this", "under 10", lambda r: module.median(r, "slow", "epochs") < 10)
    assert module.verdicts(results, [fast, slow]).splitlines()[1:] == [
        "  reproduced      it is fast (under 10)",
        "  not reproduced  so is this (under 10)",
    ]


@example("jacobs_study")
def test_epochs_are_counted_until_the_training_cases_meet_the_criterion(module: ModuleType) -> None:
    """One expert, one map: the criterion is met late if it is hard, and never if it is out of reach."""
    x_TI = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    cases = module.Cases(x_TI, x_TI @ torch.tensor([[1.0], [-1.0]]), torch.zeros(40, dtype=torch.long))

    def epochs(criterion: float) -> float:
        task = module.Task(cases, cases, "linear", criterion)
        return module.train(task, module.log_likelihood_error, 1, seed=0, epochs=120).epochs

    assert 0 == epochs(100.0) < epochs(0.1) < epochs(0.001) < epochs(-1.0) == math.inf


def test_the_record_of_both_has_the_gate_of_every_error(tmp_path: Path) -> None:
    words = ["--seeds", "1", "--epochs", "5", "--out", str(tmp_path / "jacobs.json")]
    command = [sys.executable, EXAMPLES.parent / "bench/jacobs.py", *words]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=100)
    names = {figure.name for figure in read_json(BenchRecord, tmp_path / "jacobs.json").figures}
    for task, error in itertools.product(("regression", "vowels"), ERRORS):
        assert {f"{task}, {error}: gate entropy", f"{task}, {error}: experts a case"} <= names
    assert sum(name.endswith("1 is reproduced") for name in names) == 9
