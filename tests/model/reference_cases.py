"""Small systems and batches, run through the built model and through its single-file reference.

Legend: B rows, S tokens a row, N tokens of a document, T valid tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from consilium.config.attention import GQA, MLA, Rope, Yarn
from consilium.config.balance import (
    Balance,
    CommunicationLoss,
    DeviceLoss,
    SequenceLoss,
    SignBias,
    SwitchLoss,
)
from consilium.config.feed_forward import FeedForward
from consilium.config.io import to_data
from consilium.config.model import MTP, Model
from consilium.config.moe import AlwaysOn, Capacity, DeviceCapacity, MoE
from consilium.config.router import Groups, NoNoise, Router, TopK, TwoLevel
from consilium.data.batch import Batch
from consilium.model.block import branch_seed
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Options
from consilium.moe.types import Mode
from consilium.recipes.catalogue import recipe
from consilium.training.objective import Share, training_loss
from reference import deepseek_v2, deepseek_v3, llama, mixtral, switch
from small import lively
from support import relative_error

VOCABULARY = 40
SPAN = 16

Document = tuple[Tensor, Tensor]
Rows = list[list[Document]]
Reference = Callable[[Mapping[str, Tensor], Mapping[str, Any], Rows], tuple[Tensor, dict[str, Tensor]]]


def small_system(name: str, **changes: Any) -> Model:
    return dataclasses.replace(recipe(name, "tiny"), vocab_size=VOCABULARY, hidden_size=24, **changes)


def small_experts(config: Model, **changes: Any) -> MoE:
    """The recipe's experts, fewer and smaller; balance losses are given large enough to matter."""
    assert config.moe is not None
    return dataclasses.replace(config.moe, experts=8, width=10, **changes)


def small_router(config: Model, **changes: Any) -> Router:
    assert config.moe is not None
    return dataclasses.replace(config.moe.router, **changes)


def _latent(multiplier: float, q_rank: int | None) -> MLA:
    """Pairs that keep their frequency, blend, and are slowed down: YaRN's ramp is 0, 1/3, 2/3, 1."""
    yarn = Yarn(factor=8.0, original_length=64, mscale=multiplier, mscale_all_dim=multiplier)
    rope = Rope(theta=100.0, interleaved=True, scaling=yarn)
    return MLA(heads=2, q_rank=q_rank, kv_rank=9, nope_dim=6, rope_dim=8, v_dim=5, rope=rope)


def _deepseek_v3(sequence: Literal["document", "row"] = "document", **loss: Any) -> Model:
    config = recipe("deepseek-v3", "tiny")
    moe = small_experts(
        config,
        router=small_router(
            config, select=TopK(k=3, groups=Groups(count=4, keep=2, score="top2_sum")), scale=2.5
        ),
        balance=Balance(losses=(SequenceLoss(coefficient=0.5, **loss),), bias=SignBias(), sequence=sequence),
        shared=AlwaysOn(count=2, width=7),
    )
    attention, mtp = _latent(1.0, q_rank=11), MTP(depth=2, weight=0.7)
    return small_system(
        "deepseek-v3", layers=3, attention=attention, dense=FeedForward(width=14), moe=moe, mtp=mtp
    )


def _deepseek_v2(q_rank: int | None) -> Model:
    config = recipe("deepseek-v2", "tiny")
    losses = (
        SequenceLoss(coefficient=0.3),
        DeviceLoss(coefficient=0.5, devices=4, scope="sequence"),
        CommunicationLoss(coefficient=0.2, devices=4, most=2),
    )
    moe = small_experts(
        config,
        router=small_router(
            config, select=TopK(k=3, groups=Groups(count=4, keep=2, score="max")), scale=16.0
        ),
        admission=DeviceCapacity(devices=4, exempt=0.0),
        balance=Balance(losses=losses),
        shared=AlwaysOn(count=2, width=7),
    )
    return small_system(
        "deepseek-v2", layers=3, attention=_latent(0.707, q_rank), dense=FeedForward(width=14), moe=moe
    )


def _mixtral() -> Model:
    moe = small_experts(recipe("mixtral", "tiny"), balance=Balance(losses=(SwitchLoss(coefficient=0.5),)))
    rope = Rope(theta=1e6)
    return small_system(
        "mixtral", layers=2, attention=GQA(heads=4, kv_heads=2, head_dim=6, rope=rope), moe=moe
    )


def switch_config(factor: float, **router: Any) -> Model:
    config = recipe("switch", "tiny")
    moe = small_experts(
        config,
        router=small_router(config, **router),
        admission=Capacity(factor=factor),
        balance=Balance(losses=(SwitchLoss(coefficient=0.5),)),
    )
    dense = FeedForward(width=14, activation="geglu")
    return small_system(
        "switch", layers=4, attention=GQA(heads=4, kv_heads=2, head_dim=6), dense=dense, moe=moe
    )


