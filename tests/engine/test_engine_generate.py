from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.model import Model
from consilium.config.moe import Capacity
from consilium.config.router import ExpertChoice, Raw, Router
from consilium.engine.engine import Engine
from consilium.engine.request import Sampling
from consilium.errors import ConsiliumError
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.model.types import Hidden, Inputs
from consilium.moe.types import Activations, Mode, Override, Report, Routing, Tokens
from consilium.ops.rows import Rows
from engine.codecs import Bytes
from small import DEEPSEEK, DENSE, KINDS, SWITCH, lively

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
prompts_of_ids = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=30), min_size=1, max_size=4)


def without_cache(model: Decoder, prompt: list[int], new: int) -> list[int]:
    """Greedy decoding that runs the whole sequence anew for every token."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@kinds
@settings(max_examples=8)
@given(prompts=prompts_of_ids)
def test_a_batch_with_a_cache_equals_one_by_one_without(config: Model, prompts: list[list[int]]) -> None:
    model = lively(config)
    found = Engine(model).complete(prompts, max_tokens=8)
    assert found == [without_cache(model, prompt, 8) for prompt in prompts]


@kinds
def test_logprobs_are_those_of_a_pass_over_the_whole_text(config: Model) -> None:
    model = lively(config)
    prompt = [5, 17, 255, 3]
    pieces = list(Engine(model).generate([prompt], max_tokens=12))
    tokens = prompt + [piece.token for piece in pieces]
    logprobs_SV = torch.log_softmax(model(torch.tensor([tokens])).logits[0].detach(), -1)
    for i, piece in enumerate(pieces):
        wanted = float(logprobs_SV[len(prompt) + i - 1, piece.token])
        assert piece.logprob == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert [piece.finished for piece in pieces] == [None] * 11 + ["length"]


def test_a_finished_neighbour_changes_nothing() -> None:
    model = lively(DENSE)
    engine = Engine(model, Bytes())
    alone = engine.complete([[1, 2, 3]], max_tokens=10)[0]
    stopper = next(token for token in alone if token < 128)
    together = engine.complete([[1, 2, 3], [1, 2, 3]], max_tokens=10, stop=[chr(stopper)])
    cut = alone.index(stopper) + 1
    assert together == [alone[:cut], alone[:cut]]


def test_a_row_draws_from_its_own_seed() -> None:
    engine = Engine(lively(DENSE))
    sampling = Sampling(temperature=1.0, seed=4)
    alone = [piece.token for piece in engine.generate([[9, 8]], max_tokens=12, sampling=sampling)]
    company = engine.generate([[1], [9, 8], [2, 2, 2]], max_tokens=12, sampling=sampling)
    assert [piece.token for piece in company if piece.request == 1] == alone


def test_equal_prompts_give_different_samples_which_the_seed_repeats() -> None:
    engine = Engine(lively(DENSE))

    def samples(prompts: list[list[int]], seed: int = 0) -> list[list[int]]:
        return engine.complete(prompts, max_tokens=12, temperature=1.0, seed=seed)

    three = samples([[1, 2, 3]] * 3)
    assert len({tuple(sample) for sample in three}) == 3
    assert samples([[1, 2, 3], [4], [1, 2, 3], [4, 4], [1, 2, 3]])[::2] == three
    assert samples([[1, 2, 3]] * 3) == three
    assert not {tuple(sample) for sample in samples([[1, 2, 3]] * 3, seed=1)} & {tuple(s) for s in three}


def test_one_text_is_one_prompt() -> None:
    engine = Engine(lively(DENSE), Bytes())
    assert engine.complete("hello", max_tokens=3) == engine.complete(["hello"], max_tokens=3)


def test_one_stop_text_is_one_stop() -> None:
    engine = Engine(lively(DENSE), Bytes())
    text = bytes(token for token in engine.complete([[1, 2, 3]], max_tokens=20)[0] if token < 128).decode()
    unseen = next(chr(code) for code in range(33, 128) if chr(code) not in text)
    stop = f"{text[0]}{unseen}"
    assert len(engine.complete([[1, 2, 3]], max_tokens=20, stop=stop)[0]) == 20
    assert len(engine.complete([[1, 2, 3]], max_tokens=20, stop=text[0])[0]) < 20


def test_the_engine_computes_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes nothing on the default device, where on meta there would be no values."""
    engine, hidden = Engine(lively(DEEPSEEK)), Decoder.hidden

    def on_cpu(model: Decoder, inputs: Inputs, **rest: Any) -> Hidden:
        with torch.device("cpu"):
            return hidden(model, inputs, **rest)

    monkeypatch.setattr(Decoder, "hidden", on_cpu)
    wanted = engine.complete([[1, 2], [3]], max_tokens=4, temperature=1.0)
    with torch.device("meta"):
        assert engine.complete([[1, 2], [3]], max_tokens=4, temperature=1.0) == wanted


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ConsiliumError, match="meta device has no weights"):
        Engine(build(DENSE, device="meta"))


