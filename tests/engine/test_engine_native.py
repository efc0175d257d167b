"""An engine on native kernels gives the tokens of one on modules, whoever else is decoded beside them."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.config.model import Model
from consilium.engine.engine import Engine
from consilium.engine.request import Request, Sampling
from consilium.model import native
from consilium.model.packing import pack
from consilium.moe.types import Activations, Mode, Routing, Tokens
from consilium.ops.rows import Rows
from consilium.ops.weights import PACKINGS, Packing
from kernels import HERE, kernels_of
from small import DEEPSEEK, KINDS, WINDOWED, lively

prompts = st.lists(
    st.lists(st.integers(0, 299), min_size=1, max_size=30).map(tuple), min_size=1, max_size=5, unique=True
)


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(HERE[-1])
    monkeypatch.setattr(native, "kernels", lambda: found)


def on_modules(model: native.Decoder) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels", lambda: None)
        return Engine(model)


@pytest.mark.parametrize("config", [*KINDS.values(), WINDOWED], ids=[*KINDS, "windowed"])
@settings(max_examples=5)
@given(given_=prompts, temperature=st.sampled_from([0.0, 1.0]))
def test_tokens_are_those_of_modules(
    config: Model, given_: list[tuple[int, ...]], temperature: float
) -> None:
    model = lively(config)
    asked = {"max_tokens": 9, "temperature": temperature}
    found = Engine(model).complete(given_, **asked)
    assert found == on_modules(model).complete(given_, **asked)
    assert found == [Engine(model).complete([prompt], **asked)[0] for prompt in given_]


def together(
    model: native.Decoder, asked: list[tuple[tuple[int, ...], int]], seed: int
) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    """All answers to each prompt of requests that come and go at random."""
    engine, random = Engine(model), Random(seed)
    waiting, running = list(asked), dict[int, tuple[tuple[int, ...], list[int]]]()
    random.shuffle(waiting)
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    while waiting or running:
        while waiting and (not running or random.random() < 0.4):
            prompt, most = waiting.pop()
            number = engine.submit(Request(prompt=prompt, max_tokens=most, stop_ids=()))
            running[number] = prompt, []
        for piece in engine.step():
            prompt, tokens = running[piece.request]
            tokens.append(piece.token)
            if piece.finished is not None:
                del running[piece.request]
                found.setdefault(prompt, set()).add(tuple(tokens))
        if running and random.random() < 0.05:
            engine.cancel(gone := random.choice(sorted(running)))
            waiting.append((running.pop(gone)[0], asked[0][1]))
    return found


def one_answer_each(model: native.Decoder, requests: int, tokens: int) -> None:
    random = Random(0)
    prompts = [
        tuple(random.randrange(300) for _ in range(random.choice((1, 3, 17, 40, 90)))) for _ in range(10)
    ]
    found = together(model, [(prompts[i % 10], tokens) for i in range(requests)], seed=requests)
    alone = [together(model, [(prompt, tokens)], seed=0) for prompt in prompts]
    assert found == {prompt: answers for one in alone for prompt, answers in one.items()}
    assert all(len(answers) == 1 for answers in found.values())


@pytest.mark.parametrize("packing", [None, *PACKINGS])
def test_fifty_mixed_requests_have_one_answer_a_prompt(packing: Packing | None) -> None:
    model = lively(DEEPSEEK).bfloat16()
    if packing is not None:
        pack(model, packing)
    one_answer_each(model, 50, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windowed_requests_have_one_answer_a_prompt(dtype: torch.dtype) -> None:
    one_answer_each(lively(WINDOWED).to(dtype), 50, 8)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [None, *PACKINGS])
def test_a_thousand_mixed_requests_have_one_answer_a_prompt(packing: Packing | None) -> None:
    model = lively(dataclasses.replace(DEEPSEEK, max_length=512)).bfloat16()
    if packing is not None:
        pack(model, packing)
    one_answer_each(model, 1000, 24)


def test_loads_are_counted_as_by_modules() -> None:
    engines = Engine(lively(DEEPSEEK)), on_modules(lively(DEEPSEEK))
    for engine in engines:
        engine.complete([[1, 2, 3], [4]], max_tokens=7)
    assert engines[0].loads == engines[1].loads
    assert all(sum(counts) for counts in engines[0].loads.values())


def test_log_probabilities_are_those_of_modules() -> None:
    pieces = [
        list(engine.generate([[5, 6, 7]], max_tokens=12, sampling=Sampling()))
        for engine in (Engine(lively(DEEPSEEK)), on_modules(lively(DEEPSEEK)))
    ]
    found, right = (torch.tensor([piece.logprob for piece in some]) for some in pieces)
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-5)


def test_an_observer_sees_every_step() -> None:
    """Observers read what lives inside a layer, which kernels do not show."""

    class Counting:
        tokens = 0

        def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
            self.tokens += tokens.count

        def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
            pass

    seen = Counting()
    Engine(lively(DEEPSEEK), mode=Mode(observer=seen)).complete([[1, 2]], max_tokens=5)
    assert seen.tokens == 2 * (2 + 4)
