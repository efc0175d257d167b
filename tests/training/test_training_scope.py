"""A balance loss over the whole step: micro-batches know what the earlier ones chose.

Legend: E experts.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from consilium.config.balance import (
    SMEBU,
    Balance,
    BiasRule,
    CommunicationLoss,
    DeviceLoss,
    LinearBias,
    PIDBias,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SwitchLoss,
    ZLoss,
)
from consilium.config.model import Model
from consilium.config.router import NoNoise, TopK
from consilium.config.training import Training
from consilium.data.batch import Batch
from consilium.model.types import Inputs, Options
from consilium.moe.types import Counted, Mode, Routing
from consilium.training.objective import Share, training_loss
from consilium.training.optimizer import build_optimizer
from consilium.training.step import StepResult, gradients, train_step
from small import DEEPSEEK, SWITCH, lively, random_batch
from support import relative_error


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    """The same rows at every step, in one micro-batch."""

    batch: Batch

    def micro(self, step: int, index: int, count: int) -> Batch:
        assert (index, count, step) == (0, 1, 0)
        return self.batch


class Rows:
    """Four random rows a step in equal micro-batches, the loader's rows as a function of the step."""

    def micro(self, step: int, index: int, count: int) -> Batch:
        size = 4 // count
        batch = random_batch(4, 20, seed=step)
        part = slice(index * size, (index + 1) * size)
        return dataclasses.replace(
            batch, **{field.name: getattr(batch, field.name)[part] for field in dataclasses.fields(batch)}
        )


def balanced(config: Model, scope: str) -> Model:
    assert config.moe is not None
    losses = (SwitchLoss(coefficient=1.0, scope=scope), SequenceLoss(coefficient=0.1))
    balance = Balance(losses=losses, bias=config.moe.balance.bias)
    router = dataclasses.replace(config.moe.router, noise=NoNoise())
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, balance=balance, router=router))


def counted(wanted_E: torch.Tensor) -> Counted:
    """Of an earlier micro-batch; losses that read these counts do not read its tokens."""
    return Counted(wanted_E.long(), torch.zeros((), dtype=torch.int64))


def stepped(config: Model, **changes: object) -> tuple[StepResult, dict[str, torch.Tensor]]:
    model = lively(config)
    training = dataclasses.replace(Training(model=config, steps=20, batch=4), **changes)
    result = train_step(model, build_optimizer(model, training.optimizer), Rows(), training, 0)
    return result, dict(model.state_dict())


kinds = pytest.mark.parametrize("kind", [DEEPSEEK, SWITCH], ids=["deepseek", "switch"])


@kinds
def test_one_micro_batch_is_the_whole_step(kind: Model) -> None:
    (batch, weights), (whole, same) = (stepped(balanced(kind, scope)) for scope in ("batch", "global"))
    assert batch.balance == whole.balance
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@kinds
@pytest.mark.parametrize("accumulate", [2, 4])
def test_each_micro_batch_counts_itself_and_those_before(kind: Model, accumulate: int) -> None:
    """By hand: f from the summed counts of each layer, P from the micro-batch, which counts by its tokens."""
    config = balanced(kind, "global")
    result, _ = stepped(config, accumulate=accumulate)
    model = lively(config)
    counts = {layer: torch.zeros(moe.balance.experts) for layer, moe in model.moe_modules().items()}
    losses, tokens = (dict.fromkeys(counts, 0.0) for _ in range(2))
    for i in range(accumulate):
        earlier = {layer: counted(count) for layer, count in counts.items()}
        options = Options(mode=Mode(training=True, earlier=earlier))
        batch = Rows().micro(0, i, accumulate)
        seen = training_loss(model, batch, Share(1, 1), options=options)
        plain = training_loss(model, batch, Share(1, 1), options=Options(mode=Mode(training=True)))
        for layer, report in seen.reports.items():
            assert torch.equal(report.wanted_E, plain.reports[layer].wanted_E)
            counts[layer] += report.wanted_E
            losses[layer] += float(report.losses["switch"].detach()) * int(report.tokens)
            tokens[layer] += int(report.tokens)
    total = sum(loss / tokens[layer] for layer, loss in losses.items())
    assert result.balance["switch"] == pytest.approx(total, rel=1e-5)
    other, _ = stepped(balanced(kind, "batch"), accumulate=accumulate)
    assert abs(other.balance["switch"] - result.balance["switch"]) > 1e-4
    for layer, load in result.loads.items():
        assert torch.equal(load.wanted_E, counts[layer].long())


