"""Small modern systems and the references they must equal; the machinery is that of ``reference_cases``.

Coefficients are larger than published, caps and widths smaller, so that every mechanism shows in the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from consilium.config.attention import GQA
from consilium.config.balance import (
    AdaptiveLoss,
    Balance,
    BalanceLoss,
    DeviceLoss,
    ImportanceLoss,
    LoadLoss,
    SequenceLoss,
    SignBias,
    SwitchLoss,
    ZLoss,
)
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, Capacity, SigmoidGated
from consilium.config.router import LinearGate, Standardise, TopK
from consilium.model.decoder import Decoder
from consilium.recipes.catalogue import recipe
from model.reference_cases import (
    LAYOUTS,
    Outcome,
    Reference,
    Rows,
    built,
    documents_of,
    drawn,
    lively_model,
    referred,
    rows_of,
    small_experts,
    small_router,
    small_system,
    training_with_noise,
)
from reference import (
    deepseek_moe,
    grok_1,
    latent_moe,
    llama_moe,
    nemotron_moe,
    olmoe,
    qwen2,
    qwen3,
    qwen3_moe,
    qwen_moe,
    skywork_moe,
)


def _attention(name: str, **changes: Any) -> GQA:
    """The recipe's attention with four small heads and, unless changed, two of keys and values."""
    attention = recipe(name, "tiny").attention
    assert isinstance(attention, GQA)
    return dataclasses.replace(attention, **({"heads": 4, "kv_heads": 2, "head_dim": 8} | changes))


def _system(name: str, *losses: BalanceLoss, k: int, router: Mapping[str, Any], **experts: Any) -> Model:
    """Two blocks of the recipe's, its router with ``k`` and other changes, and these balance losses."""
    config = recipe(name, "tiny")
    moe = small_experts(
        config,
        router=small_router(config, select=TopK(k=k), **router),
        **({"balance": Balance(losses=losses)} | experts),
    )
    return small_system(name, layers=2, attention=_attention(name), moe=moe)


def _dense(name: str, *, tied: bool) -> Model:
    return small_system(
        name, layers=2, attention=_attention(name), dense=FeedForward(width=14), tied=tied, moe=None
    )


def _deepseek_moe(*losses: BalanceLoss) -> Model:
    config = _system("deepseek-moe", *losses, k=3, router={}, shared=AlwaysOn(count=2, width=7))
    dense = FeedForward(width=14)
    attention = _attention("deepseek-moe", kv_heads=4)
    return dataclasses.replace(config, layers=3, dense_first=1, dense=dense, attention=attention)


def _llama_moe(**experts: Any) -> Model:
    losses = ImportanceLoss(coefficient=0.3), LoadLoss(coefficient=0.7)
    return _system("llama-moe", *losses, k=2, router={"scale": 4.0}, **experts)


def _grok_1() -> Model:
    """Caps so low and scales so far from 1 that each decides something at this size."""
    config = _system("grok-1", k=2, router={})
    attention = _attention("grok-1", softcap=0.5, scale=None)
    return dataclasses.replace(config, attention=attention, embedding_scale=4.9, logit_scale=0.577)


def _skywork_moe(admission: Capacity, **router: Any) -> Model:
    loss = AdaptiveLoss(start=8.0, most=8.0)
    router |= {"transforms": (Standardise(scale=1.5, epsilon=1e-3),)}
    return _system("skywork-moe", loss, k=2, router=router, admission=admission)


def _latent_moe() -> Model:
    return _system(
        "latent-moe",
        k=3,
        router={"scale": 5.0},
        latent=6,
        shared=AlwaysOn(width=9),
        balance=Balance(losses=(SequenceLoss(coefficient=0.5),), bias=SignBias()),
    )


SYSTEMS: dict[str, Model] = {
    "qwen2": _dense("qwen2", tied=False),
    "qwen2-tied": _dense("qwen2", tied=True),
    "qwen3": _dense("qwen3", tied=False),
    "qwen3-tied": _dense("qwen3", tied=True),
    "qwen-moe": _system(
        "qwen-moe", SwitchLoss(coefficient=0.5), k=3, router={}, shared=SigmoidGated(width=9)
    ),
    "qwen3-moe": _system("qwen3-moe", SwitchLoss(coefficient=0.5, scope="global"), k=3, router={}),
    "deepseek-moe": _deepseek_moe(SwitchLoss(coefficient=0.3), DeviceLoss(coefficient=0.5, devices=4)),
    "deepseek-moe-16b": _deepseek_moe(SwitchLoss(coefficient=0.3)),
    "llama-moe": _llama_moe(),
    "llama-moe-residual": _llama_moe(shared=AlwaysOn(count=2, width=7)),
    "grok-1": _grok_1(),
    "skywork-moe": _skywork_moe(Capacity(factor=1.0)),
    "skywork-moe-as-printed": _skywork_moe(Capacity(factor=1.25), projection=LinearGate(bias=True)),
    "skywork-moe-by-probability": _skywork_moe(Capacity(factor=0.6, by="probability")),
    "olmoe": _system("olmoe", SwitchLoss(coefficient=0.5), ZLoss(coefficient=0.3), k=3, router={}),
    "nemotron-moe": _system("nemotron-moe", SwitchLoss(coefficient=0.5), k=3, router={}),
    "latent-moe": _latent_moe(),
}

REFERENCES: dict[str, Reference] = {
    "qwen2": lambda weights, hyper, rows: qwen2.model(weights, hyper, documents_of(rows)),
    "qwen3": lambda weights, hyper, rows: qwen3.model(weights, hyper, documents_of(rows)),
    "qwen-moe": lambda weights, hyper, rows: qwen_moe.model(weights, hyper, documents_of(rows)),
    "olmoe": lambda weights, hyper, rows: olmoe.model(weights, hyper, documents_of(rows)),
    "qwen3-moe": lambda weights, hyper, rows: qwen3_moe.model(weights, hyper, documents_of(rows)),
    "deepseek-moe": lambda weights, hyper, rows: deepseek_moe.model(weights, hyper, documents_of(rows)),
    "llama-moe": lambda weights, hyper, rows: llama_moe.model(weights, hyper, documents_of(rows)),
    "grok-1": lambda weights, hyper, rows: grok_1.model(weights, hyper, documents_of(rows)),
    "skywork-moe": lambda weights, hyper, rows: skywork_moe.model(weights, hyper, documents_of(rows)),
    "nemotron-moe": lambda weights, hyper, rows: nemotron_moe.model(weights, hyper, documents_of(rows)),
    "latent-moe": latent_moe.model,
}
"""By family. LLaMA-MoE's is the one without noise, as in evaluation."""


def model_of(system: str, dtype: torch.dtype = torch.float64) -> Decoder:
    return lively_model(SYSTEMS[system], dtype)


def reference_of(config: Model, rows: Rows) -> Reference:
    """The reference of a training pass over ``rows``; LLaMA-MoE's gets the noise that routers will draw."""
    if config.moe is None or config.family != "llama-moe":
        return REFERENCES[config.family]
    noise = drawn(config, rows, config.moe.experts, lambda zeros, own: zeros.normal_(generator=own))
    return lambda weights, hyper, rows: llama_moe.model(weights, hyper, documents_of(rows), noise=noise)


@functools.cache
def outcomes(system: str, layout: str, dtype: torch.dtype) -> tuple[Outcome, Outcome]:
    """The built model's outcome and the reference's, computed once for the tests that look at their parts."""
    model, rows = model_of(system, dtype), rows_of(LAYOUTS[layout])
    return built(model, rows, training_with_noise), referred(model, rows, reference_of(model.config, rows))
