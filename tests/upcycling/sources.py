"""Dense models to begin with, in folders, and text to calibrate on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from consilium.checkpoint import store
from consilium.config.attention import GQA
from consilium.config.feed_forward import Activation, FeedForward
from consilium.config.model import Model
from consilium.data.tokenizer import Tokenizer
from consilium.model.decoder import Decoder
from small import lively

LLAMA = Model(
    family="llama",
    vocab_size=300,
    hidden_size=32,
    layers=2,
    attention=GQA(heads=4, kv_heads=2, head_dim=8),
    dense=FeedForward(width=48),
    max_length=256,
)
QWEN3 = dataclasses.replace(
    LLAMA, family="qwen3", attention=GQA(heads=4, kv_heads=2, head_dim=8, qk_norm="head")
)
MISTRAL = dataclasses.replace(
    LLAMA, family="mistral", attention=GQA(heads=4, kv_heads=2, head_dim=8, window=40)
)
QWEN2 = dataclasses.replace(
    LLAMA, family="qwen2", attention=GQA(heads=4, kv_heads=2, head_dim=8, qkv_bias=True), tied=True
)


def with_activation(activation: Activation) -> Model:
    return dataclasses.replace(LLAMA, dense=FeedForward(width=48, activation=activation))


def saved(config: Model, folder: Path, *, dtype: str = "float32") -> Decoder:
    """A model of weights far from zero in ``folder``, which any change of which shows."""
    model = lively(config, seed=1).to(getattr(torch, dtype))
    store.save(model, folder, tokenizer=Tokenizer.of_bytes())
    return store.load(folder).eval()


def text(path: Path) -> Path:
    """Lines of several kinds, a few thousand bytes."""
    lines = [
        f"line {i * i} of {i}: {'ab' * (i % 7)} and {chr(97 + i % 26) * (i % 11)}.\n" for i in range(150)
    ]
    path.write_text("".join(lines))
    return path


def fine_tuned(config: Model, folder: Path, seed: int, *, dtype: str = "float32") -> Decoder:
    """The model of ``saved``, every weight of it moved a little, as by training on some text."""
    model = lively(config, seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * weight.abs().mean() * torch.randn(weight.shape, generator=generator))
    store.save(model.to(getattr(torch, dtype)), folder, tokenizer=Tokenizer.of_bytes())
    return store.load(folder).eval()
