"""What each request of the API asks of the engine, and what of its pieces is sent back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from consilium.data.tokenizer import Tokenizer
from consilium.engine.chat import Format
from consilium.engine.engine import Engine
from consilium.engine.request import Piece, Pooling, Request
from consilium.serving import limits
from consilium.serving.answers import (
    Answer,
    Heading,
    Spelling,
    chat_logprobs,
    completion_logprobs,
    prompt_told,
    routed,
    told,
    usage,
)
from consilium.serving.asked import sampling_of, steering_of
from consilium.serving.body import Refused
from consilium.serving.grammar import Grammars, form_of
from consilium.serving.limits import Settings
from consilium.serving.metrics import Metrics
from consilium.serving.protocol import ChatRequest, CompletionRequest, Generating, Tool
from consilium.serving.thinking import AfterThought, opened, thinks
from consilium.serving.tools import Reader, Reading, conversation, schema_of, told_in_text, way_of
from consilium.serving.worker import Worker

Object = dict[str, Any]


@final
@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Service:
    """One model and how it is asked. All of it may be called from the event loop."""

    engine: Engine
    worker: Worker
    tokenizer: Tokenizer
    form: Format
    settings: Settings
    metrics: Metrics
    grammars: Grammars
    spelling: Spelling

    @property
    def length(self) -> int:
        return self.engine.length

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            raise Refused(
                404,
                f"the model {name[:80]!r} is not served here, only {self.settings.name!r}",
                param="model",
                code="model_not_found",
            )

    async def prompts(self, given: object, *, special: bool) -> list[tuple[int, ...]]:
        """Tokens of each prompt: texts are encoded off the event loop."""
        match given:
            case str() as text:
                return [await asyncio.to_thread(self.encoded, text, special)]
            case [int(), *_] as ids:
                return [tuple(ids)]
            case [str(), *_] as texts:
                return [await asyncio.to_thread(self.encoded, text, special) for text in texts]
            case list() as several:
                return [tuple(ids) for ids in several]
            case _:
                raise Refused(400, "prompt is neither text nor tokens", param="prompt")

    def encoded(self, text: str, special: bool) -> tuple[int, ...]:  # noqa: FBT001 - by asyncio.to_thread
        opening = self.tokenizer.opening_id if special else None
        return (*(() if opening is None else (opening,)), *self.tokenizer.encode(text))

    def room(self, prompt: Sequence[int], asked: int | None, default: int | None) -> int:
        """New tokens of an answer: those asked for, else ``default``, and no more than the context has."""
        left = max(self.length - len(prompt), 1)
        return asked if asked is not None else left if default is None else min(default, left)

    async def request(
        self,
        asked: Generating,
        prompt: tuple[int, ...],
        most: int,
        ends: Sequence[int],
        schema: Object | None = None,
    ) -> Request:
        """Raises Refused, and ConsiliumError for what the engine does not take."""
        form = form_of(asked, schema)
        request = Request(
            prompt=prompt,
            max_tokens=max(most, 1),
            sampling=sampling_of(asked, self.engine.model.generation),
            stop=asked.stops,
            stop_ids=tuple({*(() if asked.ignore_eos else ends), *(asked.stop_token_ids or ())}),
            constraint=None if form is None else await self.grammars.constraint(form),
            routes=asked.return_routed_experts,
            steering=steering_of(asked, self.engine.model.config),
        )
        self.engine.check(request)
        return request


@final
@dataclass(frozen=True, slots=True)
class Job:
    """Sequences to generate for one request, ``each`` of every prompt, of which ``kept`` are sent back."""

    heading: Heading
    requests: Sequence[Request]
    prompts: int
    kept: int
    choice: Callable[[int, Answer, int], Object]
    """The choice of an index, from the piece of a number on."""
    silent: bool = False
    """Whether the prompt alone was asked for: a token is made, and not told."""
    each: bool = False
    """Whether a stream tells of every token, also where its text is not whole yet."""
    opening: Callable[[int], Object] | None = None
    """What a stream begins each choice with."""
    told: Object = field(default_factory=dict)
    """What the answer says beside its choices, a stream in its first objects."""

    @property
    def answers(self) -> list[Answer]:
        return [Answer(request.prompt) for request in self.requests if not isinstance(request.prompt, str)]

    def usage(self, answers: Sequence[Answer]) -> Object:
        return usage(answers, self.prompts, silent=self.silent)


@final
class Current:
    """The service of requests that come from now on, and the one place where that changes."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._before = weakref.WeakSet[Worker]()

    def change(self, service: Service) -> None:
        """Let ``service`` take over. The one before ends when the last of its requests lets go of it."""
        weakref.finalize(self.service, self.service.worker.leave)
        self._before.add(self.service.worker)
        service.worker.start()
        self.service = service

    def abandon(self) -> None:
        """Tell all who still wait that no more comes."""
        for worker in (self.service.worker, *self._before):
            worker.abandon()

    def stop(self) -> None:
        """Forget all requests and wait for the steps that run."""
        for worker in (self.service.worker, *self._before):
            worker.stop()


