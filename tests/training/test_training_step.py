from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from consilium.config.model import Model
from consilium.config.training import Training
from consilium.data.batch import Batch
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.training.guard import PATIENCE, check_patience, clip
from consilium.training.optimizer import build_optimizer, moments, restore_moments
from consilium.training.step import StepResult, train_step
from small import DEEPSEEK, SWITCH, lively, random_batch


class Rows:
    """A loader of random rows, as a pure function of the step."""

    def micro(self, step: int, index: int, count: int) -> Batch:
        size = 4 // count
        batch = random_batch(4, 20, seed=step)
        part = slice(index * size, (index + 1) * size)
        return dataclasses.replace(
            batch, **{field.name: getattr(batch, field.name)[part] for field in dataclasses.fields(batch)}
        )


def settings(model: Model, **changes: object) -> Training:
    return dataclasses.replace(Training(model=model, steps=20, batch=4), **changes)


def run(model: Decoder, config: Training, steps: int) -> list[StepResult]:
    optimizer = build_optimizer(model, config.optimizer)
    return [train_step(model, optimizer, Rows(), config, step) for step in range(steps)]


def state(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("config", [DEEPSEEK, SWITCH], ids=["deepseek", "switch"])
def test_two_runs_of_one_seed_agree_to_the_last_bit(config: Model) -> None:
    models = [lively(config), lively(config)]
    results = [run(model, settings(config), 4) for model in models]
    assert [r.loss for r in results[0]] == [r.loss for r in results[1]]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_bias_moves_once_a_step_against_the_load_of_all_micro_batches() -> None:
    model = lively(DEEPSEEK)
    before = {layer: moe.balance.bias_E.clone() for layer, moe in model.moe_layers().items()}
    [result] = run(model, settings(DEEPSEEK, accumulate=2), 1)
    for layer, load in result.loads.items():
        bias_E = model.moe_layers()[layer].balance.bias_E
        assert bias_E is not None
        excess_E = load.load_E - load.load_E.double().mean()
        assert torch.allclose(bias_E, before[layer] - 1e-2 * excess_E.sign().float(), atol=1e-7)
    assert result.loads.keys() == {1, 2, 3, 4}
    main = sum(int(load.load_E.sum()) for layer, load in result.loads.items() if layer < 3)
    assert main == 2 * 2 * 80


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_bad_weight_changes_nothing_and_says_so(value: float) -> None:
    model = lively(DEEPSEEK)
    config = settings(DEEPSEEK)
    optimizer = build_optimizer(model, config.optimizer)
    train_step(model, optimizer, Rows(), config, 0)
    with torch.no_grad():
        model.layers[1].moe.router.projection.weight[0, 0] = value
    weights, moved = state(model), {k: v.clone() for k, v in moments(optimizer, model).items()}
    result = train_step(model, optimizer, Rows(), config, 1)
    assert result.skipped
    after = model.state_dict()
    assert all(torch.equal(weights[n].nan_to_num(9.0), after[n].nan_to_num(9.0)) for n in weights)
    assert all(torch.equal(moved[n], tensor) for n, tensor in moments(optimizer, model).items())


def test_a_run_of_bad_steps_ends_with_one_sentence() -> None:
    check_patience(PATIENCE - 1, 5)
    with pytest.raises(ConsiliumError, match="step 5: loss or gradient was not finite 10 steps in a row"):
        check_patience(PATIENCE, 5)


def test_clipping_returns_the_norm_before_and_bounds_the_norm_after() -> None:
    model = torch.nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    assert clip(model, 1.0) == pytest.approx(2.0 * math.sqrt(8))
    assert clip(model, 1.0) == pytest.approx(1.0, rel=1e-4)


def test_only_matrices_decay() -> None:
    model = lively(DEEPSEEK)
    optimizer = build_optimizer(model, Training(model=DEEPSEEK, steps=1).optimizer)
    decaying = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decaying) == (parameter.ndim >= 2), name
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_moments_come_back_as_they_were() -> None:
    model = lively(DEEPSEEK)
    config = settings(DEEPSEEK)
    optimizer = build_optimizer(model, config.optimizer)
    train_step(model, optimizer, Rows(), config, 0)
    fresh = build_optimizer(model, config.optimizer)
    assert moments(fresh, model) == {}
    restore_moments(fresh, model, moments(optimizer, model))
    saved, restored = moments(optimizer, model), moments(fresh, model)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
