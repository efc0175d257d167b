"""An engine on native kernels gives the tokens of one on modules, whoever else is decoded beside them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.config.model import Model
from consilium.engine.engine import Engine
from consilium.engine.request import Sampling
from consilium.model import native
from consilium.moe.types import Activations, Mode, Routing, Tokens
from consilium.ops.rows import Rows
from kernels import HERE, kernels_of
from small import DEEPSEEK, KINDS, lively

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


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
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
