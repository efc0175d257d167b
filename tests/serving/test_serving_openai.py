"""OpenAI's own client against a server: answers are the engine's, streamed or not."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from consilium.data.forms import Message
from consilium.engine.chat import Questions
from consilium.engine.engine import Engine
from consilium.model.types import Inputs, Options
from serving.served import NAME, Server, engine_of, serving

GREEDY = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def right() -> Engine:
    return engine_of()


def test_the_model_is_listed(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "consilium"
    with pytest.raises(openai.NotFoundError, match="only 'small'"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("prompt", ["def add(", [5, 6, 7]], ids=["text", "tokens"])
def test_a_completion_is_that_of_the_engine(prompt: Any, server: Server, right: Engine) -> None:
    found = server.client().completions.create(prompt=prompt, max_tokens=12, **GREEDY)
    assert found.choices[0].text == right.complete_text([prompt], max_tokens=12)[0]
    assert found.usage is not None
    pieces = len(right.complete([prompt], max_tokens=12)[0])
    assert found.usage.completion_tokens == pieces
    assert found.choices[0].finish_reason in {"length", "stop"}


def test_several_prompts_have_an_answer_each(server: Server, right: Engine) -> None:
    prompts = ["a", "def f", "a"]
    found = server.client().completions.create(prompt=prompts, max_tokens=6, n=2, **GREEDY)
    assert [choice.index for choice in found.choices] == list(range(6))
    texts = right.complete_text(["a", "def f"], max_tokens=6)
    assert [choice.text for choice in found.choices] == [texts[i] for i in (0, 0, 1, 1, 0, 0)]


def streamed(client: openai.OpenAI, **asked: Any) -> tuple[list[str], Any]:
    texts: dict[int, str] = {}
    last = None
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **asked):
        if chunk.choices:
            texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
        last = chunk
    return [texts[index] for index in sorted(texts)], last


@pytest.mark.parametrize("seed", [1, 2])
def test_a_stream_is_the_whole_answer_in_parts(seed: int, server: Server) -> None:
    asked = {"model": NAME, "prompt": ["ab", "c"], "max_tokens": 40, "n": 2, "seed": seed, "temperature": 1.3}
    whole = server.client().completions.create(**asked)
    texts, last = streamed(server.client(), **asked)
    assert texts == [choice.text for choice in whole.choices]
    assert last.choices == []
    assert last.usage == whole.usage


def test_a_chat_is_the_engines_answer_to_the_conversation(server: Server, right: Engine) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi?"}]},
    ]
    form = Questions(server.service.tokenizer)
    ids = form.ids([Message("system", "Be brief.\n\nBe kind."), Message("user", "Hi?")])
    wanted = right.complete_text([ids], max_tokens=20, stop=form.stops)[0]
    found = server.client().chat.completions.create(messages=messages, max_tokens=20, **GREEDY)
    assert found.choices[0].message.content == wanted
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids)
    chunks = list(
        server.client().chat.completions.create(
            messages=messages, max_completion_tokens=20, stream=True, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == found.choices[0].finish_reason


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context() -> None:
    with serving(engine_of(length=64)) as server:
        found = server.client().chat.completions.create(messages=[{"role": "user", "content": "x"}], **GREEDY)
    assert found.usage is not None
    assert found.usage.total_tokens == 64 or found.choices[0].finish_reason == "stop"


def test_a_completion_without_a_limit_has_sixteen_tokens_and_no_more_than_fit() -> None:
    with serving(engine_of(length=40)) as server:
        sizes = []
        for prompt in ([1] * 8, [1] * 30):
            found = server.client().completions.create(
                prompt=prompt, extra_body={"ignore_eos": True}, **GREEDY
            )
            assert found.usage is not None
            sizes.append(found.usage.completion_tokens)
    assert sizes == [16, 10]


def test_logprobs_of_prompt_and_answer_are_those_of_one_pass(server: Server, right: Engine) -> None:
    prompt = [1, 40, 41, 42] * 150
    found = server.client().completions.create(
        prompt=prompt, max_tokens=5, echo=True, logprobs=3, extra_body={"ignore_eos": True}, **GREEDY
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    new = [piece.token for piece in right.generate([prompt], max_tokens=5, stop_ids=())]
    tokens = prompt + new
    with torch.inference_mode():
        logits_SV = server.engine.model(torch.tensor([tokens])).logits[0].float()
    wanted_SV = torch.log_softmax(logits_SV, -1)
    assert logprobs.token_logprobs[0] is None
    for place, value in enumerate(logprobs.token_logprobs[1 : len(tokens)], start=1):
        assert value == pytest.approx(float(wanted_SV[place - 1, tokens[place]]), rel=1e-3, abs=1e-4)
    assert logprobs.top_logprobs is not None
    assert all(
        value in found.values() and 3 <= len(found) <= 4
        for value, found in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True)
    )
    assert found.choices[0].text.startswith(server.service.tokenizer.decode(prompt))


def test_nothing_is_generated_where_the_prompt_alone_is_asked_for(server: Server) -> None:
    found = server.client().completions.create(
        prompt=[1, 50, 51], max_tokens=0, echo=True, logprobs=1, **GREEDY
    )
    assert found.usage is not None
    assert found.usage.completion_tokens == 0
    assert found.choices[0].text == server.service.tokenizer.decode([1, 50, 51])
    assert found.choices[0].logprobs is not None
    assert len(found.choices[0].logprobs.tokens or ()) == 3


def test_a_chats_logprobs_are_those_of_its_tokens(server: Server) -> None:
    found = server.client().chat.completions.create(
        messages=[{"role": "user", "content": "x"}], max_tokens=4, logprobs=True, top_logprobs=2, **GREEDY
    )
    content = found.choices[0].logprobs and found.choices[0].logprobs.content
    assert content
    assert all(len(one.top_logprobs) == 2 and one.logprob == one.top_logprobs[0].logprob for one in content)
    joined = b"".join(bytes(one.bytes or ()) for one in content).decode(errors="replace")
    assert joined.startswith(found.choices[0].message.content or "")


def test_best_of_keeps_the_likeliest(server: Server, right: Engine) -> None:
    asked = {"model": NAME, "prompt": [1, 60], "max_tokens": 8, "seed": 3, "temperature": 1.5, "logprobs": 0}
    drawn = server.client().completions.create(n=4, **asked).choices
    kept = server.client().completions.create(n=2, best_of=4, **asked).choices

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    wanted = sorted(drawn, key=mean, reverse=True)[:2]
    assert [choice.text for choice in kept] == [choice.text for choice in wanted]


def test_penalties_and_biases_move_the_answer(server: Server) -> None:
    client = server.client()
    asked = {**GREEDY, "prompt": [1, 70], "max_tokens": 6, "logprobs": 0, "extra_body": {"ignore_eos": True}}

    def tokens(**more: Any) -> list[str]:
        found = client.completions.create(**asked, **more).choices[0].logprobs
        assert found is not None
        return list(found.tokens or ())

    assert tokens(logit_bias={"65": 100}) == [server.service.tokenizer.decode([65])] * 6
    forced = tokens(logit_bias={"65": 100, "66": 99.5}, presence_penalty=2)
    assert set(forced) == {server.service.tokenizer.decode([65]), server.service.tokenizer.decode([66])}


def test_a_beginning_that_was_read_is_not_read_again(server: Server) -> None:
    prompt = [1] + [80 + i % 100 for i in range(1200)]
    counts = []
    for _ in range(2):
        found = server.client().completions.create(prompt=prompt, max_tokens=1, **GREEDY)
        assert found.usage is not None
        assert found.usage.prompt_tokens_details is not None
        counts.append(found.usage.prompt_tokens_details.cached_tokens)
    assert counts == [0, 1024]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_of_length_one_and_the_same_in_every_form(pooling: str, server: Server) -> None:
    inputs = ["a", "a longer text " * 60, "ü"]
    client, extra = server.client(), {"pooling": pooling}
    floats = client.embeddings.create(model=NAME, input=inputs, encoding_format="float", extra_body=extra)
    coded = server.http().post(
        "/v1/embeddings", json={"input": inputs, "encoding_format": "base64", "pooling": pooling}
    )
    for one, other, text in zip(floats.data, coded.json()["data"], inputs, strict=True):
        data = base64.b64decode(other["embedding"])
        assert list(struct.unpack(f"<{len(data) // 4}f", data)) == pytest.approx(one.embedding, abs=0)
        ids = list(server.service.encoded(text, True))
        model = server.engine.model
        with torch.inference_mode():
            states_SD = model.hidden(Inputs(torch.tensor([ids]))).final_BSD[0]
        wanted_D = states_SD[-1] if pooling == "last" else states_SD.mean(0)
        wanted_D = wanted_D / wanted_D.norm()
        assert (torch.tensor(one.embedding) - wanted_D).norm() < 1e-3
    assert floats.usage.prompt_tokens == coded.json()["usage"]["prompt_tokens"]


def test_tokens_go_there_and_back(server: Server) -> None:
    http = server.http()
    found = http.post("/tokenize", json={"prompt": "héllo", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    ids = server.service.tokenizer.encode("héllo")
    assert found["tokens"][-len(ids) :] == ids
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "héllo"}
    assert found["max_model_len"] == 2048


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_says_which_experts_computed_it(stream: bool, server: Server, right: Engine) -> None:
    """Those of a pass over the whole text, and a row for each token but the last."""
    prompt = [1, 70, 71, 72] * 140
    asked: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
    }
    body = asked | {"return_routed_experts": True, "stream": stream}
    answer = server.http().post("/v1/completions", json=body)
    choices = (
        [answer.json()["choices"][0]]
        if not stream
        else [
            json.loads(line[6:])["choices"][0]
            for line in answer.text.splitlines()
            if line.startswith("data: {")
        ]
    )
    before, weights = choices[0]["prompt_routed_experts"], choices[0]["prompt_routed_weights"]
    after = [token for choice in choices for token in choice["routed_experts"]]
    after_weights = [token for choice in choices for token in choice["routed_weights"]]
    tokens = prompt + [piece.token for piece in right.generate([prompt], max_tokens=5, stop_ids=())]
    model = right.model
    assert choices[0]["routed_layers"] == [1, 2]
    with torch.inference_mode():
        found = model(torch.tensor([tokens[:-1]]), options=Options(routings=True)).routings
    wanted = torch.stack([found[layer].experts_TK for layer in (1, 2)], 1)
    wanted_weights = torch.stack([found[layer].weights_TK for layer in (1, 2)], 1)
    assert [before, after] == [wanted[: len(prompt)].tolist(), wanted[len(prompt) :].tolist()]
    assert (torch.tensor(weights + after_weights) - wanted_weights).abs().max() < 1e-3
