from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch

from consilium.config.balance import AdaptiveLoss, Balance, LinearBias
from consilium.config.model import Model
from consilium.config.moe import Capacity
from consilium.config.optimizer import AdamW
from consilium.config.router import Jitter, LearnedNoise, Noise
from consilium.config.training import Training
from consilium.data.batch import Batch
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.moe.types import Routing
from consilium.training.guard import PATIENCE, check_patience, clip
from consilium.training.optimizer import build_optimizer, moments, restore_moments, set_rate
from consilium.training.step import StepResult, train_step
from small import DEEPSEEK, SWITCH, lively, random_batch
from support import relative_error


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
    before = {layer: moe.balance.bias_E.clone() for layer, moe in model.moe_modules().items()}
    [result] = run(model, settings(DEEPSEEK, accumulate=2), 1)
    for layer, load in result.loads.items():
        bias_E = model.moe_modules()[layer].balance.bias_E
        assert bias_E is not None
        excess_E = load.load_E - load.load_E.double().mean()
        assert torch.allclose(bias_E, before[layer] - 1e-2 * excess_E.sign().float(), atol=1e-7)
    assert result.loads.keys() == {1, 2, 3, 4}
    main = sum(int(load.load_E.sum()) for layer, load in result.loads.items() if layer < 3)
    assert main == 2 * 2 * 80


def with_moe(model: Model, *, router: dict[str, object], **changes: object) -> Model:
    assert model.moe is not None
    inner = dataclasses.replace(model.moe.router, **router)
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, router=inner, **changes))


def test_balance_moves_by_what_the_router_wanted_and_by_the_share_that_was_dropped() -> None:
    adaptive, bias = AdaptiveLoss(start=0.5, most=1.0, slope=0.3, momentum=0.75), LinearBias(rate=0.1)
    config = with_moe(
        SWITCH,
        router={"offset": "scores"},
        admission=Capacity(factor=0.6),
        balance=Balance(losses=(adaptive,), bias=bias),
    )
    model = lively(config)
    before = {layer: moe.balance.bias_E.double() for layer, moe in model.moe_modules().items()}
    [result] = run(model, settings(config, accumulate=2), 1)
    for layer, load in result.loads.items():
        kept_E, wanted_E = load.load_E.double(), load.wanted_E.double()
        assert 0 < kept_E.sum() < wanted_E.sum() == 80
        balance = model.moe_modules()[layer].balance
        moved_E = -0.1 * (4 * wanted_E - 80) / 80
        assert relative_error(balance.bias_E.double() - before[layer], moved_E) < 1e-5
        coefficient = 0.75 * 0.5 + 0.25 * 0.3 * (1 - float(kept_E.sum()) / 80)
        assert float(balance.coefficient) == pytest.approx(coefficient, rel=1e-6)


class SameRows:
    """Every micro-batch of every step has the same rows."""

    def micro(self, step: int, index: int, count: int) -> Batch:
        return random_batch(2, 20)


def logits_by_micro_batch(config: Training, step: int) -> list[torch.Tensor]:
    """Router logits of the first MoE layer in each micro-batch of a step from the same weights."""
    model, seen = lively(config.model), list[torch.Tensor]()

    def see(_module: torch.nn.Module, _inputs: object, routing: Routing) -> None:
        seen.append(routing.logits_TE.detach())

    next(iter(model.moe_modules().values())).router.register_forward_hook(see)
    train_step(model, build_optimizer(model, config.optimizer), SameRows(), config, step)
    return seen


@pytest.mark.parametrize("noise", [Jitter(epsilon=0.1), LearnedNoise()], ids=repr)
def test_noise_is_drawn_anew_for_each_seed_step_and_micro_batch_and_for_nothing_else(noise: Noise) -> None:
    config = settings(with_moe(SWITCH, router={"noise": noise}), accumulate=2)
    first, again = logits_by_micro_batch(config, 0), logits_by_micro_batch(config, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = logits_by_micro_batch(config, 1) + logits_by_micro_batch(dataclasses.replace(config, seed=1), 0)
    draws = first + others
    assert len(draws) == 6
    for i, draw in enumerate(draws):
        assert not any(torch.equal(draw, other) for other in draws[:i])


class Questions(Rows):
    """Rows of which nothing is learned."""

    def micro(self, step: int, index: int, count: int) -> Batch:
        batch = super().micro(step, index, count)
        return dataclasses.replace(batch, targets_BS=torch.full_like(batch.targets_BS, -1))


def test_a_step_without_anything_to_learn_has_no_loss_and_moves_nothing() -> None:
    """Momentum, decay and the balance of the routers would else move the weights on the word of nobody."""
    model, config = lively(DEEPSEEK), settings(DEEPSEEK, accumulate=2)
    optimizer = build_optimizer(model, config.optimizer)
    learned = train_step(model, optimizer, Rows(), config, 0)
    weights, moved = state(model), {k: v.clone() for k, v in moments(optimizer, model).items()}
    result = train_step(model, optimizer, Questions(), config, 1)
    assert (learned.targets > 0, learned.skipped, result.targets, result.skipped) == (True, False, 0, True)
    assert math.isnan(result.loss)
    assert math.isnan(result.ce)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(moved[name], tensor) for name, tensor in moments(optimizer, model).items())


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


def test_one_bad_value_in_any_gradient_changes_no_bit(record_property: Callable[[str, object], None]) -> None:
    model, config = lively(DEEPSEEK), settings(DEEPSEEK)
    optimizer = build_optimizer(model, config.optimizer)
    train_step(model, optimizer, Rows(), config, 0)
    weights, moved = state(model), {k: v.clone() for k, v in moments(optimizer, model).items()}
    choose, parameters = random.Random(0), list(model.parameters())
    for step in range(1, 51):
        bad = choose.choice([math.nan, math.inf, -math.inf])

        def spoil(gradient: torch.Tensor, bad: float = bad) -> torch.Tensor:
            spoiled = gradient.clone()
            spoiled.view(-1)[choose.randrange(spoiled.numel())] = bad
            return spoiled

        hook = choose.choice(parameters).register_hook(spoil)
        assert train_step(model, optimizer, Rows(), config, step).skipped
        hook.remove()
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        assert all(torch.equal(moved[name], tensor) for name, tensor in moments(optimizer, model).items())
    record_property("trials", 50)
    assert not train_step(model, optimizer, Rows(), config, 51).skipped


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


def test_steps_of_adamw_are_those_worked_out_in_float64() -> None:
    config = AdamW(learning_rate=1.0, beta1=0.7, beta2=0.6, epsilon=0.05, decay=0.3)
    model, generator = torch.nn.Linear(3, 2), torch.Generator().manual_seed(0)
    optimizer = build_optimizer(model, config)
    expected = {p: p.detach().double() for p in model.parameters()}
    first, second = ({p: torch.zeros_like(w) for p, w in expected.items()} for _ in range(2))
    for step, rate in enumerate((0.1, 0.2, 0.05), start=1):
        for p in model.parameters():
            p.grad = 0.1 * torch.randn(p.shape, generator=generator)
            g = p.grad.double()
            first[p] = 0.7 * first[p] + 0.3 * g
            second[p] = 0.6 * second[p] + 0.4 * g * g
            size = (second[p] / (1 - 0.6**step)).sqrt() + 0.05
            decay = 0.3 if p.ndim == 2 else 0.0
            expected[p] -= rate * (decay * expected[p] + first[p] / (1 - 0.7**step) / size)
        set_rate(optimizer, rate)
        optimizer.step()
    for p, wanted in expected.items():
        assert relative_error(p, wanted) < 1e-6


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