async def completion(service: Service, asked: CompletionRequest, salt: bytes) -> Job:
    """Raises Refused and ConsiliumError for what cannot be."""
    service.check_model(asked.model)
    samples = asked.n or 1
    drawn = max(asked.best_of or samples, samples)
    if asked.stream and drawn > samples:
        raise Refused(400, "best_of chooses once all are there, and cannot be streamed", param="best_of")
    requests: list[Request] = []
    for prompt in await service.prompts(asked.prompt, special=asked.add_special_tokens):
        most = service.room(prompt, asked.max_tokens, limits.COMPLETION_TOKENS)
        one = replace(
            await service.request(asked, prompt, most, service.engine.stop_ids),
            top=asked.logprobs or 0,
            scores_prompt=bool(asked.echo) and asked.logprobs is not None,
            salt=salt,
        )
        requests += [replace(one, sample=sample) for sample in range(drawn)]

    decoded = functools.cache(service.tokenizer.decode)

    def choice(index: int, answer: Answer, first: int) -> Object:
        before = decoded(tuple(answer.prompt)) if asked.echo else ""
        return _completion_choice(service, asked, before, index, answer, first)

    heading = Heading("text_completion", service.settings.name)
    silent = asked.max_tokens == 0
    each = asked.logprobs is not None
    return Job(heading, requests, len(requests) // drawn, samples, choice, silent=silent, each=each)


def _completion_choice(
    service: Service, asked: CompletionRequest, before: str, index: int, answer: Answer, first: int
) -> Object:
    """What the pieces from ``first`` on add, or all of an answer; ``before`` is the prompt that is echoed."""
    pieces = answer.pieces[first:] if asked.max_tokens != 0 else []
    begins = bool(asked.echo) and first == 0
    text = "".join(piece.text for piece in pieces)
    logprobs = None
    if asked.logprobs is not None:
        scored = list(answer.pieces[0].prompt) if begins else []
        offset = 0 if begins else len(before) + sum(len(piece.text) for piece in answer.pieces[:first])
        logprobs = completion_logprobs(told([*scored, *pieces]), service.spelling, offset)
    return {
        "index": index,
        "text": (before if begins else "") + text,
        "logprobs": logprobs,
        "finish_reason": "length" if asked.max_tokens == 0 else answer.finish,
        **(prompt_told(answer.prompt, service.spelling) if asked.return_token_ids and not first else {}),
        **_token_ids(asked, pieces),
        **_routed(asked, answer, first),
    }


def _token_ids(asked: Generating, pieces: Sequence[Piece]) -> Object:
    return {"token_ids": [piece.token for piece in pieces]} if asked.return_token_ids else {}


def _routed(asked: Generating, answer: Answer, first: int) -> Object:
    return routed(answer.pieces[first:], begins=first == 0) if asked.return_routed_experts else {}


async def chat(service: Service, asked: ChatRequest, salt: bytes) -> Job:
    """Raises Refused and ConsiliumError for what cannot be."""
    service.check_model(asked.model)
    if asked.top_logprobs and not asked.logprobs:
        raise Refused(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    tools = [] if asked.tool_choice == "none" else asked.tools or []
    schema = schema_of(asked)
    prompt = await asyncio.to_thread(_asked_ids, service.form, asked, tools)
    asked_for = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    most = service.room(prompt, asked_for, None)
    ends = (*service.engine.stop_ids, *service.form.stop_ids)
    think, inside = thinks(service.form.source), opened(prompt, service.spelling)
    one = await service.request(asked, prompt, most, ends, schema)
    if think and one.constraint is not None:
        size = service.engine.model.config.vocab_size
        one = replace(one, constraint=AfterThought(one.constraint, inside, service.spelling, size))
    one = replace(one, top=asked.top_logprobs or 0, stop=(*one.stop, *service.form.stops), salt=salt)
    requests = [replace(one, sample=sample) for sample in range(asked.n or 1)]

    reading = Reading(
        way="json" if schema is not None else way_of(service.form.source) if tools else None,
        spelling=service.spelling,
        key=secrets.token_hex(8),
        thinks=think,
        required=schema is not None,
        inside=inside,
    )

    readers = [Reader(reading, index) for index in range(len(requests))]

    def choice(index: int, answer: Answer, first: int) -> Object:
        return _chat_choice(service, asked, readers[index], index, answer, first)

    heading = Heading("chat.completion", service.settings.name)
    each, said = bool(asked.logprobs), prompt_told(prompt, service.spelling) if asked.return_token_ids else {}
    return Job(heading, requests, 1, len(requests), choice, opening=_opening, each=each, told=said)


def _asked_ids(form: Format, asked: ChatRequest, tools: Sequence[Tool]) -> tuple[int, ...]:
    """Tokens of a conversation. Raises Refused and ConsiliumError for what the template does not take."""
    messages = conversation(asked.messages)
    switches = {} if asked.chat_template_kwargs is None else asked.chat_template_kwargs.given
    if "tools" in form.source:
        return tuple(form.ids(messages, [tool.model_dump(exclude_none=True) for tool in tools], switches))
    return tuple(form.ids(told_in_text(messages, tools), (), switches))


def _chat_choice(
    service: Service, asked: ChatRequest, reader: Reader, index: int, answer: Answer, first: int
) -> Object:
    """What the pieces from ``first`` on add, or all of an answer."""
    said, calls = reader.added(answer)
    logprobs = None
    if asked.logprobs:
        logprobs = chat_logprobs(told(answer.pieces[first:]), service.spelling)
    message: Object = {"content": said.content}
    if calls:
        message = {"content": said.content or None, "tool_calls": calls}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if not asked.stream:
        message |= {"role": "assistant", "refusal": None}
    return {
        "index": index,
        "delta" if asked.stream else "message": message,
        "logprobs": logprobs,
        "finish_reason": reader.finish(answer),
        **_token_ids(asked, answer.pieces[first:]),
        **_routed(asked, answer, first),
    }


def _opening(index: int) -> Object:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


async def whole(service: Service, job: Job) -> Object:
    """The answer to a request that is not streamed."""
    answers = job.answers
    async for place, piece in _counted(service, job.requests):
        answers[place].pieces.append(piece)
    kept = [answer for group in _groups(answers, job.prompts) for answer in _best(group, job.kept)]
    choices = [job.choice(index, answer, 0) for index, answer in enumerate(kept)]
    return job.heading.object(choices) | job.told | {"usage": job.usage(answers)}


def _groups(answers: Sequence[Answer], prompts: int) -> list[Sequence[Answer]]:
    each = len(answers) // prompts
    return [answers[first : first + each] for first in range(0, len(answers), each)]


def _best(answers: Sequence[Answer], count: int) -> Sequence[Answer]:
    return sorted(answers, key=lambda a: -a.likelihood)[:count] if count < len(answers) else answers


async def streamed(service: Service, job: Job, *, with_usage: bool) -> AsyncGenerator[Object, None]:
    """Objects of a stream. A piece without text waits for the next that has some, unless each is wanted."""
    answers, sent = job.answers, [0] * len(job.requests)
    usage_field = {"usage": None} if with_usage else {}
    if job.opening is not None:
        for index in range(len(answers)):
            yield job.heading.object([job.opening(index)], streamed=True) | job.told | usage_field
    async for place, piece in _counted(service, job.requests):
        answer = answers[place]
        answer.pieces.append(piece)
        if job.each or piece.text or piece.finished is not None:
            choice = job.choice(place, answer, sent[place])
            sent[place] = len(answer.pieces)
            yield job.heading.object([choice], streamed=True) | usage_field
    if with_usage:
        yield job.heading.object([], streamed=True) | {"usage": job.usage(answers)}


async def embeddings(
    service: Service, prompts: Sequence[tuple[int, ...]], pooling: Pooling, salt: bytes
) -> list[list[float]]:
    """A vector of length 1 for each prompt, of the states behind the last norm."""
    requests = [
        Request(prompt=prompt, max_tokens=0, pools=pooling, salt=salt, stop_ids=()) for prompt in prompts
    ]
    for index, request in enumerate(requests):
        service.engine.check(request, f"input {index}")
    found: list[list[float]] = [[] for _ in requests]
    async for place, piece in _counted(service, requests):
        found[place] = list(piece.state)
    return found


async def _counted(service: Service, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces, measured on their way."""
    began = time.monotonic()
    last: list[float | None] = [None] * len(requests)
    pieces = service.worker.pieces(requests, service.settings.seconds)
    async with contextlib.aclosing(pieces):
        async for place, piece in pieces:
            now, before = time.monotonic(), last[place]
            prompt = len(requests[place].prompt) if before is None else None
            service.metrics.count(piece, prompt, now - (began if before is None else before))
            last[place] = now
            if piece.finished is not None:
                service.metrics.whole.observe(now - began)
            yield place, piece


async def metrics_text(service: Service) -> bytes:
    """What /metrics tells, as of the step that ends next."""
    loads = await service.worker.ask(lambda: service.engine.loads)
    service.metrics.running.set(service.engine.running)
    service.metrics.waiting.set(service.engine.waiting)
    service.metrics.usage.set(service.engine.cache_use)
    return service.metrics.text(loads, service.engine.guesses)