@pytest.mark.parametrize("sequence", ["document", "row"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_loss_by_sequence_does_not_depend_on_micro_batches(accumulate: int, sequence: str) -> None:
    """Rows have unequal numbers of documents, some of a single token, which nothing ahead is left of."""
    assert DEEPSEEK.moe is not None
    losses = (SequenceLoss(coefficient=1.0), DeviceLoss(coefficient=1.0, devices=4, scope="sequence"))
    balance = Balance(losses=losses, bias=DEEPSEEK.moe.balance.bias, sequence=sequence)
    config = dataclasses.replace(DEEPSEEK, moe=dataclasses.replace(DEEPSEEK.moe, balance=balance))
    (whole, wanted), (parts, found) = (graded(config, count) for count in (1, accumulate))
    assert parts.balance == pytest.approx(whole.balance, rel=1e-5)
    assert all(relative_error(found[name], wanted[name]) < 1e-5 for name in wanted)


WHOLE = Balance(
    losses=(
        SwitchLoss(coefficient=1.0, scope="step"),
        DeviceLoss(coefficient=1.0, devices=4, scope="step"),
        CommunicationLoss(coefficient=1.0, devices=2, most=2, scope="step"),
        CommunicationLoss(coefficient=1.0, devices=4, most=2),
        SequenceLoss(coefficient=1.0, counts="scores"),
        ZLoss(coefficient=1.0),
    )
)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_loss_of_the_whole_step_does_not_depend_on_micro_batches(accumulate: int) -> None:
    """Layers that predict ahead have micro-batches of unequal numbers of tokens."""
    config = with_balance(DEEPSEEK, WHOLE)
    (whole, wanted), (parts, found) = (graded(config, count) for count in (1, accumulate))
    assert parts.balance == pytest.approx(whole.balance, rel=1e-5)
    assert parts.norm == pytest.approx(whole.norm, rel=1e-5)
    assert all(relative_error(found[name], wanted[name]) < 1e-5 for name in wanted)


def test_noise_is_the_same_when_choices_are_counted_ahead() -> None:
    """Jitter moves choices: counts of other noise would be those of other choices."""
    assert SWITCH.moe is not None
    config = with_balance(SWITCH, Balance(losses=(SwitchLoss(coefficient=1.0, scope="step"),)))
    result, _ = graded(config, 2)
    total = 0.0
    for layer, load in result.loads.items():
        f_E = load.wanted_E.double() * 4 / load.wanted_E.sum()
        total += sum(float((f_E * p_E).sum()) for p_E in shares(config, layer)) / 2
    assert result.balance["switch"] == pytest.approx(total, rel=1e-5)


def shares(config: Model, layer: int) -> list[torch.Tensor]:
    """Mean probabilities of each of two micro-batches, noise of training included."""
    model, seen = lively(config), list[torch.Tensor]()
    training = dataclasses.replace(Training(model=config, steps=20, batch=4), accumulate=2)

    def see(_module: torch.nn.Module, _inputs: object, routing: Routing) -> None:
        seen.append(routing.scores_TE.detach().double().mean(dim=0))

    model.moe_modules()[layer].router.register_forward_hook(see)
    gradients(model, Rows(), training, 0)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    return seen[2:]


RULES: tuple[BiasRule, ...] = (
    SignBias(rate=0.1),
    LinearBias(rate=0.1),
    SMEBU(rate=0.1),
    PIDBias(),
    QuantileBias(),
    QuantileBias(statistics="histogram"),
)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_bias_moves_alike_however_a_step_is_cut(rule: BiasRule) -> None:
    """Margins are floats of products of other shapes; counts are integers, and so equal."""
    assert DEEPSEEK.moe is not None
    router = dataclasses.replace(DEEPSEEK.moe.router, select=TopK(k=2))
    moe = dataclasses.replace(DEEPSEEK.moe, router=router, balance=Balance(bias=rule))
    config = dataclasses.replace(DEEPSEEK, moe=moe)
    start = lively(config).state_dict()
    moved = [stepped(config, accumulate=count)[1] for count in (1, 2, 4)]
    biases = [name for name in start if name.endswith("bias_E")]
    assert len(biases) == 4
    for name in biases:
        steps = [weights[name] - start[name] for weights in moved]
        assert steps[0].any()
        assert all(relative_error(step, steps[0]) < 1e-5 for step in steps[1:])


def with_balance(config: Model, balance: Balance) -> Model:
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, balance=balance))


