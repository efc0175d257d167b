"""Runs over several processes: exact resume, stops, faults of one of them, and what is refused early."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from consilium.checkpoint import store
from consilium.checkpoint.verify import verify_folder
from consilium.cli.main import main
from consilium.config import io
from consilium.config.data import Data, TextPath
from consilium.config.model import MTP
from consilium.config.optimizer import Exponential, Muon
from consilium.config.training import Bytes, Training
from consilium.errors import ConsiliumError
from consilium.parallel.mesh import ALONE, Mesh
from consilium.parallel.topology import Topology
from consilium.parallel.watch import PeerLost
from consilium.records.metrics import read_metrics
from consilium.training import loop, step
from consilium.training.events import Event, Stepped
from consilium.training.loop import train
from consilium.training.spread import allocated, dealt, drawn
from processes import forked_alone, together
from small import DEEPSEEK
from support import relative_error
from training.kills import TOPOLOGIES
from training.test_training_resume import text
from training.test_training_stops import DTYPES, SLOW, killed_as_the_whole, run_apart

__all__ = ["text"]

SMALL = dataclasses.replace(DEEPSEEK, layers=1, dense_first=0, mtp=MTP(depth=1))
FEW = ("muon-float32-dp2", "adamw-bfloat16-ep2", "muon-bfloat16-dp2ep2")
CELLS = tuple(f"muon-{dtype}-{place}" for dtype in DTYPES for place in TOPOLOGIES if place != "alone")


def configuration(text: Path, **changes: object) -> Training:
    base = Training(
        model=SMALL,
        tokenizer=Bytes(),
        data=Data(sources=(TextPath(path=str(text)),), sequence_length=24),
        steps=5,
        batch=4,
        accumulate=4,
        save_every=2,
        eval_tokens=64,
    )
    return dataclasses.replace(base, **changes)


def losses(out: Path) -> dict[int, float]:
    """By step, as they are on record."""
    return {r.step: r.loss for r in read_metrics(out / "metrics.jsonl").records if r.loss is not None}


@pytest.mark.parametrize(
    ("stops", "chained", "cells"),
    [
        pytest.param(1, 0, FEW, id="a stop a topology", marks=pytest.mark.timeout(300)),
        pytest.param(20, 5, CELLS, id="20 stops and a chain a cell", marks=SLOW),
    ],
)
def test_killed_runs_over_processes_reach_the_hash_of_the_whole_run(
    stops: int,
    chained: int,
    cells: tuple[str, ...],
    text: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """All processes of a run die in one moment, as where a machine loses power."""
    killed_as_the_whole(tmp_path, text, (stops, chained), cells, record_property)


@pytest.mark.skipif(not Path("/proc").exists(), reason="a process of a run is found by /proc, on Linux alone")
@pytest.mark.parametrize("trials", [pytest.param(7, id="21 trials", marks=SLOW)])
def test_a_run_that_loses_a_process_says_which_ends_in_time_and_goes_on_to_the_same_bits(
    trials: int, text: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    topologies = [place for place in TOPOLOGIES if place != "alone"]
    found = run_apart("lost.py", tmp_path, text, trials, *topologies)
    faults = [fault for faults in found.values() for fault in faults if fault]
    record_property("trials", trials * len(topologies))
    record_property("failures", len(faults))
    assert [len(ended) for ended in found.values()] == [trials] * len(topologies)
    assert not faults


def test_a_run_goes_on_over_other_processes(text: Path, tmp_path: Path) -> None:
    """Two by two, then one, then two that share experts: losses and averages are those of one process."""
    config = configuration(text, optimizer=Muon(qk_clip=1e-3), average=Exponential(decay=0.6), eval_every=2)
    train(config, tmp_path / "whole")

    def first(mesh: Mesh) -> Mapping[str, Tensor]:
        train(config, tmp_path / "run", stop=iter([False] * 3 + [True]).__next__, mesh=mesh)
        return {}

    def last(mesh: Mesh) -> Mapping[str, Tensor]:
        train(config, tmp_path / "run", resume=True, mesh=mesh)
        return {}

    together(Topology(data=2, expert=2), first)
    train(config, tmp_path / "run", resume=True, stop=iter([False, True]).__next__)
    together(Topology(expert=2), last)
    ours = losses(tmp_path / "run")
    assert ours == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(ours) == 5
    averages = [tmp_path / name / "checkpoints/step-5/average" for name in ("whole", "run")]
    mean, other = (store.load(average).state_dict() for average in averages)
    for name, value in mean.items():
        assert relative_error(other[name], value) < 1e-5, name
    assert main(["eval", str(averages[1]), "--data", str(text), "--limit", "64", "--json"]) == 0
    assert not verify_folder(averages[1].parent).faults


def test_a_stop_asked_of_one_process_stops_all_at_the_same_step(text: Path, tmp_path: Path) -> None:
    config = configuration(text, steps=50)

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        asked = iter([False, False, False, True])
        mine = (lambda: next(asked)) if mesh.world.rank == 1 else (lambda: False)
        finished = train(config, tmp_path / "run", stop=mine, mesh=mesh)
        return {"steps": torch.tensor(finished.steps)}

    found = together(Topology(data=2), work)
    assert [int(f["steps"]) for f in found] == [2, 2]
    assert (tmp_path / "run/checkpoints/step-2/manifest.json").exists()


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(text: Path, tmp_path: Path) -> None:
    config = configuration(text, steps=2)

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        plain, heard = step.training_loss, list[Event]()

        def poisoned(*rest: object, **options: object) -> object:
            loss = plain(*rest, **options)
            return dataclasses.replace(loss, total=loss.total * float("nan")) if mesh.world.rank else loss

        step.training_loss = poisoned
        run = train(config, tmp_path / "run", listeners=(heard.append,), mesh=mesh)
        skipped = [event.result.skipped for event in heard if isinstance(event, Stepped)]
        assert skipped == ([True, True] if mesh.world.leads else [])
        model, begun = allocated(SMALL, mesh), drawn(config, mesh)
        store.load_weights(model, run.checkpoint, mesh=mesh)
        for (name, now), before in zip(model.state_dict().items(), begun.state_dict().values(), strict=True):
            assert torch.equal(mesh.sharding.part(now).here, mesh.sharding.part(before).here), name
        assert store.load_training_state(run.checkpoint).tensors.keys().isdisjoint({"embed.weight:exp_avg"})
        return {}

    together(Topology(data=2), work)


def test_processes_that_were_started_differently_are_refused(text: Path, tmp_path: Path) -> None:
    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        config = configuration(text, seed=mesh.world.rank)
        with pytest.raises(
            ConsiliumError, match=r"not started alike: rank 0 has 'seed: 0' and rank 1 'seed: 1'"
        ):
            train(config, tmp_path / "run", mesh=mesh)
        return {}

    together(Topology(data=2), work)
    assert not (tmp_path / "run").exists()


def test_a_batch_is_dealt_into_at_least_a_micro_batch_a_process(text: Path) -> None:
    four = dataclasses.replace(ALONE, world=dataclasses.replace(ALONE.world, size=4))
    assert dealt(configuration(text, accumulate=2), four).accumulate == 4
    assert dealt(configuration(text, accumulate=1), ALONE).accumulate == 1
    with pytest.raises(
        ConsiliumError, match="--batch 6 cannot be dealt into 4 micro-batches over 4 processes"
    ):
        dealt(configuration(text, batch=6, accumulate=1), four)


def test_halves_of_a_micro_batch_need_experts_elsewhere_two_rows_and_a_router_that_waits_for_none(
    text: Path,
) -> None:
    two = dataclasses.replace(ALONE.world, size=2)
    shared = dataclasses.replace(ALONE, world=two, expert=two)
    halves = configuration(text, overlap=True, batch=8)
    assert dealt(halves, shared) == halves
    assert dealt(configuration(text, overlap=True), ALONE).overlap
    with pytest.raises(ConsiliumError, match="all are here; give --ep"):
        dealt(halves, dataclasses.replace(ALONE, world=two))
    with pytest.raises(ConsiliumError, match="there is 1; give --batch 8 or more"):
        dealt(configuration(text, overlap=True), shared)
    waits = io.replace(halves, {"model.moe.admission.kind": "capacity", "model.moe.admission.factor": "1.5"})
    with pytest.raises(ConsiliumError, match="must see all tokens at once"):
        dealt(waits, shared)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_process_that_is_lost_is_named_by_the_others_in_time(
    how: signal.Signals, text: Path, tmp_path: Path
) -> None:
    """The others end within the timeout of 4 s and 2 s more, and say who and where."""
    config, limit = configuration(text, steps=500), 4.0

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        lost_at = tmp_path / "lost"

        plain = loop._step

        def stepped(run: loop.Run, *rest: object) -> None:
            if run.progress.step == 1 and mesh.world.rank == 2:
                lost_at.write_text(str(time.time()))
                os.kill(os.getpid(), how)
            plain(run, *rest)

        loop._step = stepped
        with pytest.raises(PeerLost, match=r"rank 2 did not answer in the collective '") as told:
            train(config, tmp_path / "run", mesh=mesh)
        assert f"so rank {mesh.world.rank} stops" in str(told.value)
        assert time.time() - float(lost_at.read_text()) < limit + 2.5
        return {}

    forked_alone(Topology(data=2, expert=2), work, lost=2, limit=limit)
