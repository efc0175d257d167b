"""Pages, prompts in parts, shared beginnings and waiting again: none of them changes a token or a bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from random import Random

import pytest
import torch

from consilium.config.model import Model
from consilium.engine import batch, engine, intake
from consilium.engine.engine import Engine
from consilium.engine.request import Piece, Request, Sampling
from consilium.errors import ConsiliumError
from consilium.kv.rows import CacheFormat
from consilium.model import native
from consilium.model.decoder import Decoder
from consilium.model.packing import pack
from consilium.ops.weights import Packing
from kernels import HERE, kernels_of
from small import DEEPSEEK, SWITCH, WINDOWED, lively

PART, PAGE = 16, 4


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(HERE[-1])
    monkeypatch.setattr(native, "kernels", lambda: found)
    monkeypatch.setattr(batch, "PROMPT_PART", PART)
    for module in (batch, intake):
        monkeypatch.setattr(module, "PAGE", PAGE)


def made(config: Model = DEEPSEEK, packing: Packing | None = None) -> Decoder:
    model = lively(config).bfloat16()
    if packing is not None:
        pack(model, packing)
    return model


def sound(engine: Engine) -> None:
    """Every page is free or has an owner, and none is left when all have gone."""
    pages, prefixes, rows = (
        engine._batch._pages,
        engine._batch._prefixes,
        [*engine._batch.rows, *engine._waiting],
    )
    owned = {page for row in rows for page in row.pages}
    kept = {page for some in prefixes._kept.values() for page in some}
    assert pages.free + len(owned | kept) == pages.total == engine._batch._pool.pages


def drained(engine: Engine, requests: Sequence[Request] = ()) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for piece in engine.step():
            found.setdefault(piece.request, []).append(piece)
        sound(engine)
    return found


def told(pieces: Sequence[Piece]) -> list[tuple[int, float]]:
    return [(piece.token, piece.logprob) for piece in pieces]


def alone(model: Decoder, request: Request, cache: CacheFormat = "model") -> list[tuple[int, float]]:
    ((_, pieces),) = drained(Engine(model, cache=cache), [request]).items()
    return told(pieces)


def ask(prompt: tuple[int, ...], most: int | None) -> Request:
    return Request(prompt=prompt, max_tokens=most, stop_ids=())


def requests(count: int, seed: int, begin: Sequence[int] = ()) -> list[Request]:
    random = Random(seed)
    return [
        Request(
            prompt=(*begin, *(random.randrange(300) for _ in range(random.choice((1, 3, 15, 16, 17, 40))))),
            max_tokens=random.randrange(1, 14),
            sampling=Sampling(temperature=random.choice((0.0, 1.0)), seed=random.randrange(9)),
            stop_ids=(),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("config", "packing", "cache"),
    [
        (DEEPSEEK, None, "model"),
        (DEEPSEEK, "int8", "model"),
        (DEEPSEEK, "int4", "int8"),
        (SWITCH, None, "model"),
        (SWITCH, "int8", "model"),
        (DEEPSEEK, "fp8", "model"),
        (WINDOWED, None, "model"),
    ],
    ids=[
        "latent",
        "latent-int8",
        "latent-int4-cache-int8",
        "grouped",
        "grouped-int8",
        "latent-fp8",
        "window",
    ],
)
@pytest.mark.parametrize("most", [64, 100, 1000])
def test_a_full_cache_lets_the_newest_wait_and_changes_no_bit(
    config: Model, packing: Packing | None, cache: CacheFormat, most: int
) -> None:
    """Log probabilities too: what is decoded anew has the bits that it had."""
    model, asked = made(config, packing), requests(12, seed=most)
    engine = Engine(model, most_tokens=most, cache=cache)
    again = 0
    leave = engine._batch.leave

    def counted(row: batch.Row) -> None:
        nonlocal again
        again += row.finished is None
        leave(row)

    engine._batch.leave = counted  # pyright: ignore[reportAttributeAccessIssue]
    found = drained(engine, asked)
    right = [alone(model, request, cache) for request in asked]
    assert [told(pieces) for pieces in found.values()] == right
    assert (again > 0) == (most < 200), "somebody waited again where there was little room"


@pytest.mark.parametrize("page", [1, 2, 8, 16])
def test_the_size_of_pages_changes_no_bit(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = made(), requests(5, seed=1)
    right = [alone(model, request) for request in asked]
    for module in (batch, intake):
        monkeypatch.setattr(module, "PAGE", page)
    assert [told(pieces) for pieces in drained(Engine(model), asked).values()] == right


@pytest.mark.parametrize("most", [1, 16, 40])
def test_how_much_a_step_reads_changes_no_bit(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = made(), requests(6, seed=2)
    right = [alone(model, request) for request in asked]
    monkeypatch.setattr(engine, "MOST_READ", most)
    assert [told(pieces) for pieces in drained(Engine(model), asked).values()] == right


@pytest.mark.parametrize("shared", [15, 16, 17, 32, 40])
def test_prompts_that_begin_alike_share_whole_parts_and_change_no_bit(shared: int) -> None:
    model, begin = made(), tuple(range(100, 100 + shared))
    asked = [*requests(6, seed=3, begin=begin), Request(prompt=begin, max_tokens=4, stop_ids=())]
    right = [alone(model, request) for request in asked]
    engine = Engine(model)
    found = [told(pieces) for request in asked for pieces in drained(engine, [request]).values()]
    assert found == right
    read = sum(sum(counts) for counts in engine.loads.values())
    each = [Engine(model) for _ in asked]
    for one, request in zip(each, asked, strict=True):
        drained(one, [request])
    whole = sum(sum(counts) for one in each for counts in one.loads.values())
    assert (read < whole) == (shared >= PART), "parts that are known are not computed"


def test_a_prompt_that_is_known_whole_is_read_from_its_last_part_on() -> None:
    model, prompt = made(), tuple(range(2 * PART))
    engine = Engine(model)
    once, again = (told(*drained(engine, [ask(prompt, 3)]).values()) for _ in range(2))
    assert once == again == alone(model, ask(prompt, 3))
    layer, counts = next(iter(engine.loads.items()))
    tokens = sum(counts) // DEEPSEEK.moe.router.select.k if DEEPSEEK.moe else 0
    assert (layer in DEEPSEEK.moe_layers, tokens) == (True, (2 + 1) * PART + 2 * 2)


def test_beginnings_are_forgotten_before_anybody_waits() -> None:
    model = made()
    engine = Engine(model, most_tokens=80)
    for seed in range(6):
        asked = ask(tuple(Random(seed).choices(range(300), k=60)), 4)
        assert told(*drained(engine, [asked]).values()) == alone(model, asked)
    assert engine._batch._pages.total == 20


def test_a_prompt_is_read_over_steps_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MOST_READ", PART)
    one = Engine(made())
    first = one.submit(ask((1,), 20))
    one.step()
    second = one.submit(ask(tuple(range(60)), 2))
    steps = [{piece.request for piece in one.step()} for _ in range(4)]
    assert steps == [{first}, {first}, {first}, {first, second}]


def test_who_is_cancelled_while_its_prompt_is_read_gives_its_pages_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "MOST_READ", PART)
    one = Engine(made())
    gone = one.submit(ask(tuple(range(60)), 2))
    assert one.step() == []
    assert one.waiting == 1
    one.cancel(gone)
    sound(one)
    assert (one.busy, one.step()) == (False, [])


def test_a_request_beyond_the_whole_cache_is_refused_at_once() -> None:
    one = Engine(made(), most_tokens=30)
    with pytest.raises(
        ConsiliumError, match=r"the prompt of 20 tokens with 9 new ones exceeds the 28 tokens of"
    ):
        one.submit(ask(tuple(range(20)), 9))
    (pieces,) = drained(one, [ask(tuple(range(20)), None)]).values()
    assert (len(pieces), pieces[-1].finished) == (8, "length")


def test_not_a_number_in_one_row_reaches_no_other() -> None:
    """Pages are cleared before somebody else owns them: 0 times NaN is NaN where modules mask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels", lambda: None)
        model = lively(dataclasses.replace(DEEPSEEK, max_length=64))
        one = Engine(model, most_tokens=64)
        asked = [ask((1,), 2), ask((5, 6), 5), ask(tuple(range(9)), 5)]
        right = drained(Engine(model), asked)
        with torch.no_grad():
            kept = model.embed.weight[7].clone()
            model.embed.weight[7] = torch.nan
        one.submit(ask((7,) * 40, 3))
        (piece,) = one.step()
        assert (piece.finished, "not finite" in str(piece.error)) == ("error", True)
        assert not one.busy, "who fails has left"
        with torch.no_grad():
            model.embed.weight[7] = kept
        found = drained(one, asked)
    assert [told(pieces) for pieces in found.values()] == [told(pieces) for pieces in right.values()]