SYSTEMS: dict[str, Model] = {
    "deepseek-v3": _deepseek_v3(),
    "deepseek-v3-as-printed": _deepseek_v3("row", counts="scores"),
    "deepseek-v2": _deepseek_v2(q_rank=11),
    "deepseek-v2-lite": _deepseek_v2(q_rank=None),
    "mixtral": _mixtral(),
    "switch": switch_config(1.25, noise=NoNoise()),
    "switch-full": switch_config(0.4, noise=NoNoise()),
    "llama": small_system(
        "llama", layers=2, attention=GQA(heads=4, kv_heads=4, head_dim=6), dense=FeedForward(width=14)
    ),
}

REFERENCES: dict[str, Reference] = {
    "deepseek-v3": deepseek_v3.model,
    "deepseek-v2": deepseek_v2.model,
    "mixtral": lambda weights, hyper, rows: mixtral.model(weights, hyper, documents_of(rows)),
    "switch": lambda weights, hyper, rows: switch.model(weights, hyper, documents_of(rows)),
    "llama": lambda weights, hyper, rows: llama.model(weights, hyper, documents_of(rows)),
}

TOLERANCE = {torch.float64: 5e-6, torch.float32: 5e-5}
"""Relative errors by the model's dtype; in float64, too, routers and rotary angles are float32."""

LAYOUTS: dict[str, list[list[int]]] = {
    "whole rows": [[SPAN], [SPAN]],
    "packed documents": [[7, 1, 5, 3], [2, 14]],
    "right padding": [[9, 4], [], [5], [1, 1]],
}
"""Lengths of each row's documents; what is left of a row is padding."""


def hyper_of(config: Model) -> dict[str, Any]:
    """The numbers of a configuration under the plain names that the references read."""
    data = to_data(config)
    attention = data["attention"]
    hyper = attention | attention["rope"] | attention["rope"]["scaling"] | data
    hyper |= {"mtp_depth": config.mtp.depth, "mtp_loss": config.mtp.weight}
    if config.moe is None:
        return hyper
    router = data["moe"]["router"]
    select = router["select"]
    hyper |= {"experts": config.moe.experts, "scale": router["scale"], "k": select.get("k")}
    if isinstance(config.moe.router.select, TwoLevel):
        hyper |= {"groups": select["groups"], "keep_groups": select["keep"]}
    elif groups := select.get("groups"):
        hyper |= {"groups": groups["count"], "keep_groups": groups["keep"]}
        hyper |= {"devices": groups["count"], "most_devices": groups["keep"]}
    admission = data["moe"]["admission"]
    hyper |= {"drops": True, "capacity": admission.get("factor"), "drop_by": admission.get("by")}
    hyper |= {"group_tokens": admission.get("group_tokens"), "choice_factor": select.get("factor")}
    hyper |= {"noise_floor": router["noise"].get("floor")}
    for step in router["transforms"]:
        hyper |= {f"{step['kind']}_{name}": value for name, value in step.items()}
    for loss in data["moe"]["balance"]["losses"]:
        hyper |= {f"{loss['kind']}_loss": loss.get("coefficient"), "counts": loss.get("counts")}
        hyper |= {"devices": loss["devices"]} if "devices" in loss else {}
    return hyper


