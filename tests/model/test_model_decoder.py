from __future__ import annotations

import dataclasses

import pytest
import torch

from consilium.config.model import Model
from consilium.model.build import build
from consilium.model.types import Inputs, Options
from consilium.moe.types import Mode
from consilium.training.objective import Share, training_loss
from small import DEEPSEEK, KINDS, lively, random_batch
from support import relative_error

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def training_options(**changes: object) -> Options:
    """Noise on, from a generator of its own."""
    mode = Mode(training=True, generator=torch.Generator().manual_seed(3))
    return dataclasses.replace(Options(mode=mode), **changes)


@kinds
def test_a_seed_is_a_model(config: Model) -> None:
    first, again, other = (build(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert all(bool(tensor.isfinite().all()) for tensor in first.values())


@kinds
def test_a_pass_changes_no_state(config: Model) -> None:
    model = lively(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.arange(12).view(2, 6), options=training_options())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@kinds
def test_packed_documents_are_as_good_as_alone(config: Model) -> None:
    model, batch = lively(config), random_batch(2, 40)
    packed = model(Inputs.of(batch)).logits
    for row in range(2):
        for number in batch.sequence_BS[row].unique():
            place = batch.sequence_BS[row] == number
            alone = model(batch.ids_BS[row, place][None]).logits[0]
            assert relative_error(packed[row, place], alone) < 1e-5


@kinds
def test_padding_takes_part_in_nothing(config: Model) -> None:
    model = lively(config)
    ids_BS = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    valid_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    plain = model(Inputs(ids_BS))
    garbage_B5 = torch.full((2, 5), 7)
    padded = model(
        Inputs(
            torch.cat((ids_BS, garbage_B5), 1),
            valid_BS=torch.cat((valid_BS, torch.zeros(2, 5, dtype=torch.bool)), 1),
        )
    )
    assert relative_error(padded.logits[:, :20], plain.logits) < 1e-5
    assert padded.reports.keys() == plain.reports.keys() == set(config.moe_layers) & set(range(config.layers))
    for layer, report in padded.reports.items():
        assert torch.equal(report.load_E, plain.reports[layer].load_E)
        assert int(report.tokens) == 40


@kinds
def test_the_future_changes_nothing(config: Model) -> None:
    model = lively(config)
    ids_BS = torch.randint(300, (1, 30), generator=torch.Generator().manual_seed(1))
    changed_BS = ids_BS.clone()
    changed_BS[:, 20:] = (changed_BS[:, 20:] + 1) % 300
    first, second = model(ids_BS).logits, model(changed_BS).logits
    assert relative_error(first[:, :20], second[:, :20]) < 1e-5
    assert relative_error(first[:, 20:], second[:, 20:]) > 1e-3


@kinds
def test_recomputation_gives_the_same_bits_and_counts_nothing_twice(config: Model) -> None:
    model, batch = lively(config), random_batch(3, 24)
    found = []
    for recompute in (False, True):
        model.zero_grad(set_to_none=True)
        loss = training_loss(model, batch, Share(50, 1), options=training_options(recompute=recompute))
        loss.total.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (plain, plain_gradients), (again, again_gradients) = found
    assert torch.equal(plain.total, again.total)
    assert plain.reports.keys() == again.reports.keys() == set(config.moe_layers)
    for layer, report in plain.reports.items():
        assert torch.equal(report.load_E, again.reports[layer].load_E)
    for name, gradient in plain_gradients.items():
        assert gradient is not None, name
        assert torch.equal(gradient, again_gradients[name]), name


@kinds
def test_every_parameter_gets_a_gradient(config: Model) -> None:
    model = lively(config)
    training_loss(model, random_batch(2, 30), Share(60, 1), options=training_options()).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert float(parameter.grad.abs().max()) > 0, name


def test_modules_predict_ahead_only_inside_a_document() -> None:
    """The loss of predicting further ahead, spelled out token by token."""
    model, batch = lively(DEEPSEEK), random_batch(2, 20)
    loss = training_loss(model, batch, Share(int((batch.targets_BS >= 0).sum()), 1), options=Options())
    inputs = Inputs.of(batch)
    hidden = model.hidden(inputs)
    total = 0.0
    for k, output in enumerate(model.predict_ahead(hidden.final_BSD, inputs)):
        logits_BSV = model.logits(output.final_BSD)
        for row in range(2):
            for place in range(20 - k - 2):
                target = place + k + 2
                if batch.sequence_BS[row, place] == batch.sequence_BS[row, target]:
                    logprobs_V = torch.log_softmax(logits_BSV[row, place], 0)
                    total -= float(logprobs_V[batch.ids_BS[row, target]].detach())
    count = int((batch.targets_BS >= 0).sum())
    assert float(loss.ahead) == pytest.approx(total * 0.3 / 2 / count, rel=1e-5)


def test_what_a_module_sees_beyond_its_document_changes_nothing() -> None:
    model, batch = lively(DEEPSEEK), random_batch(1, 24)
    last = int(batch.sequence_BS.max())
    assert last >= 1
    changed = dataclasses.replace(
        batch, ids_BS=torch.where(batch.sequence_BS == last, (batch.ids_BS + 5) % 300, batch.ids_BS)
    )
    states = []
    for one in (batch, changed):
        inputs = Inputs.of(one)
        states.append(model.predict_ahead(model.hidden(inputs).final_BSD, inputs)[0].final_BSD)
    inside = (batch.sequence_BS < last) & (batch.sequence_BS.roll(-1, 1) == batch.sequence_BS)
    assert relative_error(states[0][inside], states[1][inside]) < 1e-5


@kinds
def test_micro_batches_add_up_to_the_batch(config: Model) -> None:
    """Next-token gradients of two halves are those of the whole; balance losses are means of parts."""
    model = lively(config)
    batch = random_batch(4, 20)
    halves = [
        dataclasses.replace(
            batch, **{f.name: getattr(batch, f.name)[i : i + 2] for f in dataclasses.fields(batch)}
        )
        for i in (0, 2)
    ]
    count = int((batch.targets_BS >= 0).sum())
    whole = training_loss(model, batch, Share(count, 1), options=Options())
    parts = [training_loss(model, half, Share(count, 2), options=Options()) for half in halves]
    assert sum(float(part.total.detach()) for part in parts) == pytest.approx(
        float(whole.total.detach()), rel=1e-5
    )
    whole.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in parts:
        part.total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(parameter.grad, gradients[name]) < 1e-4, name


def test_meta_models_have_shapes_and_no_memory() -> None:
    model = build(DEEPSEEK, device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.state_dict().keys() == build(DEEPSEEK).state_dict().keys()


def test_bfloat16_weights_keep_balance_state_in_float32() -> None:
    model = build(DEEPSEEK, dtype="bfloat16")
    assert model.embed.weight.dtype == torch.bfloat16
    for layer in model.moe_modules().values():
        assert layer.balance.bias_E is not None
        assert layer.balance.bias_E.dtype == torch.float32
    assert bool(model(torch.arange(20)[None]).logits.isfinite().all())


def test_bfloat16_products_leave_float32_masters_with_float32_gradients() -> None:
    model, batch = lively(DEEPSEEK), random_batch(2, 24)
    exact = training_loss(model, batch, Share(40, 1), options=Options()).total
    rough = training_loss(model, batch, Share(40, 1), options=Options(dtype=torch.bfloat16)).total
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=3e-2)
    rough.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
