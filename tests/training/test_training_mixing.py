"""Shares that follow the losses are state of a run: on record, and exact on a resume across a change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from consilium.checkpoint import store
from consilium.config.data import Data, Dynamic, Given, Losses, Measured, TextPath
from consilium.config.optimizer import AdamW
from consilium.config.training import Bytes, Training
from consilium.data.mixture import next_shares
from consilium.disk import atomic
from consilium.errors import ConsiliumError
from consilium.parallel.mesh import Mesh
from consilium.parallel.topology import Topology
from consilium.records.metrics import read_metrics
from consilium.report.build import build_report
from consilium.training.events import Event, Stepped
from consilium.training.loop import train
from consilium.training.mixing import Mixing, Reweighted
from processes import together
from small import DEEPSEEK


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, line in (("easy", "aaaa aaaa\n"), ("hard", "q7#z {i} k!v {j}\n")):
        for i in range(6):
            path = folder / name / f"{i}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(line.format(i=i * j, j=j) for j in range(60)))
    return folder


def configuration(text: Path, mixture: Dynamic | Given) -> Training:
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24, mixture=mixture)
    return Training(
        model=DEEPSEEK, tokenizer=Bytes(), data=data, steps=9, batch=4, save_every=2, eval_tokens=64
    )


class Killed(BaseException):
    """Like a kill nothing is saved on the way out."""


def killed_after(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise Killed

    return listen


def state(out: Path) -> tuple[dict[str, torch.Tensor], object]:
    folder = atomic.latest(out / "checkpoints")
    assert folder is not None
    saved = store.load_training_state(folder)
    return {**store.load(folder).state_dict(), **saved.tensors}, saved.scalars["mixing"]


def shares(out: Path) -> dict[int, dict[str, float]]:
    return {r.step: dict(r.shares) for r in read_metrics(out / "metrics.jsonl").records if r.shares}


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(configuration(text, Dynamic(every=2, floor=0.05)), out)
    return out


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_that_is_killed_around_a_change_reaches_the_same_bits(
    stop: int, text: Path, whole: Path, tmp_path: Path
) -> None:
    config = configuration(text, Dynamic(every=2, floor=0.05))
    with pytest.raises(Killed):
        train(config, tmp_path / "run", listeners=[killed_after(stop)])
    train(config, tmp_path / "run", resume=True)
    (ours, mixing), (theirs, expected) = state(tmp_path / "run"), state(whole)
    assert mixing == expected
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    logged = [
        [(r.step, r.loss, dict(r.shares)) for r in read_metrics(out / "metrics.jsonl").records]
        for out in (tmp_path / "run", whole)
    ]
    assert logged[0] == logged[1]


def test_changes_are_on_record_and_on_the_page(whole: Path) -> None:
    found = shares(whole)
    assert sorted(found) == [2, 4, 6, 8]
    assert found[2] != found[4]
    assert all(sum(one.values()) == pytest.approx(1) for one in found.values())
    assert "Share of the rows by domain" in build_report(whole).read_text(encoding="utf-8")


def test_a_domain_above_its_reference_gets_more_rows(text: Path, tmp_path: Path) -> None:
    reference = Losses(losses={"easy": 9.0, "hard": 0.0})
    train(configuration(text, Dynamic(every=3, reference=reference)), tmp_path / "run")
    found = shares(tmp_path / "run")
    assert found[3]["hard"] > 0.9
    assert found[6]["easy"] >= 1e-4
    assert found[6]["easy"] < found[3]["easy"]


def test_reference_losses_may_be_those_of_a_model(text: Path, whole: Path, tmp_path: Path) -> None:
    """Of the run's own start, which no update has moved, shares stay as they are at once."""
    trained = Dynamic(every=3, reference=Measured(path=str(whole)))
    train(configuration(text, trained), tmp_path / "run")
    measured, of_start = (Mixing.from_json(str(state(out)[1])).reference for out in (tmp_path / "run", whole))
    assert measured is not None
    assert of_start is not None
    assert all(measured[domain] < of_start[domain] for domain in measured)


def test_a_reference_without_a_domain_is_refused(text: Path, tmp_path: Path) -> None:
    config = configuration(text, Dynamic(reference=Losses(losses={"esy": 1.0, "hard": 1.0})))
    with pytest.raises(ConsiliumError, match=r"of the domain 'easy'\. Did you mean 'esy'"):
        train(config, tmp_path / "run")


def test_what_was_mixed_comes_back_bit_for_bit() -> None:
    changed = next_shares(Dynamic(), {"a": 0.3, "b": 0.7}, {"a": 1.1, "b": 2.3}, {"a": 1 / 3, "b": 0.1})
    mixing = Mixing({"a": 1 / 3, "b": 0.1}, [Reweighted(2, 8, changed)])
    assert Mixing.from_json(mixing.to_json()) == mixing


def test_over_processes_the_shares_follow_the_same_losses(text: Path, tmp_path: Path) -> None:
    """Two processes evaluate and choose rows together; then one goes on, in the middle of the changes.

    The rate is small: AdamW would make more of the last bits of a step with every further one.
    """
    config = configuration(text, Dynamic(every=2, floor=0.05))
    config = dataclasses.replace(config, accumulate=2, optimizer=AdamW(learning_rate=1e-6))
    train(config, tmp_path / "one")

    def work(mesh: Mesh) -> dict[str, torch.Tensor]:
        train(config, tmp_path / "two", stop=iter([False] * 5 + [True]).__next__, mesh=mesh)
        return {}

    together(Topology(expert=2), work)
    train(config, tmp_path / "two", resume=True)
    one, two = shares(tmp_path / "one"), shares(tmp_path / "two")
    assert list(one) == list(two)
    assert len({tuple(of.values()) for of in one.values()}) > 2, "shares moved"
    for step, expected in one.items():
        assert two[step] == pytest.approx(expected, rel=1e-5)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def losses(out: Path) -> list[float]:
    return [r.loss for r in read_metrics(out / "metrics.jsonl").records if r.loss is not None]
