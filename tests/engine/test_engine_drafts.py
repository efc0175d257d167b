"""Guessed tokens: the text is that without guesses, to the last bit, and guesses are what modules say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.config.model import MTP, Model
from consilium.engine import batch, drafts, intake
from consilium.engine.drafts import Ahead, NGrams, Speculation, repeated
from consilium.engine.engine import Engine
from consilium.engine.request import Piece, Request, Sampling
from consilium.errors import ConsiliumError
from consilium.model import native
from consilium.model.decoder import Decoder
from consilium.model.mtp import shifted
from consilium.model.packing import pack
from consilium.model.types import Inputs
from kernels import HERE, kernels_of
from small import DEEPSEEK, DENSE, KINDS, WINDOWED, lively

ONE = dataclasses.replace(DEEPSEEK, mtp=MTP(depth=1))
WAYS = [NGrams(1), NGrams(5), Ahead(1), Ahead(4)]


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(HERE[-1])
    monkeypatch.setattr(native, "kernels", lambda: found)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "PROMPT_PART", 16)
    for module in (batch, intake):
        monkeypatch.setattr(module, "PAGE", 4)


def obvious(tokens: Sequence[int], most: int) -> list[int]:
    """Every length from the longest, every place from the last."""
    for length in range(drafts.LONGEST, drafts.SHORTEST - 1, -1):
        for place in range(len(tokens) - length - 1, -1, -1):
            if list(tokens[place : place + length]) == list(tokens[-length:]):
                return (list(tokens[place + length :]) * most)[:most]
    return []


@given(st.lists(st.sampled_from([0, 1, 256, 65536, 2**31 - 1]), max_size=40), st.integers(1, 6))
def test_what_followed_before_is_found(tokens: list[int], most: int) -> None:
    assert repeated(tokens, most) == obvious(tokens, most)


def requests(count: int, seed: int) -> list[Request]:
    """Prompts that repeat themselves, greedy and drawn, some with a form of ending."""
    random = Random(seed)
    found: list[Request] = []
    for number in range(count):
        pattern = [random.randrange(300) for _ in range(random.choice((1, 2, 5)))]
        prompt = tuple((pattern * 40)[: random.choice((1, 15, 16, 17, 33, 70))])
        sampling = Sampling(temperature=random.choice((0.0, 0.7)), seed=number, repetition_penalty=1.1)
        most = random.choice((1, 2, 12, 25))
        found.append(Request(prompt=prompt, max_tokens=most, sampling=sampling, stop_ids=(7, 8), routes=True))
    return found


def answers(engine: Engine, asked: Sequence[Request]) -> list[list[Piece]]:
    numbers = [engine.submit(request) for request in asked]
    found: dict[int, list[Piece]] = {number: [] for number in numbers}
    while engine.busy:
        for piece in engine.step():
            found[piece.request].append(piece)
    owned = {page for some in engine._batch._prefixes._kept.values() for page in some}
    assert engine._batch._pages.free + len(owned) == engine._batch._pages.total
    return list(found.values())


def bits(pieces: Sequence[Piece]) -> list[tuple[object, ...]]:
    """All that a reader sees of an answer."""
    return [
        (p.token, p.logprob, p.finished, None if p.routes is None else p.routes.experts_TMK.tolist())
        for p in pieces
    ]


@pytest.mark.usefixtures("_kernels", "_small")
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("most_tokens", [None, 120])
def test_answers_are_those_without_guesses_to_the_last_bit(way: Speculation, most_tokens: int | None) -> None:
    """With 120 tokens rows wait again and again, and are computed anew."""
    model = lively(DEEPSEEK).bfloat16()
    asked = requests(16, seed=1)
    plain = answers(Engine(model), asked)
    guessing = Engine(model, speculation=way, most_tokens=most_tokens)
    assert [bits(pieces) for pieces in answers(guessing, asked)] == [bits(pieces) for pieces in plain]
    guessed, right = guessing.guesses
    assert 0 <= right <= guessed
    assert guessed


@pytest.mark.usefixtures("_kernels", "_small")
def test_answers_of_packed_weights_are_those_without_guesses() -> None:
    model = lively(ONE).bfloat16()
    pack(model, "int8")
    asked = requests(8, seed=2)
    plain = [bits(pieces) for pieces in answers(Engine(model), asked)]
    assert [bits(p) for p in answers(Engine(model, speculation=Ahead(2)), asked)] == plain


@pytest.mark.usefixtures("_kernels", "_small")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_windows_of_modules_too_are_those_without_guesses(way: Speculation) -> None:
    model = lively(dataclasses.replace(WINDOWED, mtp=MTP(depth=2))).bfloat16()
    asked = requests(12, seed=3)
    plain = [bits(pieces) for pieces in answers(Engine(model), asked)]
    assert [bits(p) for p in answers(Engine(model, speculation=way, most_tokens=120), asked)] == plain


@pytest.mark.parametrize("config", [*KINDS.values(), WINDOWED], ids=[*KINDS, "windowed"])
def test_tokens_of_modules_are_those_without_guesses(config: Model) -> None:
    """PyTorch rounds sums of other sizes otherwise; in float64 no two logits are that close."""
    model = lively(config).double()
    asked = [[1, 2, 1, 2, 1, 2, 1], [5], [9, 9, 9]]
    plain = Engine(model).complete(asked, max_tokens=20)
    for way in (NGrams(3), *((Ahead(3),) if config.mtp.depth else ())):
        assert Engine(model, speculation=way).complete(asked, max_tokens=20) == plain


def test_what_repeats_is_guessed_right() -> None:
    """One token over and over: a pass gives five once there are three."""
    sampling = Sampling(logit_bias=((5, 100.0),))
    engine = Engine(lively(DENSE), speculation=NGrams(4))
    (pieces,) = answers(engine, [Request(prompt=(3,), max_tokens=100, sampling=sampling, stop_ids=())])
    assert [piece.token for piece in pieces] == [5] * 100
    guessed, right = engine.guesses
    assert right == guessed > 70


def whole(model: Decoder, tokens: Sequence[int]) -> int:
    """What the first module says comes after the next token, of a whole text at once."""
    inputs = Inputs(torch.tensor([tokens]))
    with torch.no_grad():
        final_BSD = model.hidden(inputs).final_BSD
        states_BSD = model.module(0, final_BSD, shifted(inputs, 1), drafts.Options()).x_BSD
        return int(model.logits(states_BSD)[0, -2].argmax())


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("by_kernels", [False, True])
def test_modules_guess_what_they_say_of_a_whole_text(
    by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kernels_of(HERE[-1]) if by_kernels else None
    monkeypatch.setattr(native, "kernels", lambda: found)
    model, said = lively(ONE), list[tuple[list[int], int]]()
    engine = Engine(model, speculation=Ahead(1))
    modules = engine._batch.drafts
    assert isinstance(modules, drafts.Modules)
    guess = modules.guess

    def noted(rows: Sequence[drafts.Row], most: Sequence[int]) -> list[list[int]]:
        guesses = guess(rows, most)
        said.extend((list(r.tokens), g[0]) for r, g in zip(rows, guesses, strict=True) if g)
        return guesses

    monkeypatch.setattr(modules, "guess", noted)
    engine.complete([list(range(40)), [5], [7] * 16], max_tokens=12)
    assert len(said) > 20
    assert [token for _, token in said] == [whole(model, tokens) for tokens, _ in said]


def test_deeper_modules_guess_behind_the_first() -> None:
    """Right behind the prompt, where all that they read is known or guessed by those before."""
    model = lively(DEEPSEEK)
    engine = Engine(model, speculation=Ahead(2))
    prompt = list(range(20))
    engine.submit(Request(prompt=tuple(prompt), max_tokens=9, stop_ids=()))
    (piece,) = engine.step()
    (row,) = engine._batch.rows
    assert engine._batch.extend(row, 2)
    ((first, second),) = engine._batch.drafts.guess([row], [2])
    tokens = [*prompt, piece.token]
    with torch.no_grad():
        known = torch.tensor([[*tokens, first]])
        final_BSD = model.hidden(Inputs(known[:, :20])).final_BSD
        options, position = drafts.Options(), torch.arange(20)[None]
        one = model.module(0, final_BSD, Inputs(known[:, 1:21], position_BS=position), options)
        two = model.module(1, one.x_BSD, Inputs(known[:, 2:22], position_BS=position), options)
        assert first == int(model.logits(one.x_BSD)[0, -1].argmax())
        assert second == int(model.logits(two.x_BSD)[0, -1].argmax())


def test_where_guessing_fails_nothing_is_guessed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = lively(ONE)
    right = Engine(model).complete([[1, 2]], max_tokens=6)

    def failing(*given: object) -> list[list[int]]:
        raise MemoryError

    monkeypatch.setattr(drafts.Modules, "guess", failing)
    engine = Engine(model, speculation=Ahead(1))
    assert engine.complete([[1, 2]], max_tokens=6) == right
    assert engine.guesses == (0, 0)
    assert "tokens cannot be guessed" in caplog.text


def test_a_model_without_modules_is_told_so() -> None:
    with pytest.raises(ConsiliumError, match="no multi-token prediction modules"):
        Engine(lively(DENSE), speculation=Ahead())


@pytest.mark.parametrize("way", [NGrams, Ahead])
@pytest.mark.parametrize("tokens", [0, -1, 17])
def test_counts_out_of_range_are_refused(way: type[NGrams | Ahead], tokens: int) -> None:
    with pytest.raises(ConsiliumError, match="1 to 16"):
        way(tokens)


@pytest.mark.usefixtures("_kernels")
@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_any_requests_have_the_answers_without_guesses(seed: int) -> None:
    model = lively(ONE).bfloat16()
    asked = requests(4, seed)
    plain = [bits(pieces) for pieces in answers(Engine(model), asked)]
    for way in (NGrams(3), Ahead(3)):
        assert [bits(p) for p in answers(Engine(model, speculation=way), asked)] == plain
