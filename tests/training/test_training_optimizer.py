"""The optimizers: each step beside its formula, which weights each rule moves, and what is remembered."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from consilium.config import io
from consilium.config.model import Model
from consilium.config.optimizer import AdamW, BlockState, Exponential, Muon, Optimizer
from consilium.config.training import Training
from consilium.errors import ConsiliumError
from consilium.moe.experts import Experts
from consilium.ops.orthogonal import COEFFICIENTS
from consilium.parallel.mesh import ALONE
from consilium.planner.training import is_hidden, run_memory, state_bytes
from consilium.training import block_adamw
from consilium.training.freeze import freeze, is_frozen
from consilium.training.muon import StackedMuon
from consilium.training.optimizer import build_optimizer, moments, restore_moments, set_rate
from consilium.training.spread import dealt
from consilium.training.step import train_step
from small import DEEPSEEK, KINDS, SWITCH, lively
from support import relative_error
from training.test_training_step import Rows, settings

EIGHT_BIT = AdamW(state=BlockState(block=64, smallest=64))
KINDS_OF_OPTIMIZER = {"adamw": AdamW(), "8-bit": EIGHT_BIT, "muon": Muon()}
optimizers = pytest.mark.parametrize("config", KINDS_OF_OPTIMIZER.values(), ids=KINDS_OF_OPTIMIZER.keys())
models = pytest.mark.parametrize("model", KINDS.values(), ids=KINDS.keys())


def with_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)


def orthogonal(matrix_MN: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix_MN, full_matrices=False)
    s = s / matrix_MN.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def matrices(weight: Tensor, parts: int) -> list[Tensor]:
    """Every matrix of a parameter by itself: of each expert, gate and up apart."""
    return [part for matrix in weight.view(-1, *weight.shape[-2:]) for part in matrix.chunk(parts)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_of_muon_are_those_of_each_matrix_alone_in_float64(nesterov: bool) -> None:
    config = Muon(momentum=0.8, nesterov=nesterov, rms=0.3, decay=0.4)
    model = lively(DEEPSEEK)
    optimizer = build_optimizer(model, config)
    gated = {id(m.up) for m in model.modules() if isinstance(m, Experts)}
    gated |= {
        id(p)
        for name, p in model.named_parameters()
        if name.endswith(("feed_forward.up.weight", "shared.up.weight"))
    }
    chosen = {n: p for n, p in model.named_parameters() if is_hidden(n, p.ndim)}
    parts = {name: 2 if id(p) in gated else 1 for name, p in chosen.items()}
    weights = {
        name: [w.double().clone() for w in matrices(p.detach(), parts[name])] for name, p in chosen.items()
    }
    memory = {name: [torch.zeros_like(w) for w in own] for name, own in weights.items()}
    for step, rate in enumerate((0.1, 0.02)):
        with_gradients(model, step)
        for name, p in chosen.items():
            for i, narrow in enumerate(matrices(p.grad, parts[name])):
                g = narrow.double()
                memory[name][i] = 0.8 * memory[name][i] + 0.2 * g
                ahead = 0.2 * g + 0.8 * memory[name][i] if nesterov else memory[name][i]
                size = 0.3 * max(g.shape) ** 0.5
                weights[name][i] -= rate * (0.4 * weights[name][i] + size * orthogonal(ahead))
        set_rate(optimizer, rate)
        optimizer.step()
    for name, p in chosen.items():
        for actual, expected in zip(matrices(p.detach(), parts[name]), weights[name], strict=True):
            assert relative_error(actual, expected) < 1e-5, name
    assert max(parts.values()) == 2


def test_an_update_of_muon_is_as_large_as_one_of_adamw() -> None:
    """Root mean square 0.2 (2502.16982 section 2.2), whatever the shape."""
    for shape in ((64, 64), (16, 128), (200, 8)):
        layer = nn.Linear(*reversed(shape), bias=False)
        before = layer.weight.detach().clone()
        optimizer = build_optimizer(layer, Muon(decay=0.0, learning_rate=1.0))
        with_gradients(layer, 0)
        optimizer.step()
        assert (layer.weight.detach() - before).square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_muon_of_one_matrix_agrees_with_that_of_torch() -> None:
    """An outside implementation, whose products are bfloat16."""
    ours, theirs = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
    theirs.load_state_dict(ours.state_dict())
    config = Muon(products="bfloat16", learning_rate=0.02)
    mine = build_optimizer(ours, config)
    other = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = ours.weight.detach().clone()
    for step in range(5):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        mine.step()
        other.step()
    assert relative_error(ours.weight - before, theirs.weight - before) < 2e-2


@models
def test_muon_moves_hidden_matrices_and_adamw_the_rest(model: Model) -> None:
    decoder = lively(model)
    optimizer = build_optimizer(decoder, Muon())
    muon = {
        p
        for rule in optimizer.rules
        if isinstance(rule, StackedMuon)
        for g in rule.param_groups
        for p in g["params"]
    }
    for name, parameter in decoder.named_parameters():
        other = parameter.ndim < 2 or any(part in name for part in ("embed.", "head.", "router."))
        assert (parameter in muon) != other, name
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(decoder.parameters()))


def test_an_expert_without_tokens_or_memory_stays_where_it_is_but_for_decay() -> None:
    layer = nn.Module()
    layer.up = nn.Parameter(torch.randn(3, 4, 6))
    optimizer = build_optimizer(layer, Muon(decay=0.1, learning_rate=0.5))
    layer.up.grad = torch.randn(3, 4, 6)
    layer.up.grad[1] = 0
    before = layer.up.detach().clone()
    optimizer.step()
    assert torch.equal(layer.up[1], before[1] * (1 - 0.5 * 0.1))


def after_thirty_steps(config: AdamW, decades: float) -> Tensor:
    """From 0, with gradients that differ by so many decades inside each block."""
    layer = nn.Linear(50, 41, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(layer, config)
    for step in range(30):
        with_gradients(layer, step)
        layer.weight.grad *= torch.logspace(-decades, 0, 50)
        set_rate(optimizer, 1e-3)
        optimizer.step()
    return layer.weight.detach()


def test_moments_of_8_bits_take_the_way_of_float32_within_a_bound() -> None:
    coded = AdamW(decay=0.0, state=BlockState(block=64, smallest=0))
    for decades, bound in ((0.0, 0.03), (1.0, 0.06)):
        expected = after_thirty_steps(AdamW(decay=0.0), decades)
        assert 0 < relative_error(after_thirty_steps(coded, decades), expected) < bound
    # What lies too far below the largest of its block moves less than it would, never more than a step.
    assert after_thirty_steps(coded, 6.0).abs().max() < 30 * 1e-3 * 1.2


def test_a_step_in_stretches_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    for together in (64, 2**22):
        monkeypatch.setattr(block_adamw, "TOGETHER", together)
        model = lively(DEEPSEEK)
        optimizer = build_optimizer(model, EIGHT_BIT)
        for step in range(3):
            with_gradients(model, step)
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@optimizers
def test_what_is_remembered_comes_back_and_goes_on_to_the_same_bits(config: Optimizer) -> None:
    model, other = lively(DEEPSEEK), lively(DEEPSEEK, seed=1)
    optimizer, fresh = build_optimizer(model, config), build_optimizer(other, config)
    training = settings(DEEPSEEK, optimizer=config)
    for step in range(2):
        train_step(model, optimizer, Rows(), training, step)
    assert moments(fresh, other) == {}
    other.load_state_dict(model.state_dict())
    restore_moments(fresh, other, moments(optimizer, model))
    for decoder, rules in ((model, optimizer), (other, fresh)):
        train_step(decoder, rules, Rows(), training, 2)
    for mine, theirs in (
        (model.state_dict(), other.state_dict()),
        (moments(optimizer, model), moments(fresh, other)),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@optimizers
@models
@pytest.mark.parametrize(
    "patterns", [(), ("*", "!*.attention.*"), ("embed.weight", "*.attention.*")], ids=str
)
def test_memory_is_planned_to_the_byte_and_a_frozen_part_has_no_state(
    config: Optimizer, model: Model, patterns: tuple[str, ...]
) -> None:
    decoder = lively(model)
    freeze(decoder, patterns)
    training = dataclasses.replace(settings(model, optimizer=config), freeze=patterns)
    optimizer = build_optimizer(decoder, config)
    with_gradients(decoder, 0)
    optimizer.step()
    held = {name: value for name, value in moments(optimizer, decoder).items() if not name.endswith(":step")}
    planned = run_memory(training)
    assert sum(v.numel() * v.element_size() for v in held.values()) == planned.optimizer
    assert sum(p.grad.numel() * 4 for p in decoder.parameters() if p.grad is not None) == planned.gradients
    assert sum(p.numel() * 4 for p in decoder.parameters()) == planned.weights
    assert not [name for name in held if is_frozen(name.partition(":")[0], patterns)]


def test_8_bits_and_muon_need_less_than_adamw() -> None:
    plain, eight, muon = (state_bytes(DEEPSEEK, c) for c in (AdamW(), EIGHT_BIT, Muon()))
    assert eight < muon < plain


def test_routers_have_a_rate_of_their_own_on_the_same_curve() -> None:
    config = Muon(learning_rate=0.01, router_learning_rate=0.002)
    model = lively(DEEPSEEK)
    optimizer = build_optimizer(model, config)
    set_rate(optimizer, 0.005)
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.001 if "router." in names[parameter] else 0.005)


@optimizers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_arithmetic_are_float32_in_every_dtype_of_products(
    config: Optimizer, dtype: str
) -> None:
    model = lively(SWITCH)
    optimizer = build_optimizer(model, config)
    train_step(model, optimizer, Rows(), settings(SWITCH, optimizer=config, dtype=dtype, accumulate=2), 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    kinds = {value.dtype for value in moments(optimizer, model).values()}
    assert kinds == ({torch.float32, torch.uint8} if config is EIGHT_BIT else {torch.float32})


@optimizers
def test_every_optimizer_learns(config: Optimizer) -> None:
    config = dataclasses.replace(config, learning_rate=0.01)
    model = lively(DEEPSEEK)
    optimizer = build_optimizer(model, config)
    training = settings(DEEPSEEK, optimizer=config, steps=12)

    class Same:
        def micro(self, step: int, index: int, count: int) -> object:
            return Rows().micro(0, index, count)

    losses = [train_step(model, optimizer, Same(), training, step).ce for step in range(12)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"optimizer": EIGHT_BIT}, "optimizer.state.kind int8"),
        ({"saving": "background"}, "saving background"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_one_process_alone_can_is_refused_over_several(changes: dict[str, object], what: str) -> None:
    two = dataclasses.replace(ALONE, world=dataclasses.replace(ALONE.world, size=2))
    dealt(settings(DEEPSEEK, **changes), ALONE)
    dealt(settings(DEEPSEEK, optimizer=Muon(), average=Exponential()), two)
    with pytest.raises(ConsiliumError, match=f"train: {what} runs in one process"):
        dealt(settings(DEEPSEEK, **changes), two)


def test_a_configuration_from_before_there_was_a_choice_is_adamw() -> None:
    data = io.to_data(Training(model=DEEPSEEK, steps=1))
    del data["optimizer"]["kind"], data["optimizer"]["state"]
    data["optimizer"]["learning_rate"] = 0.5
    assert io.from_data(Training, data).optimizer == AdamW(learning_rate=0.5)