@pytest.mark.parametrize(
    "changes",
    [
        {"router": Router(select=ExpertChoice(), weight=Raw())},
        {"admission": Capacity(factor=1.0, scope="always")},
        {"admission": Capacity(factor=1.0, by="probability", scope="always")},
    ],
    ids=["expert choice", "capacity always", "capacity always by probability"],
)
def test_models_whose_routing_depends_on_company_are_refused(changes: dict[str, object]) -> None:
    assert SWITCH.moe is not None
    moe = dataclasses.replace(SWITCH.moe, **changes)
    with pytest.raises(ConsiliumError, match="depend on the batch"):
        Engine(build(dataclasses.replace(SWITCH, moe=moe)))


class Loads:
    """Notes the kept copies of every expert in every layer of every pass."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        self.seen.append(routing.load_E())

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        pass


def test_steps_ask_for_counts_alone() -> None:
    model, reports, passes = lively(DEEPSEEK), list[Report](), list[int]()
    for layer in model.moe_modules().values():
        layer.balance.register_forward_hook(lambda module, inputs, report: reports.append(report))
    model.layers[0].register_forward_hook(lambda module, inputs, output: passes.append(inputs[0].shape[1]))
    engine = Engine(model)
    engine.complete([[1, 2, 3]], max_tokens=4)
    assert passes == [3, 1, 1, 1]
    assert reports
    assert all(report.entropy is None and not report.losses for report in reports)
    assert sum(map(sum, engine.loads.values())) == int(sum(report.load_E.sum() for report in reports))


def test_a_muted_expert_is_muted_in_every_step() -> None:
    mute_1E = torch.tensor([[True, False, False, True]])
    override, loads = {layer: Override(mute_TE=mute_1E) for layer in SWITCH.moe_layers}, Loads()
    Engine(lively(SWITCH), mode=Mode(override=override, observer=loads)).complete([[1, 2, 3]], max_tokens=4)
    assert len(loads.seen) == 4 * len(SWITCH.moe_layers)
    assert not torch.stack(loads.seen)[:, [0, 3]].any()


def test_the_end_token_ends_the_text_without_being_shown() -> None:
    model = lively(dataclasses.replace(DENSE, tied=False))
    with torch.no_grad():
        model.norm.weight.zero_()
    engine = Engine(model, Bytes())
    pieces = list(engine.generate(["a"], max_tokens=5))
    assert [piece.token for piece in pieces] == [0] * 5

    class Ends(Bytes):
        eos_id = 0

    ended = list(Engine(model, Ends()).generate(["a"], max_tokens=5))
    assert [(piece.token, piece.text, piece.finished) for piece in ended] == [(0, "", "stop")]


def test_streamed_text_is_the_text_of_all_tokens() -> None:
    engine = Engine(lively(DENSE), Bytes())
    pieces = list(engine.generate(["héllo 你好"], max_tokens=40, sampling=Sampling(temperature=2.0, seed=1)))
    assert "".join(piece.text for piece in pieces) == Bytes().decode(
        [p.token for p in pieces if p.token != 256]
    )


@pytest.mark.parametrize(("opening", "ids"), [(256, [256, 97, 98]), (7, [7, 97, 98]), (None, [97, 98])])
def test_text_prompts_begin_as_the_tokenizer_says(opening: int | None, ids: list[int]) -> None:
    codec = Bytes()
    codec.opening_id = opening
    engine = Engine(lively(DENSE), codec)
    assert engine.complete(["ab"], max_tokens=4) == engine.complete([ids], max_tokens=4)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [300]], {}, "prompt 1 has a token id outside 0..299"),
        ([[-1]], {}, "outside"),
        ([[1] * 250], {"max_tokens": 7}, "exceeds the model's length 256"),
        (["text"], {}, "needs a tokenizer"),
        ([[1]], {"stop": ["x"]}, "needs a tokenizer"),
    ],
)
def test_wrong_prompts_are_refused_in_one_sentence(
    prompts: list[list[int]], options: dict[str, int], words: str
) -> None:
    with pytest.raises(ConsiliumError, match=words):
        Engine(lively(DENSE)).complete(prompts, **options)


def test_no_prompts_give_nothing() -> None:
    assert Engine(lively(DENSE)).complete([], max_tokens=3) == []


def test_the_cache_is_the_only_memory_of_a_call() -> None:
    model = lively(DENSE)
    engine = Engine(model)
    first = engine.complete([[1, 2, 3]], max_tokens=6)
    engine.complete([[4, 4, 4, 4]], max_tokens=6)
    assert engine.complete([[1, 2, 3]], max_tokens=6) == first
    assert model(Inputs(torch.tensor([[1, 2, 3]]))).logits.shape == (1, 3, 300)
