"""Small models of every kind for tests of what is built on them."""

from __future__ import annotations

import dataclasses

import torch

from consilium.config.attention import GQA, MLA, Rope, Yarn
from consilium.config.balance import Balance, SequenceLoss, SignBias, SwitchLoss
from consilium.config.feed_forward import FeedForward
from consilium.config.model import MTP, Model
from consilium.config.moe import AlwaysOn, Capacity, MoE
from consilium.config.router import Groups, Jitter, Raw, Router, Sigmoid, TopK
from consilium.data.batch import Batch
from consilium.model.build import build
from consilium.model.decoder import Decoder

DEEPSEEK = Model(
    family="deepseek-v3",
    vocab_size=300,
    hidden_size=32,
    layers=3,
    attention=MLA(
        heads=2,
        q_rank=16,
        kv_rank=16,
        nope_dim=8,
        rope_dim=4,
        v_dim=8,
        rope=Rope(interleaved=True, scaling=Yarn(factor=4.0, original_length=64, mscale_all_dim=1.0)),
    ),
    dense=FeedForward(width=48),
    dense_first=1,
    moe=MoE(
        experts=8,
        width=16,
        router=Router(
            score=Sigmoid(),
            offset="scores",
            select=TopK(k=2, groups=Groups(count=4, keep=2, score="top2_sum")),
            scale=2.5,
        ),
        balance=Balance(losses=(SequenceLoss(coefficient=1e-2),), bias=SignBias(rate=1e-2)),
        shared=AlwaysOn(width=16),
    ),
    max_length=256,
    mtp=MTP(depth=2),
)

SWITCH = Model(
    family="switch",
    vocab_size=300,
    hidden_size=32,
    layers=4,
    attention=GQA(heads=4, kv_heads=2, head_dim=8, qk_norm="head"),
    dense=FeedForward(width=32, activation="relu"),
    moe=MoE(
        experts=4,
        width=32,
        activation="relu",
        router=Router(noise=Jitter(epsilon=0.1), select=TopK(k=1), weight=Raw()),
        admission=Capacity(factor=1.0),
        balance=Balance(losses=(SwitchLoss(),)),
    ),
    moe_every=2,
    tied=True,
    max_length=256,
)

DENSE = Model(
    family="llama",
    vocab_size=300,
    hidden_size=32,
    layers=2,
    attention=GQA(heads=4, kv_heads=1, head_dim=8, qkv_bias=True),
    dense=FeedForward(width=48),
    max_length=256,
)

WINDOWED = Model(
    family="mixtral",
    vocab_size=300,
    hidden_size=32,
    layers=3,
    attention=GQA(heads=4, kv_heads=2, head_dim=8, window=7, full_layers=(1,)),
    moe=MoE(experts=6, width=16, router=Router(select=TopK(k=2))),
    max_length=256,
)

KINDS = {"deepseek": DEEPSEEK, "switch": SWITCH, "dense": DENSE}


def lively(config: Model, seed: int = 0) -> Decoder:
    """A model of ordinary values: norms are not 1, biases have both signs, weights are not tiny."""
    model = build(dataclasses.replace(config), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(6.0)
        for layer in model.moe_modules().values():
            if layer.balance.bias_E is not None:
                layer.balance.bias_E.copy_(0.2 * torch.randn(layer.balance.bias_E.shape, generator=generator))
    return model


def random_batch(rows: int, length: int, *, vocabulary: int = 300, seed: int = 0) -> Batch:
    """Rows of several documents each, all valid."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(vocabulary, (rows, length), generator=generator)
    cuts_BS = torch.rand(rows, length, generator=generator) < 4 / length
    cuts_BS[:, 0] = False
    sequence_BS = cuts_BS.long().cumsum(1)
    place_BS = torch.arange(length).expand(rows, length)
    start_BS = torch.where(cuts_BS, place_BS, 0).cummax(1).values
    last_BS = torch.cat((cuts_BS[:, 1:], torch.ones(rows, 1, dtype=torch.bool)), 1)
    return Batch(
        ids_BS=ids_BS,
        targets_BS=ids_BS.roll(-1, 1).masked_fill(last_BS, -1),
        sequence_BS=sequence_BS,
        position_BS=place_BS - start_BS,
        valid_BS=torch.ones_like(ids_BS, dtype=torch.bool),
    )
