"""Averages of the weights, and batches that grow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import consilium as cs
from consilium.checkpoint import store
from consilium.checkpoint.verify import verify_folder
from consilium.cli.main import main
from consilium.config.optimizer import Exponential, LinearRamp, NoRamp
from consilium.config.training import Training
from consilium.data.corpus import build_corpus
from consilium.errors import ConsiliumError
from consilium.training.average import Averaged
from consilium.training.budget import Tokens, steps_of
from consilium.training.events import Event, Stepped
from consilium.training.loop import train
from consilium.training.run import loader_of
from consilium.training.schedule import first_batches, mean_batch
from small import DEEPSEEK, lively
from support import relative_error
from training.test_training_resume import Killed, assert_same, configuration, killed_after, text

__all__ = ["text"]


def test_an_average_is_the_mean_at_first_and_then_forgets() -> None:
    model = lively(DEEPSEEK)
    averaged = Averaged(model, Exponential(decay=0.75), ("embed.*",))
    seen: list[dict[str, torch.Tensor]] = []
    for step in range(1, 9):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        averaged.add(model, step)
        seen.append({name: value.double().clone() for name, value in model.state_dict().items()})
    content = averaged.content(model)
    for name, value in content.weights.items():
        expected = torch.stack([weights[name] for weights in seen[:4]]).mean(0)
        for weights in seen[4:]:
            expected = 0.75 * expected + 0.25 * weights[name]
        wanted = seen[-1][name] if name.startswith("embed.") else expected
        assert relative_error(value, wanted) < 1e-6, name


def test_a_run_keeps_its_average_through_a_crash_and_it_is_a_model(text: Path, tmp_path: Path) -> None:
    config = configuration(text, average=Exponential(decay=0.6), save_every=2)
    train(config, tmp_path / "whole")
    for step in (3, 6):
        with pytest.raises(Killed):
            train(config, tmp_path / "broken", resume=True, listeners=(killed_after(step),))
    train(config, tmp_path / "broken", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "broken")
    models = [cs.load(tmp_path / name / "checkpoints/step-8/average") for name in ("whole", "broken")]
    last = cs.load(tmp_path / "whole").state_dict()
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], last[name]) for name in first)
    averaged = tmp_path / "whole/checkpoints/step-8/average"
    assert main(["eval", str(averaged), "--data", str(text), "--limit", "64", "--json"]) == 0
    assert not verify_folder(averaged.parent).faults


ramps = st.builds(LinearRamp, start=st.sampled_from([2, 4, 8]), share=st.sampled_from([0.1, 0.5, 1.0]))


@given(ramps, st.integers(1, 60), st.sampled_from([1, 2]))
def test_batches_rise_from_the_start_to_the_whole(ramp: LinearRamp, steps: int, accumulate: int) -> None:
    config = Training(model=DEEPSEEK, steps=steps, batch=8, accumulate=accumulate, ramp=ramp)
    sizes = [*first_batches(config), 8]
    assert sizes[0] == ramp.start or len(sizes) < 12
    assert sizes == sorted(sizes)
    assert sizes[0] >= ramp.start
    assert not any(size % accumulate for size in sizes)
    rows = sum(([*sizes[:-1]] + [8] * steps)[:steps])
    assert abs(rows - mean_batch(config) * steps) <= 16


def test_growing_batches_read_the_text_in_order_and_a_resume_reads_on(text: Path, tmp_path: Path) -> None:
    config = configuration(text, batch=8, steps=10, ramp=LinearRamp(start=2, share=0.5), save_every=2)
    corpus = build_corpus(config.data, 300, start=config.tokenizer)
    grown = loader_of(config, corpus)
    plain = loader_of(dataclasses.replace(config, batch=1, accumulate=1, ramp=NoRamp()), corpus)
    rows = torch.cat([grown.batch(step).ids_BS for step in range(10)])
    assert [grown.size(step) for step in range(10)] == [2, 4, 6, 6, 8, 8, 8, 8, 8, 8]
    assert torch.equal(rows, torch.cat([plain.batch(row).ids_BS for row in range(66)]))
    halves = torch.cat([grown.micro(4, i, 2).ids_BS for i in range(2)])
    assert torch.equal(halves, grown.batch(4).ids_BS)
    told: list[Event] = []
    train(config, tmp_path / "whole", listeners=(told.append,))
    with pytest.raises(Killed):
        train(config, tmp_path / "broken", resume=True, listeners=(killed_after(5),))
    finished = train(config, tmp_path / "broken", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "broken")
    assert store.load_training_state(finished.checkpoint).scalars["rows"] == 66
    assert finished.tokens == 66 * 24
    assert [event.result.tokens for event in told if isinstance(event, Stepped)][:3] == [48, 96, 144]


def test_tokens_are_counted_out_over_growing_batches() -> None:
    config = Training(model=DEEPSEEK, steps=1, batch=8, ramp=LinearRamp(start=2, share=0.5))
    steps = steps_of(Tokens(100_000), config)
    config = dataclasses.replace(config, steps=steps)
    rows = sum(first_batches(config)) + 8 * (steps - len(first_batches(config)))
    assert rows * config.data.sequence_length == pytest.approx(100_000, rel=0.03)


def test_a_ramp_that_does_not_fit_is_refused() -> None:
    for start, batch, accumulate in ((16, 8, 1), (3, 8, 2)):
        with pytest.raises(ConsiliumError, match=f"ramp.start {start} is no batch to begin with"):
            Training(
                model=DEEPSEEK, steps=1, batch=batch, accumulate=accumulate, ramp=LinearRamp(start=start)
            )
