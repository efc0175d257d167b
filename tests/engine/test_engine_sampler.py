from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.engine.request import Sampling
from consilium.engine.sampler import likeliest, sample
from consilium.errors import ConsiliumError


def draw(logits: list[float], sampling: Sampling, times: int = 4000) -> list[float]:
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = [sample(torch.tensor(logits), sampling, generator)[0] for _ in range(times)]
    return [tokens.count(i) / times for i in range(len(logits))]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_greedy_takes_the_first_of_the_largest_and_reports_its_probability(logits: list[float]) -> None:
    token, logprob = sample(torch.tensor(logits), Sampling(), torch.Generator())
    as_float32 = torch.tensor(logits).tolist()
    assert token == as_float32.index(max(as_float32))
    total = math.log(sum(math.exp(value - max(as_float32)) for value in as_float32))
    assert logprob == pytest.approx(-total, abs=1e-5)


def test_temperature_one_draws_the_softmax() -> None:
    found = draw([0.0, 1.0, 2.0], Sampling(temperature=1.0))
    wanted = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0).tolist()
    assert found == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize("temperature", [1e-39, 1e-300, 1e-30, 1e-6])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    assert draw([3.0, -5.0, 80.0, 79.0], Sampling(temperature=temperature), 20) == [0, 0, 1, 0]
    tied = draw([-7.0, -7.0, -9.0], Sampling(temperature=temperature), 400)
    assert tied[2] == 0
    assert tied[:2] == pytest.approx([0.5, 0.5], abs=0.1)


def test_top_k_keeps_exactly_k_and_ties_rank_by_index() -> None:
    found = draw([1.0, 1.0, 1.0, 0.0], Sampling(temperature=1.0, top_k=2))
    assert found[2:] == [0.0, 0.0]
    assert found[:2] == pytest.approx([0.5, 0.5], abs=0.04)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert draw(logits, Sampling(temperature=1.0, top_p=0.79))[2:] == [0.0, 0.0]
    assert draw(logits, Sampling(temperature=1.0, top_p=0.81))[2] > 0
    assert draw(logits, Sampling(temperature=1.0, top_p=1e-9))[0] == 1.0


@pytest.mark.parametrize("size", [5, 129_280])
def test_filters_that_are_off_remove_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_V = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 4
    given: list[torch.Tensor] = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *a, **k: (given.append(p), draw(p, *a, **k))[1])
    sample(logits_V, Sampling(temperature=1.0, top_p=1.0, top_k=0), torch.Generator())
    assert torch.equal(given[0], torch.softmax(torch.sort(logits_V - logits_V.max(), descending=True)[0], 0))


def twin(logits_V: torch.Tensor, sampling: Sampling, seen: list[int]) -> torch.Tensor:
    """The chances that the processors of transformers leave."""
    processors = [transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    processors.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    processors.append(transformers.MinPLogitsWarper(sampling.min_p))
    ids, scores = torch.tensor([seen]), logits_V[None]
    return torch.softmax(transformers.LogitsProcessorList(processors)(ids, scores), -1)[0]


@settings(max_examples=60)
@given(
    st.integers(0, 10_000),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.5, 1.0, 1.7]),
        top_k=st.integers(0, 40),
        top_p=st.sampled_from([0.3, 0.9, 0.99, 1.0]),
        min_p=st.sampled_from([0.0, 0.05, 0.3]),
        repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
    ),
)
def test_filters_are_those_of_transformers(seed: int, sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(40, generator=generator) * 2
    seen = torch.randint(40, (6,), generator=generator).tolist()
    given: list[torch.Tensor] = []
    draw, torch.multinomial = torch.multinomial, lambda p, *a, **k: (given.append(p), draw(p, *a, **k))[1]
    try:
        token, logprob = sample(logits_V, sampling, generator, seen)
    finally:
        torch.multinomial = draw
    wanted_V = twin(logits_V, sampling, seen)
    assert wanted_V[token] > 0
    assert logprob == pytest.approx(float(torch.log_softmax(logits_V, 0)[token]))
    drawn_V = given[0] / given[0].sum()
    assert drawn_V.tolist() == pytest.approx(wanted_V.sort(descending=True)[0].tolist(), rel=1e-4, abs=1e-9)


def test_a_penalty_moves_greedy_text_too() -> None:
    logits_V = torch.tensor([2.0, 1.9, -1.0])
    assert sample(logits_V, Sampling(repetition_penalty=1.5), torch.Generator(), [0, 0, 2])[0] == 1


def test_a_seed_repeats_its_draws() -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    assert draw([0.0] * 5, sampling, 50) == draw([0.0] * 5, sampling, 50)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(wrong: dict[str, float]) -> None:
    with pytest.raises(ConsiliumError, match=next(iter(wrong))):
        Sampling(**wrong)  # pyright: ignore[reportArgumentType]


@given(
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, 5), st.floats(-100, 100), max_size=3),
    seen=st.lists(st.integers(0, 5), max_size=9),
    data=st.data(),
)
def test_penalties_of_the_answer_and_biases_are_added_value_by_value(
    presence: float, frequency: float, bias: dict[int, float], seen: list[int], data: st.DataObject
) -> None:
    """OpenAI's rule: what is in the prompt counts for nothing."""
    prompt = data.draw(st.integers(0, len(seen)))
    logits = [0.5, -1.0, 2.0, 0.0, -3.0, 1.0]
    sampling = Sampling(
        presence_penalty=presence, frequency_penalty=frequency, logit_bias=tuple(bias.items())
    )
    token, logprob = sample(torch.tensor(logits), sampling, torch.Generator(), seen, prompt)
    answer = seen[prompt:]
    right = torch.tensor(logits) + torch.tensor([bias.get(i, 0.0) for i in range(6)])
    for i in range(6):
        right[i] -= presence * (i in answer) + frequency * answer.count(i)
    assert right[token] >= right.max() - 1e-4
    assert logprob == pytest.approx(float(torch.log_softmax(torch.tensor(logits), 0)[token]), abs=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3, 99])
def test_the_likeliest_have_the_values_of_all(count: int) -> None:
    logprobs_V = torch.log_softmax(torch.randn(20, generator=torch.Generator().manual_seed(0)), 0)
    top = likeliest(logprobs_V, count)
    assert [value for _, value in top] == sorted(logprobs_V.tolist(), reverse=True)[:count]
    assert all(float(logprobs_V[token]) == value for token, value in top)


@pytest.mark.parametrize(
    "wrong", [{"presence_penalty": 2.1}, {"frequency_penalty": -3.0}, {"logit_bias": ((5, 101.0),)}], ids=str
)
def test_what_is_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConsiliumError, match="out of range"):
        Sampling(**wrong)
