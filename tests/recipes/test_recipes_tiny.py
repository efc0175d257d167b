"""The tiny size of every system runs: it builds, takes a training step and generates."""

from __future__ import annotations

import math

import pytest
import torch

from consilium.config.optimizer import AdamW
from consilium.config.training import Training
from consilium.data.batch import Batch
from consilium.engine.engine import Engine
from consilium.errors import ConsiliumError
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs
from consilium.recipes.catalogue import find, names, recipe
from consilium.training.optimizer import build_optimizer
from consilium.training.step import StepResult, train_step
from small import random_batch

TINY = [f"{name}:{size}" for name in names() for size in find(name).sizes if size.startswith("tiny")]
NON_CAUSAL = {"expert-choice:tiny"}


class Rows:
    """The same two rows in every step, in as many micro-batches as are asked for."""

    def micro(self, step: int, index: int, count: int) -> Batch:
        return random_batch(2 // count, 24, vocabulary=4096, seed=index)


def stepped(model: Decoder, name: str, steps: int, accumulate: int = 1) -> list[StepResult]:
    rate = AdamW(learning_rate=1e-3)
    config = Training(model=recipe(name), steps=50, batch=2, accumulate=accumulate, optimizer=rate)
    optimizer = build_optimizer(model, config.optimizer)
    return [train_step(model, optimizer, Rows(), config, step) for step in range(steps)]


@pytest.mark.parametrize("name", TINY)
def test_it_trains_and_generates(name: str) -> None:
    model = build(recipe(name), seed=0)
    first, *_, last = stepped(model, name, 4)
    assert not first.skipped
    assert math.isfinite(first.loss)
    assert abs(first.ce / math.log(4096) - 1) < 0.25
    assert last.ce < first.ce
    assert all(bool(torch.isfinite(value).all()) for value in model.parameters())
    if name in NON_CAUSAL:
        with pytest.raises(ConsiliumError, match="depend on the batch"):
            Engine(model)
        return
    made = Engine(model).complete([[1, 2, 3], [5, 6, 7, 8]], max_tokens=5, temperature=0)
    assert [len(tokens) for tokens in made] == [5, 5]
    assert all(0 <= token < 4096 for tokens in made for token in tokens)


@pytest.mark.parametrize("name", ["qwen3-moe:tiny", "gshard:tiny", "llama-moe:tiny"])
def test_it_trains_in_micro_batches(name: str) -> None:
    results = stepped(build(recipe(name), seed=0), name, 2, accumulate=2)
    assert all(math.isfinite(result.loss) for result in results)
    assert all(result.loads for result in results)


@pytest.mark.parametrize("name", TINY)
def test_causal_says_whether_the_past_sees_the_future(name: str) -> None:
    model = build(recipe(name), seed=0).eval()
    ids = torch.randint(4096, (1, 32), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 20:] = torch.randint(4096, (12,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        here, there = (model(Inputs(tokens)).logits[0, :20] for tokens in (ids, other))
    same = torch.allclose(here, there, rtol=1e-4, atol=1e-5)
    assert same == (name not in NON_CAUSAL)
    moe = recipe(name).moe
    assert same == (moe is None or moe.causal)
