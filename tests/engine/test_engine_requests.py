from __future__ import annotations

import dataclasses
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.engine.engine import Engine
from consilium.engine.request import Piece, Request, Sampling
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.moe.types import Activations, Mode, Routing, Tokens
from consilium.ops.rows import Rows
from engine.codecs import Bytes
from small import DEEPSEEK, DENSE, KINDS, SWITCH, lively

requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=20).map(tuple),
    max_tokens=st.integers(1, 12),
    sampling=st.builds(Sampling, temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 3)),
)


def drained(engine: Engine) -> list[Piece]:
    pieces: list[Piece] = []
    while engine.busy:
        pieces += engine.step()
    return pieces


def tokens_of(pieces: list[Piece]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    for piece in pieces:
        tokens[piece.request].append(piece.token)
    return tokens


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@settings(max_examples=4)
@given(plan=st.lists(st.tuples(requests, st.integers(0, 4)), min_size=1, max_size=6), rows=st.integers(1, 4))
def test_who_comes_and_goes_changes_nothing(
    config: Model, plan: list[tuple[Request, int]], rows: int
) -> None:
    """Requests join after any number of steps, at most ``rows`` run, and each is as if it were alone."""
    model = lively(config)
    engine, found, ids = Engine(model, most_rows=rows), [], []
    for request, pause in plan:
        ids.append(engine.submit(request))
        for _ in range(pause):
            found += engine.step()
    found += drained(engine)
    alone = [[piece.token for piece in _alone(model, request)] for request, _ in plan]
    assert [tokens_of(found)[one] for one in ids] == alone


def _alone(model: Decoder, request: Request) -> list[Piece]:
    engine = Engine(model)
    engine.submit(request)
    return drained(engine)


def test_a_long_request_outgrows_its_first_slots() -> None:
    model = lively(dataclasses.replace(DENSE, max_length=900))
    engine = Engine(model)
    short, long = Request(prompt=(1, 2), max_tokens=3), Request(prompt=(5,) * 250, max_tokens=40)
    ids = [engine.submit(long), engine.submit(short)]
    found = tokens_of(drained(engine))
    assert [found[one] for one in ids] == [[p.token for p in _alone(model, one)] for one in (long, short)]


def test_a_cancelled_request_gives_nothing_more_and_disturbs_nobody() -> None:
    model = lively(DEEPSEEK)
    engine = Engine(model, most_rows=2)
    wanted = Request(prompt=(9, 8), max_tokens=8)
    running, kept, waiting = (
        engine.submit(Request(prompt=(7,), max_tokens=8)),
        engine.submit(wanted),
        engine.submit(Request(prompt=(1,), max_tokens=8)),
    )
    found = engine.step() + engine.step()
    for gone in (running, waiting, 999):
        engine.cancel(gone)
    rest = drained(engine)
    assert {piece.request for piece in rest} == {kept}
    assert tokens_of(found + rest)[kept] == [piece.token for piece in _alone(model, wanted)]
    assert engine.step() == []


def test_generate_leaves_the_pieces_of_others_to_them() -> None:
    model = lively(DENSE)
    engine = Engine(model)
    mine = Request(prompt=(1, 2, 3), max_tokens=12)
    one = engine.submit(mine)
    assert engine.complete([[4, 5]], max_tokens=5) == Engine(model).complete([[4, 5]], max_tokens=5)
    assert tokens_of(drained(engine))[one] == [piece.token for piece in _alone(model, mine)]


def test_an_abandoned_stream_stops_costing() -> None:
    engine = Engine(lively(DENSE))
    stream = engine.generate([[1], [2]], max_tokens=50)
    next(stream)
    stream.close()
    assert engine.step() == []


def test_a_request_has_its_own_settings() -> None:
    model = lively(DENSE)
    plain = Engine(model, Bytes())
    text = plain.complete_text(["abc"], max_tokens=20)[0]
    ids = [
        plain.submit(Request(prompt="abc", max_tokens=20, stop=(text[3:5],))),
        plain.submit(Request(prompt="abc", max_tokens=4)),
        plain.submit(Request(prompt="abc", max_tokens=20, stop_ids=tuple(range(257)))),
    ]
    pieces = drained(plain)
    assert "".join(p.text for p in pieces if p.request == ids[0]) == text[: text.index(text[3:5])]
    assert [p.finished for p in pieces if p.request == ids[1]] == [None] * 3 + ["length"]
    assert [(p.text, p.finished) for p in pieces if p.request == ids[2]] == [("", "stop")]


def test_without_a_limit_the_answer_ends_where_the_length_does() -> None:
    pieces = list(Engine(lively(dataclasses.replace(DENSE, max_length=16))).generate([[1]], max_tokens=None))
    assert len(pieces) == 15
    assert pieces[-1].finished == "length"
    with pytest.raises(ConsiliumError, match="prompt 0 of 256 tokens exceeds the model's length 256"):
        Engine(lively(DENSE)).complete([[1] * 256], max_tokens=None)


def test_every_end_token_of_the_files_ends_the_text() -> None:
    model = lively(DENSE)
    free = Engine(model, Bytes()).complete([[3]], max_tokens=8)[0]
    model.generation = GenerationDefaults(ends=(256, free[4]))
    first = free.index(free[4])
    assert Engine(model, Bytes()).complete([[3]], max_tokens=8)[0] == free[: first + 1]
    assert Engine(model).stop_ids == (256, free[4])


def test_ids_that_the_tokenizer_lacks_are_never_drawn() -> None:
    class Few(Bytes):
        known_ids = range(100)  # pyright: ignore[reportAssignmentType]

    model = lively(DENSE)
    drawn = Engine(model, Few()).complete([[1]], max_tokens=60, temperature=5.0)[0]
    assert max(drawn[:-1]) < 100
    assert drawn[-1] < 100 or drawn[-1] == 256
    greedy = Engine(model, Few()).complete([[1]], max_tokens=8)
    assert greedy == Engine(model, Bytes()).complete([[1]], max_tokens=8), "greedy text is the model's own"


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    class Many(Bytes):
        known_ids = range(301)  # pyright: ignore[reportAssignmentType]

    with pytest.raises(ConsiliumError, match="token 300 but the model's vocabulary ends at 299"):
        Engine(lively(DENSE), Many())


def test_weights_that_overflow_are_said() -> None:
    model = lively(DENSE)
    with torch.no_grad():
        model.norm.weight.fill_(torch.inf)
    for temperature in (0.0, 1.0):
        with pytest.raises(ConsiliumError, match="not finite"):
            Engine(model).complete([[1]], temperature=temperature)


class Counter:
    """Counts kept copies by layer, as an observer sees them."""

    def __init__(self) -> None:
        self.loads: dict[int, torch.Tensor] = {}

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        self.loads[layer] = self.loads.get(layer, 0) + routing.load_E()

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        pass


@pytest.mark.parametrize(("config", "k"), [(DEEPSEEK, 2), (SWITCH, 1)], ids=["deepseek", "switch"])
def test_the_load_of_every_expert_is_on_record(config: Model, k: int) -> None:
    seen = Counter()
    engine = Engine(lively(config), mode=Mode(observer=seen))
    assert engine.loads == {}
    engine.complete([[1, 2, 3], [4]], max_tokens=5)
    assert engine.loads == {layer: tuple(load.tolist()) for layer, load in seen.loads.items()}
    assert {sum(load) for load in engine.loads.values()} == {k * (4 + 2 * 4)}


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ConsiliumError, match="stop text is empty"):
        Request(prompt="a", stop=("",))


def test_a_request_for_nothing_is_refused() -> None:
    engine = Engine(lively(DENSE))
    with pytest.raises(ConsiliumError, match="no new tokens"):
        engine.submit(Request(prompt=(1, 2), max_tokens=0))
    assert engine.complete([[1, 2]], max_tokens=0) == [[]]
    assert not engine.busy