def test_a_request_that_fails_takes_no_token_from_the_others() -> None:
    """It fails when its own answer reaches the token whose embedding is no number."""
    model = lively(dataclasses.replace(DEEPSEEK, max_length=64))
    asked = [ask((5, 6), 8), ask((9,), 8), ask(tuple(range(20)), 8)]
    right = [alone(model, request) for request in asked]
    others = {token for other in right[1:] for token, _ in other} | set(range(20))
    poison = next(token for token, _ in right[0][:-1] if token not in others)
    with torch.no_grad():
        model.embed.weight[poison] = torch.nan
    one, found, failures = Engine(model), dict[int, list[Piece]](), 0
    ids = [one.submit(request) for request in asked]
    while one.busy:
        pieces = one.step()
        failures += sum(piece.error is not None for piece in pieces)
        pieces = [piece for piece in pieces if piece.error is None]
        for piece in pieces:
            found.setdefault(piece.request, []).append(piece)
        sound(one)
    assert failures == 1
    assert [told(found[number]) for number in ids[1:]] == right[1:]
    assert 0 < len(found[ids[0]]) < 8


def test_parts_of_another_size_share_more_and_their_bits_hold_too() -> None:
    model = made()
    begin = tuple(range(20))
    asked = [ask((*begin, 100 + i), 6) for i in range(3)]
    engine = Engine(model, part=8, most_tokens=400)
    found = [drained(engine, [request]) for request in asked]
    assert [next(iter(pieces.values()))[0].cached for pieces in found] == [0, 16, 16]
    again = Engine(model, part=8)
    for request, pieces in zip(asked, found, strict=True):
        ((_, fresh),) = drained(again, [request]).items()
        assert told(fresh) == told(next(iter(pieces.values())))
    for wrong in (0, -4, 6):
        with pytest.raises(ConsiliumError, match="use a multiple of 4"):
            Engine(model, part=wrong)


def test_what_is_pooled_of_a_prompt_that_is_read_again_is_the_same() -> None:
    """A request that goes on takes the page that the reading of the other's prompt had."""
    model = made(dataclasses.replace(DEEPSEEK, max_length=8192))
    prompt = tuple(i % 300 for i in range(3000))
    pooling = Request(prompt=prompt, max_tokens=0, pools="mean", stop_ids=())
    ((_, (right,)),) = drained(Engine(model), [pooling]).items()
    again = 0
    for steps in range(184, 196):
        engine, found, last = Engine(model, most_tokens=3200), list[Piece](), 0
        engine.submit(ask((1, 2, 3), 400))
        for _ in range(steps):
            engine.step()
        number = engine.submit(pooling)
        while not found:
            found = [piece for piece in engine.step() if piece.request == number]
            cached = engine._waiting[0].cached if engine._waiting else last
            again, last = again + (cached < last), cached
        assert torch.allclose(torch.tensor(found[0].state), torch.tensor(right.state), atol=1e-6)
        assert found[0].cached == 0
    assert again, "one of them was read again"