def wrong(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> dict[str, float]:
    """The relative errors that are too large, by name; both sides have the same names."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], tensor) for name, tensor in expected.items()}
    return {name: error for name, error in errors.items() if not error < tolerance}


def single_experts(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every expert's own part of stacked gradients: one with few tokens cannot hide behind its neighbours."""
    return {
        f"{name}[{expert}]": gradient
        for name, stacked in gradients.items()
        if ".experts." in name
        for expert, gradient in enumerate(stacked)
    }


def documents_of(rows: Rows) -> list[Document]:
    return [document for row in rows for document in row]


def rows_of(lengths: list[list[int]], seed: int = 0) -> Rows:
    """Random documents; the last token of every second one has a target, as where a row cuts it.

    No two begin with the same token, and none with one twice, whose places have the same state: where experts
    choose, such twins tie, and how a sum is rounded would decide.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: Rows = []
    firsts: set[int] = set()
    for row in lengths:
        rows.append([])
        for length in row:
            tokens = torch.randint(VOCABULARY, (length + 1,), generator=generator)
            while int(tokens[0]) in firsts:
                tokens[0] = (tokens[0] + 1) % VOCABULARY
            firsts.add(int(tokens[0]))
            if tokens[1] == tokens[0]:
                tokens[1] = (tokens[1] + 1) % VOCABULARY
            targets_N = tokens[1:].clone()
            if len(rows[-1]) % 2:
                targets_N[-1] = -1
            rows[-1].append((tokens[:-1], targets_N))
    return rows


def batch_of(rows: Rows, seed: int = 0) -> Batch:
    """The same documents packed into rows of ``SPAN`` tokens, with random tokens where there is none."""
    shape = len(rows), SPAN
    ids_BS = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
    targets_BS, sequence_BS = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    position_BS, valid_BS = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = 0
        for number, (ids_N, targets_N) in enumerate(row):
            place = slice(start, start + len(ids_N))
            ids_BS[b, place], targets_BS[b, place], sequence_BS[b, place] = ids_N, targets_N, number
            position_BS[b, place], valid_BS[b, place] = torch.arange(len(ids_N)), True
            start = place.stop
    return Batch(ids_BS, targets_BS, sequence_BS, position_BS, valid_BS)


def lively_model(config: Model, dtype: torch.dtype = torch.float64) -> Decoder:
    """Ordinary values everywhere, and selection biases of both signs, most of them below every score."""
    model = lively(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
    for layer in model.moe_modules().values():
        if layer.balance.bias_E is not None:
            layer.balance.bias_E.normal_(-0.7, 0.1, generator=generator)
            layer.balance.bias_E[5] = 0.1
    return model.to(dtype)


@dataclass(frozen=True)
class Outcome:
    """One pass in training mode and its gradients."""

    logits_TV: Tensor
    losses: Mapping[str, Tensor]
    total: Tensor
    gradients: Mapping[str, Tensor]


def noiseless() -> Options:
    return Options(mode=Mode(training=True))


def built(model: Decoder, rows: Rows, options: Callable[[], Options] = noiseless) -> Outcome:
    """What the built model says of packed and padded rows; each pass gets options of its own."""
    batch = batch_of(rows)
    with torch.no_grad():
        logits_BSV = model(Inputs.of(batch), options=options()).logits
    targets = int((batch.targets_BS >= 0).sum())
    loss = training_loss(model, batch, Share(targets, 1), options=options())
    loss.total.backward()
    losses = {"prediction": loss.nll / targets, **loss.balance}
    if model.config.mtp.depth:
        losses["mtp"] = loss.ahead
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    return Outcome(logits_BSV[batch.valid_BS], losses, loss.total.detach(), gradients)


def training_with_noise(seed: int = 5) -> Options:
    mode = Mode(training=True, generator=torch.Generator().manual_seed(seed))
    return Options(mode=mode, routings=True)


def drawn(
    config: Model, rows: Rows, width: int, draw: Callable[[Tensor, torch.Generator], Tensor]
) -> dict[int, Tensor]:
    """What each block draws for its valid tokens [T, width] from a generator of its own, by layer."""
    generator, valid_BS = training_with_noise().mode.generator, batch_of(rows).valid_BS
    draws: dict[int, Tensor] = {}
    for layer in range(config.layers):
        own = branch_seed(generator)
        assert own is not None
        values = draw(torch.zeros(valid_BS.numel(), width), torch.Generator().manual_seed(own))
        draws[layer] = values[valid_BS.flatten()].double()
    return draws


def referred(model: Decoder, rows: Rows, reference: Reference | None = None) -> Outcome:
    """What the reference says in float64 of the same documents."""
    trained = {name for name, _ in model.named_parameters()}
    weights = {
        name: tensor.detach().double().requires_grad_(name in trained)
        for name, tensor in model.state_dict().items()
    }
    logits_TV, losses = _run(model.config, weights, rows, {}, reference)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    gradients = {
        name: torch.zeros_like(weights[name]) if weights[name].grad is None else weights[name].grad
        for name in trained
    }
    losses = {name: loss.detach() for name, loss in losses.items()}
    return Outcome(logits_TV.detach(), losses, total.detach(), gradients)


@torch.no_grad()
def referred_logits_and_total(
    model: Decoder, rows: Rows, reference: Reference | None = None, **changes: Any
) -> tuple[Tensor, Tensor]:
    """The same without gradients; ``changes`` replace numbers of the system."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    logits_TV, losses = _run(model.config, weights, rows, changes, reference)
    return logits_TV, torch.stack(list(losses.values())).sum()


def _run(
    config: Model,
    weights: Mapping[str, Tensor],
    rows: Rows,
    changes: Mapping[str, Any],
    reference: Reference | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    run = reference or REFERENCES[config.family]
    return run(weights, {**hyper_of(config), **changes}, sequences_of(config, rows))


def sequences_of(config: Model, rows: Rows) -> Rows:
    """Documents by sequence, as the balance losses of the configuration count sequences."""
    if config.moe is not None and config.moe.balance.sequence == "row":
        return [row for row in rows if row]
    return [[document] for document in documents_of(rows)]


@functools.cache
def outcomes(system: str, layout: str, dtype: torch.dtype) -> tuple[Outcome, Outcome]:
    """The built model's outcome and the reference's, computed once for the tests that look at their parts."""
    model, rows = lively_model(SYSTEMS[system], dtype), rows_of(LAYOUTS[layout])
    return built(model, rows), referred(model, rows)
