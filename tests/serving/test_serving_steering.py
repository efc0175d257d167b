"""Routing that a request changes, and guesses that change nothing, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from consilium.engine.drafts import Ahead, NGrams
from serving.served import Server, engine_of, serving

ASKED = {"prompt": [1, 70, 71, 72, 70, 71], "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


def choice(server: Server, **more: Any) -> dict[str, Any]:
    answer = server.http().post("/v1/completions", json=ASKED | {"return_routed_experts": True} | more)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_a_muted_expert_computes_nothing_of_a_request(server: Server) -> None:
    plain = choice(server)
    busiest = plain["routed_experts"][3][1][0]
    muted = choice(server, mute_experts=[[2, busiest], [1, 0]])
    for token in (*muted["prompt_routed_experts"], *muted["routed_experts"]):
        assert busiest not in token[1]
        assert 0 not in token[0]
    assert choice(server)["text"] == plain["text"]


def test_fewer_experts_a_token(server: Server) -> None:
    found = choice(server, experts_per_token=1)
    assert all(weights[1] == 0 for token in found["routed_weights"] for weights in token)
    assert all(experts[1] == -1 for token in found["routed_experts"] for experts in token)


def test_an_answer_is_replayed_by_what_was_told_of_it(server: Server) -> None:
    plain = choice(server, seed=3, temperature=1.0)
    experts = plain["prompt_routed_experts"] + plain["routed_experts"]
    again = choice(server, seed=3, temperature=1.0, replay_routed_experts=experts)
    assert again["text"] == plain["text"]
    assert again["routed_experts"] == plain["routed_experts"]


def test_the_runner_up_is_told_and_was_not_used(server: Server) -> None:
    """By how much it was behind is what decides whether a token could have gone elsewhere."""
    found = choice(server)
    told = zip(found["routed_experts"], found["runner_up_experts"], found["routed_margins"], strict=True)
    for experts, seconds, margins in told:
        assert all(second not in used for second, used in zip(seconds, experts, strict=True))
        assert all(0 <= second < 8 for second in seconds)
        assert all(-1 < margin < 2 for margin in margins)
    assert len(found["prompt_runner_up_experts"]) == len(found["prompt_routed_margins"]) == 6


def test_tokens_of_prompt_and_answer_are_told_on_request(server: Server) -> None:
    found = choice(server, return_token_ids=True)
    assert found["prompt_token_ids"] == ASKED["prompt"]
    assert len(found["prompt_token_strs"]) == len(found["prompt_routed_experts"])
    assert len(found["token_ids"]) == 8
    words = server.service.tokenizer
    assert words.decode(found["token_ids"]) == found["text"]
    assert choice(server, return_token_ids=True, max_tokens=0)["token_ids"] == []
    assert "token_ids" not in choice(server)


def test_a_chat_tells_the_tokens_of_its_template(server: Server) -> None:
    asked = {
        "messages": [{"role": "user", "content": "Why? \u4eca"}],
        "max_tokens": 5,
        "return_token_ids": True,
        "return_routed_experts": True,
    }
    whole = server.http().post("/v1/chat/completions", json=asked | {"seed": 1}).json()
    texts = whole["prompt_token_strs"]
    assert "Q: Why? " in "".join(texts)
    assert "bytes:\\xe4" in texts, "a part of a character"
    assert len(texts) == len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert len(whole["choices"][0]["prompt_routed_experts"]) == len(texts)
    answer = server.http().post("/v1/chat/completions", json=asked | {"seed": 1, "stream": True})
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    first, *rest = map(json.loads, lines)
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("prompt_token_ids" not in chunk for chunk in rest)
    streamed = [token for chunk in rest for token in chunk["choices"][0]["token_ids"]]
    assert streamed == whole["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"mute_experts": [[0, 1]]}, "the MoE layers are 1 to 2"),
        ({"mute_experts": [[1]]}, "mute_experts"),
        ({"mute_experts": [[1, 2**40]]}, "mute_experts"),
        ({"mute_experts": [[2, e] for e in range(7)]}, "would have 1 experts left"),
        ({"experts_per_token": 0}, "experts_per_token"),
        ({"experts_per_token": 3}, "use 1 to 2"),
        ({"replay_routed_experts": []}, "no list of tokens of 2 layers"),
        ({"replay_routed_experts": [[[1, 2]]]}, "no list of tokens of 2 layers"),
        ({"replay_routed_experts": [[[1, 2], [1]]]}, "no list of tokens of 2 layers"),
        ({"replay_routed_experts": [[[1, 2], [1, 9]]] * 9}, "names expert 9"),
        ({"replay_routed_experts": [[[1, 2, 3], [1, 2, 3]]] * 9}, "has 3 experts a token"),
        ({"replay_routed_experts": [[[1, 2], [1, 2]]]}, "is of 1 tokens"),
        ({"replay_routed_experts": [[[1, 2], [1, 2**20]]]}, "replay_routed_experts"),
        ({"replay_routed_experts": "all"}, "replay_routed_experts"),
    ],
)
def test_steering_that_cannot_be_is_refused(more: dict[str, Any], said: str, server: Server) -> None:
    answer = server.http().post("/v1/completions", json=ASKED | more)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("way", [NGrams(3), Ahead(2)], ids=str)
def test_guesses_change_no_answer_and_are_counted(way: NGrams | Ahead, server: Server) -> None:
    asked = ASKED | {"max_tokens": 40}
    right = server.http().post("/v1/completions", json=asked).json()["choices"]
    with serving(engine_of(speculation=way)) as guessing:
        client = guessing.http()
        assert client.post("/v1/completions", json=asked).json()["choices"] == right
        lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines())
        guessed, kept = (
            float(lines[f"consilium:spec_decode_num_{name}_tokens_total"]) for name in ("draft", "accepted")
        )
        assert 0 <= kept <= guessed
        assert (guessed, kept) == guessing.engine.guesses
