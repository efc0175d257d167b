"""Muted experts, fewer of them and repeated routing: of one request, and of nobody else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from consilium.engine import batch, intake
from consilium.engine.drafts import NGrams
from consilium.engine.engine import Engine
from consilium.engine.request import Piece, Request
from consilium.engine.routes import Routes
from consilium.engine.steering import Steering
from consilium.errors import ConsiliumError
from consilium.model import native
from kernels import HERE, kernels_of
from small import DEEPSEEK, DENSE, SWITCH, lively

PROMPT = tuple(range(40))


@pytest.fixture(autouse=True, params=[False, True], ids=["modules", "kernels"])
def _small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(HERE[-1]) if request.param else None
    monkeypatch.setattr(native, "kernels", lambda: found)
    monkeypatch.setattr(batch, "PROMPT_PART", 16)
    for module in (batch, intake):
        monkeypatch.setattr(module, "PAGE", 4)


def ask(steering: Steering | None = None, prompt: tuple[int, ...] = PROMPT) -> Request:
    return Request(prompt=prompt, max_tokens=12, stop_ids=(), routes=True, steering=steering)


def answers(engine: Engine, asked: Sequence[Request]) -> list[list[Piece]]:
    found: dict[int, list[Piece]] = {engine.submit(request): [] for request in asked}
    while engine.busy:
        for piece in engine.step():
            found[piece.request].append(piece)
    return list(found.values())


def tokens(pieces: Sequence[Piece]) -> list[int]:
    return [piece.token for piece in pieces]


def routes(pieces: Sequence[Piece]) -> Routes:
    return Routes.joined([piece.routes for piece in pieces if piece.routes is not None])


def recorded(layers: tuple[int, ...], tokens: int, expert: int) -> Routes:
    """Of two choices."""
    shape = tokens, len(layers)
    experts_TMK = torch.full((*shape, 2), expert, dtype=torch.int16)
    return Routes(layers, experts_TMK, torch.zeros(*shape, 2), torch.zeros(shape), torch.zeros(shape))


def nothing(tokens: int) -> Routes:
    """Of no choice at all."""
    known = recorded((1, 2), tokens, 0)
    return dataclasses.replace(known, experts_TMK=known.experts_TMK[:, :, :0])


def test_steering_of_other_shapes_has_another_salt() -> None:
    one, two = recorded((1, 2), 4, 0), recorded((1, 2), 8, 0)
    flat = dataclasses.replace(two, experts_TMK=one.experts_TMK.reshape(8, 2, 1))
    assert one.experts_TMK.numpy().tobytes() == flat.experts_TMK.numpy().tobytes()
    assert Steering(replay=one).salt != Steering(replay=flat).salt


def test_with_fewer_experts_a_token_more_may_be_muted() -> None:
    steering = Steering(mute=tuple((2, expert) for expert in range(7)), top_k=1)
    (pieces,) = answers(Engine(lively(DEEPSEEK)), [ask(steering)])
    assert set(routes(pieces).experts_TMK[:, 1].flatten().tolist()) == {-1, 7}


def test_a_muted_expert_computes_nothing_and_neighbours_do_not_notice() -> None:
    engine = Engine(lively(DEEPSEEK))
    (plain,) = answers(engine, [ask()])
    busiest = int(routes(plain).experts_TMK[:, 1].flatten().bincount().argmax())
    steering = Steering(mute=((2, busiest),))
    muted, beside, again = answers(engine, [ask(steering), ask(), ask(steering)])
    assert not bool((routes(muted).experts_TMK[:, 1] == busiest).any())
    assert bool((routes(muted).experts_TMK[:, 0] >= 0).all())
    assert tokens(muted) != tokens(plain)
    assert tokens(muted) == tokens(again)
    assert tokens(beside) == tokens(plain)


def test_what_is_cached_of_a_steered_prompt_is_for_its_like_alone() -> None:
    model = lively(DEEPSEEK)
    first, then = Steering(mute=((1, 0), (2, 3))), Steering(mute=((2, 3), (1, 0)))
    plain = Request(prompt=PROMPT, max_tokens=12, stop_ids=())
    engine = Engine(model, most_tokens=400)
    steered = Request(prompt=PROMPT, max_tokens=12, stop_ids=(), steering=first)
    ((one,), (two,), (three,)) = (
        answers(engine, [asked])
        for asked in (steered, plain, Request(prompt=PROMPT, max_tokens=12, stop_ids=(), steering=then))
    )
    assert [pieces[0].cached for pieces in (one, two, three)] == [0, 0, 32]
    assert tokens(one) == tokens(three) != tokens(two)
    assert tokens(two) == tokens(answers(Engine(model), [plain])[0])


def test_fewer_experts_a_token() -> None:
    (pieces,) = answers(Engine(lively(DEEPSEEK)), [ask(Steering(top_k=1))])
    used = (routes(pieces).weights_TMK != 0).sum(-1)
    assert bool((used == 1).all())


@pytest.mark.parametrize("config", [DEEPSEEK, SWITCH], ids=["deepseek", "switch"])
def test_routing_that_is_repeated_gives_the_text_again(config: object) -> None:
    model = lively(config)  # pyright: ignore[reportArgumentType]
    (plain,) = answers(Engine(model), [ask()])
    (again,) = answers(Engine(model), [ask(Steering(replay=routes(plain)))])
    assert tokens(again) == tokens(plain)
    assert torch.equal(routes(again).experts_TMK, routes(plain).experts_TMK)
    assert torch.allclose(routes(again).weights_TMK, routes(plain).weights_TMK, atol=1e-5)
    found, right = (torch.tensor([piece.logprob for piece in some]) for some in (again, plain))
    assert torch.allclose(found, right, atol=1e-4)


def test_routing_of_another_text_is_obeyed_as_far_as_it_goes() -> None:
    """Of the tokens behind it, the router decides again."""
    model = lively(DEEPSEEK)
    other = tuple(reversed(PROMPT))
    (theirs,) = answers(Engine(model), [ask(prompt=other)])
    known = routes(theirs).part(0, 44)
    (pieces,) = answers(Engine(model), [ask(Steering(replay=known))])
    assert torch.equal(routes(pieces).experts_TMK[:44], known.experts_TMK)
    assert not torch.equal(routes(pieces).experts_TMK[44:], routes(theirs).experts_TMK[44:])


def test_nothing_is_guessed_of_who_is_steered() -> None:
    model, steering = lively(DEEPSEEK), Steering(mute=((1, 1),))
    asked = [ask(steering, (1, 2) * 10), ask(prompt=(1, 2) * 10)]
    found = answers(Engine(model, speculation=NGrams(3)), asked)
    assert [tokens(some) for some in found] == [tokens(some) for some in answers(Engine(model), asked)]


@pytest.mark.parametrize(
    ("steering", "said"),
    [
        (Steering(mute=((0, 1),)), "expert 1 of layer 0 cannot be muted; the MoE layers are 1 to 2"),
        (Steering(mute=((1, 8),)), "expert 8 of layer 1"),
        (Steering(mute=((1, -1),)), "expert -1 of layer 1"),
        (Steering(mute=tuple((2, e) for e in range(7))), "layer 2 would have 1 experts left of the 2"),
        (Steering(top_k=0), "use 1 to 2"),
        (Steering(top_k=3), "use 1 to 2"),
        (Steering(replay=recorded((1,), 50, 0)), "of layers \\[1\\]"),
        (
            Steering(replay=recorded((1, 2), 50, 8)),
            "names expert 8, and the model has 8",
        ),
        (Steering(replay=recorded((1, 2), 50, -2)), "names expert -2; -1 is for none"),
        (Steering(replay=nothing(50)), "has 0 experts a token, and the model uses 2"),
        (
            Steering(replay=recorded((1, 2), 39, 0)),
            "is of 39 tokens, and the prompt has 40",
        ),
        (Steering(replay=recorded((1, 2), 50, 3)), "sends a token to expert 3 twice; name each once"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(steering: Steering, said: str) -> None:
    with pytest.raises(ConsiliumError, match=said):
        Engine(lively(DEEPSEEK)).submit(ask(steering))


def test_a_dense_model_has_nothing_to_steer() -> None:
    with pytest.raises(ConsiliumError, match="no experts whose routing"):
        Engine(lively(DENSE)).submit(ask(Steering(top_k=1)))
