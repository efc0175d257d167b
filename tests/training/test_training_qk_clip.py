"""QK-Clip: what the pass returns, what is scaled, and that heads that are well are left alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from consilium.config.attention import MLA
from consilium.config.optimizer import Muon
from consilium.config.training import Training
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Objective, Options
from consilium.training.optimizer import build_optimizer
from consilium.training.qk_clip import clip_heads
from consilium.training.step import gradients, train_step
from small import DEEPSEEK, SWITCH, lively, random_batch
from training.test_training_step import Rows, settings

DIRECT = dataclasses.replace(
    DEEPSEEK, attention=MLA(heads=2, q_rank=None, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=8)
)

BIASED = dataclasses.replace(
    DEEPSEEK, attention=dataclasses.replace(DIRECT.attention, qkv_bias=True, kv_norm="none")
)


def largest(model: Decoder, *, above: float = 0.0, recompute: bool = False) -> dict[int, torch.Tensor]:
    batch = random_batch(3, 30)
    options = Options(peaks_above=above, recompute=recompute)
    return dict(model(Inputs.of(batch), options=options, objective=Objective(batch.targets_BS)).largest)


@pytest.mark.parametrize(
    "config",
    [DEEPSEEK, DIRECT, BIASED],
    ids=["compressed queries", "direct queries", "biased queries"],
)
def test_a_head_that_was_too_large_is_as_large_as_allowed_and_others_stay(config: object) -> None:
    model = lively(config)
    before = largest(model)
    assert before.keys() == set(range(config.layers + config.mtp.depth))
    most = float(before[0].median())
    clip_heads(model, {0: before[0], **{i: torch.zeros(2) + 1e-9 for i in before if i}}, most)
    after = largest(model)
    assert (before[0] > most).any()
    assert torch.allclose(after[0], before[0].clamp(max=most), rtol=1e-4)


def test_recomputed_blocks_tell_the_same() -> None:
    model = lively(DEEPSEEK)
    plain, again = largest(model), largest(model, recompute=True)
    assert all(torch.equal(plain[layer], again[layer]) for layer in plain)


def test_nobody_is_told_who_did_not_ask() -> None:
    model, batch = lively(DEEPSEEK), random_batch(2, 10)
    assert not model(Inputs.of(batch), objective=Objective(batch.targets_BS)).largest


def test_the_largest_of_all_micro_batches_decides() -> None:
    config = settings(DEEPSEEK, optimizer=Muon(qk_clip=1e-3))
    model = lively(DEEPSEEK)
    whole = gradients(model, Rows(), config, 0).largest
    halves = gradients(model, Rows(), dataclasses.replace(config, accumulate=2), 0).largest
    assert all(torch.allclose(whole[layer], halves[layer], rtol=1e-5) for layer in whole)


def trained(clip: float | None) -> tuple[Decoder, list[float]]:
    config = settings(DEEPSEEK, optimizer=Muon(qk_clip=clip, learning_rate=0.02))
    model = lively(DEEPSEEK)
    optimizer = build_optimizer(model, config.optimizer)
    for step in range(6):
        train_step(model, optimizer, Rows(), config, step)
    return model, [float(value_H.max()) for value_H in largest(model).values()]


def test_training_keeps_logits_near_the_limit_and_a_limit_that_is_never_met_changes_no_bit() -> None:
    (plain, free), (clipped, held), (same, _) = trained(None), trained(0.3), trained(1e6)
    assert max(free) > 2 * max(held)
    first, second, third = plain.state_dict(), same.state_dict(), clipped.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.attention.kv_up.weight"], third["layers.0.attention.kv_up.weight"])


def test_what_is_frozen_is_not_scaled() -> None:
    model = lively(DEEPSEEK)
    attention = model.layers[0].attention
    attention.q_up.weight.requires_grad_(False)
    before = attention.q_up.weight.clone(), attention.kv_up.weight.clone()
    attention.cool(torch.tensor([0.5, 1.0]))
    assert torch.equal(attention.q_up.weight, before[0])
    assert not torch.equal(attention.kv_up.weight, before[1])


def test_other_attention_is_refused() -> None:
    with pytest.raises(ConsiliumError, match=r"qk_clip is for latent attention, and switch has another"):
        Training(model=SWITCH, steps=1, optimizer=Muon(qk_clip=100.0))
