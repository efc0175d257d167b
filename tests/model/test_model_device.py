"""The core on a device: what it builds, computes and repeats there, and that it asks the host for no value.

On the meta device there are no values: whatever reads one raises, and so does a constant that was made for
another device.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium.checkpoint import store
from consilium.config.model import Model
from consilium.config.optimizer import AdamW
from consilium.engine.engine import Engine
from consilium.kv.build import build_cache
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Objective, Options
from consilium.moe.transport import Local, LocalTicket, Returning, Sending
from consilium.moe.types import Mode, Routing
from consilium.training.objective import Loss, Share, training_loss
from consilium.training.optimizer import build_optimizer
from small import DEEPSEEK, DENSE, KINDS, lively, random_batch
from support import relative_error

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def latent_and_dense() -> Model:
    return dataclasses.replace(
        DEEPSEEK, moe=None, dense_first=0, mtp=dataclasses.replace(DEEPSEEK.mtp, depth=0)
    )


@pytest.mark.parametrize("config", [DENSE, latent_and_dense()], ids=["grouped-query", "latent"])
def test_a_pass_without_experts_asks_the_device_for_nothing(config: Model) -> None:
    model = build(config, device="meta")
    ids_BS = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    logits = model(ids_BS).logits
    assert (logits.device.type, tuple(logits.shape), logits.dtype) == ("meta", (2, 9, 300), torch.float32)
    losses = model(ids_BS, objective=Objective(ids_BS))
    losses.nll.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


class Even:
    """A transport that knows on the host how many rows each expert gets, all that a device is asked for."""

    def owned(self, experts: int) -> range:
        return range(experts)

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> Sending[LocalTicket]:
        sending: Any = Local().dispatch(x_TD, routing)
        experts, copies = routing.logits_TE.shape[1], routing.keep_TK.numel()
        counts = [copies // experts + (expert < copies % experts) for expert in range(experts)]
        return dataclasses.replace(sending, counts_E=torch.tensor(counts))

    def combine(self, y_TD: torch.Tensor, ticket: LocalTicket) -> Returning:
        return Local().combine(y_TD, ticket)


@pytest.mark.parametrize("training", [False, True])
@kinds
def test_a_pass_asks_the_device_for_nothing_but_the_rows_of_each_expert(
    config: Model, training: bool
) -> None:
    """Prediction modules are left out: what lies beyond a text's end is found by value, once a pass."""
    config = dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, depth=0))
    model = build(config, device="meta", transports=lambda layer: Even())
    ids_BS = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    options = Options(Mode(training=training))
    output = model(ids_BS, options=options)
    assert tuple(output.logits.shape) == (2, 9, 300)
    assert all(report.load_E.is_meta for report in output.reports.values())
    losses = model(ids_BS, options=options, objective=Objective(ids_BS))
    (losses.nll + sum(sum(report.losses.values()) for report in losses.reports.values())).backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_a_cache_is_on_the_device_of_the_pass() -> None:
    cache = build_cache(DENSE, batch=2, capacity=4, dtype=torch.float32, device="meta")
    layer = cache.layer(0)
    view = layer.view(3)
    layer.write(
        torch.zeros(2, 3, DENSE.attention.cache_width, device="meta"),
        torch.zeros(2, 3, dtype=torch.int64, device="meta"),
    )
    assert [tile.device.type for tile in view.tiles(torch.float32)] == ["meta"]


@kinds
def test_a_folder_is_loaded_onto_the_device_that_is_asked_for(config: Model, tmp_path: Path) -> None:
    model = lively(config)
    store.save(model, tmp_path / "model")
    placed = store.load(tmp_path / "model", device="cpu")
    assert all(
        torch.equal(one, two) for one, two in zip(model.parameters(), placed.parameters(), strict=True)
    )


def step(model: Decoder, device: str) -> tuple[Loss, dict[str, torch.Tensor]]:
    """One training step on ``device``: its loss, and the gradients and weights that it leaves, on the CPU."""
    batch = random_batch(4, 24)
    moved = {f.name: getattr(batch, f.name).to(device) for f in dataclasses.fields(batch)}
    optimizer = build_optimizer(model, AdamW())
    loss = training_loss(
        model, dataclasses.replace(batch, **moved), Share(90, 1), options=Options(Mode(training=True))
    )
    loss.total.backward()
    gradients = {f"{name}.grad": p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return loss, gradients | {name: p.detach().cpu() for name, p in model.named_parameters()}


@pytest.mark.gpu
@needs_cuda
@kinds
def test_a_seed_is_the_same_model_on_both_devices(config: Model) -> None:
    here, there = build(config, seed=4), build(config, seed=4, device="cuda")
    assert all(
        torch.equal(one, two.cpu()) for one, two in zip(here.parameters(), there.parameters(), strict=True)
    )


@pytest.mark.gpu
@needs_cuda
@kinds
def test_a_pass_is_equal_on_both_devices(config: Model) -> None:
    here, there = lively(config), lively(config).to("cuda")
    batch = random_batch(3, 40)
    inputs = Inputs.of(batch)
    moved = Inputs(*(getattr(inputs, f.name).to("cuda") for f in dataclasses.fields(inputs)))
    one, two = here(inputs), there(moved)
    assert relative_error(two.logits.cpu(), one.logits) < 1e-4
    for layer, report in one.reports.items():
        assert torch.equal(two.reports[layer].load_E.cpu(), report.load_E)


@pytest.mark.gpu
@needs_cuda
@kinds
def test_a_training_step_is_equal_on_both_devices_and_its_counts_repeat(config: Model) -> None:
    (here, values), (there, moved) = step(lively(config), "cpu"), step(lively(config).to("cuda"), "cuda")
    again, _ = step(lively(config).to("cuda"), "cuda")
    assert relative_error(there.total.cpu(), here.total) < 1e-4
    for name, value in values.items():
        assert relative_error(moved[name], value) < 1e-3, name
    for layer, report in there.reports.items():
        assert torch.equal(report.load_E, again.reports[layer].load_E)


@pytest.mark.gpu
@needs_cuda
@kinds
def test_greedy_text_is_equal_on_both_devices(config: Model) -> None:
    prompts = [[5, 6, 7], [9]]
    here = Engine(lively(config)).complete(prompts, max_tokens=8)
    assert Engine(lively(config).to("cuda")).complete(prompts, max_tokens=8) == here