def graded(config: Model, accumulate: int) -> tuple[StepResult, dict[str, torch.Tensor]]:
    model = lively(config)
    training = dataclasses.replace(Training(model=config, steps=20, batch=4), accumulate=accumulate)
    result = gradients(model, Rows(), training, 0)
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_step_of_single_tokens_has_nothing_to_learn_and_finite_gradients() -> None:
    batch = random_batch(4, 6)
    alone = torch.arange(6).expand(4, 6).contiguous()
    batch = dataclasses.replace(
        batch,
        sequence_BS=alone,
        position_BS=torch.zeros_like(alone),
        targets_BS=torch.full_like(alone, -1),
    )
    model = lively(DEEPSEEK)
    training = Training(model=DEEPSEEK, steps=20, batch=4)
    result = gradients(model, Fixed(batch), training, 0)
    assert result.skipped
    assert math.isnan(result.loss)
    assert math.isfinite(result.norm)
    assert result.ahead == 0


@pytest.mark.parametrize("statistics", ["exact", "histogram"])
def test_recomputation_and_padding_are_in_no_margin(statistics: str) -> None:
    """Twice the margins, or those of padding, would be other quantiles."""
    assert DEEPSEEK.moe is not None
    router = dataclasses.replace(DEEPSEEK.moe.router, select=TopK(k=2))
    balance = Balance(bias=QuantileBias(statistics=statistics))
    moe = dataclasses.replace(DEEPSEEK.moe, router=router, balance=balance)
    config = dataclasses.replace(DEEPSEEK, moe=moe)
    kept, again = (stepped(config, accumulate=2, recompute=recompute)[1] for recompute in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    batch = random_batch(4, 20)
    wide = dataclasses.replace(
        batch,
        **{
            field.name: torch.nn.functional.pad(getattr(batch, field.name), (0, 7), value=fill)
            for field, fill in zip(dataclasses.fields(batch), (5, -1, 0, 0, False), strict=True)
        },
    )
    moved = []
    for rows in (batch, wide):
        model = lively(config)
        training = Training(model=config, steps=20, batch=4)
        train_step(model, build_optimizer(model, training.optimizer), Fixed(rows), training, 0)
        moved.append([module.balance.bias_E for module in model.moe_modules().values()])
    for plain, padded in zip(*moved, strict=True):
        assert relative_error(padded, plain) < 1e-5


@kinds
def test_recomputation_counts_nothing_twice(kind: Model) -> None:
    config = balanced(kind, "global")
    kept, weights = stepped(config, accumulate=4)
    again, same = stepped(config, accumulate=4, recompute=True)
    assert kept.balance == again.balance
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@kinds
def test_no_step_reads_the_one_before(kind: Model) -> None:
    config = balanced(kind, "global")
    training = dataclasses.replace(Training(model=config, steps=20, batch=4), accumulate=2)
    model = lively(config)
    optimizer = build_optimizer(model, training.optimizer)
    train_step(model, optimizer, Rows(), training, 0)
    fresh = lively(config)
    fresh.load_state_dict(model.state_dict())
    second = train_step(model, optimizer, Rows(), training, 1)
    alone = train_step(fresh, build_optimizer(fresh, training.optimizer), Rows(), training, 1)
    assert second.balance == alone.balance


def test_the_loss_pairs_the_counts_of_the_step_with_the_probabilities_of_the_batch() -> None:
    """In values and gradients, against sums over experts in float64."""
    model, batch = lively(balanced(SWITCH, "global")), random_batch(2, 20)
    earlier_E = torch.tensor([400, 0, 7, 3])
    mode = Mode(training=True, earlier={1: counted(earlier_E)})
    inputs = Inputs.of(batch)
    hidden = model.hidden(inputs, options=Options(mode=mode, routings=True))
    routing, report = hidden.routings[1], hidden.reports[0]
    count_E = (routing.experts_TK == torch.arange(4)).sum(dim=0).double() + earlier_E
    p_E = routing.scores_TE.double().mean(dim=0)
    expected = 4 * sum(count_E[e] / count_E.sum() * p_E[e] for e in range(4))
    switch = report.losses["switch"]
    assert relative_error(switch, expected) < 1e-6
    weight = model.layers[1].moe.router.projection.weight
    (found,) = torch.autograd.grad(switch, weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, weight)
    assert relative_error(found, wanted) < 1e-5
    other = model.hidden(inputs, options=Options(mode=Mode(training=True)))
    assert relative_error(other.reports[0].losses["switch"], expected) > 1e-2
    assert torch.equal(report.losses["sequence"], other.reports[0].losses["sequence"])


def test_first_choices_of_a_whole_step_are_refused() -> None:
    with pytest.raises(ValueError, match="'global' reads the loads of the step, which count every choice"):
        SwitchLoss(counts="first", scope="global")
