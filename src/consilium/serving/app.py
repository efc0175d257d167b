"""The routes of the server, and how their answers leave it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar, final

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from consilium.serving import service as asking
from consilium.serving.body import Refused, parsed
from consilium.serving.gate import SALT, error_object
from consilium.serving.limits import COMMENT_SECONDS
from consilium.serving.pages import Served, Shown, add_page
from consilium.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Generating,
    TokenizeRequest,
)
from consilium.serving.refusals import json_answer, refusal, tell_errors
from consilium.serving.service import Current, Job, Object, Service

_DONE: Final = b"data: [DONE]\n\n"
_COMMENT: Final = b": still at work\n\n"
_BODIES: Final = (CompletionRequest, ChatRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest)
_T = TypeVar("_T")
_GONE: Final = 499
"""What nginx logs for a client that left; nobody reads it."""


def build_app(current: Current, ready: Callable[[], bool], started: Callable[[], None]) -> FastAPI:
    """The application without its gate. ``ready``: does it take requests? ``started`` hears of the start.

    A request is answered by the service that is current when it comes, to its end.
    """
    app = FastAPI(title="Consilium", docs_url=None, redoc_url=None, lifespan=_lifespan(current, started))
    tell_errors(app, _counting(current))
    _add_generating(app, current)
    _add_tokens(app, current)
    _add_state(app, current, ready)
    settings = current.service.settings
    add_page(app, Shown(model=lambda: _served(current), runs=settings.runs, place=settings.place))
    app.openapi = lambda: _described(app)
    return app


def _counting(current: Current) -> Callable[[int], None]:
    def count(status: int) -> None:
        current.service.metrics.count_refused(status)

    return count


def _served(current: Current) -> Served:
    return Served(current.service.settings.name, current.service.length)


def _lifespan(
    current: Current, started: Callable[[], None]
) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        del app
        current.service.worker.start()
        started()
        yield
        current.stop()

    return running


def _add_generating(app: FastAPI, current: Current) -> None:
    @app.post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        service = current.service
        service.worker.check_room(1)  # a refusal under load costs those who run nothing but this
        asked = await _parsed(request, CompletionRequest)
        return await _answered(
            request, service, asked, await asking.completion(service, asked, request.scope[SALT])
        )

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        service = current.service
        service.worker.check_room(1)
        asked = await _parsed(request, ChatRequest)
        return await _answered(
            request, service, asked, await asking.chat(service, asked, request.scope[SALT])
        )


def _add_tokens(app: FastAPI, current: Current) -> None:
    @app.post("/tokenize", openapi_extra=_body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        service, asked = current.service, await _parsed(request, TokenizeRequest)
        service.check_model(asked.model)
        (ids,) = await service.prompts(asked.prompt, special=asked.add_special_tokens)
        told: Object = {"count": len(ids), "max_model_len": service.length, "tokens": list(ids)}
        if asked.return_token_strs:
            told["token_strs"] = [service.spelling.text(token) for token in ids]
        return json_answer(told)

    @app.post("/detokenize", openapi_extra=_body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        service, asked = current.service, await _parsed(request, DetokenizeRequest)
        service.check_model(asked.model)
        most = service.tokenizer.vocab_size
        if any(token >= most for token in asked.tokens):
            raise Refused(400, f"tokens has an id beyond the {most} of the tokenizer", param="tokens")
        return json_answer({"prompt": service.tokenizer.decode(asked.tokens)})

    @app.post("/v1/embeddings", openapi_extra=_body_of(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        service = current.service
        service.worker.check_room(1)
        asked = await _parsed(request, EmbeddingRequest)
        service.check_model(asked.model)
        prompts = await service.prompts(asked.input, special=True)
        work = asking.embeddings(service, prompts, asked.pooling, request.scope[SALT])
        vectors = await _unless_gone(request.receive, work)
        data = [
            {"object": "embedding", "index": index, "embedding": _vector(vector, asked.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        tokens = sum(map(len, prompts))
        told = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_answer({"object": "list", "data": data, "model": service.settings.name, "usage": told})


def _vector(values: list[float], form: str | None) -> list[float] | str:
    if form != "base64":
        return values
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _add_state(app: FastAPI, current: Current, ready: Callable[[], bool]) -> None:
    created = int(time.time())

    def model() -> Object:
        return {
            "id": current.service.settings.name,
            "object": "model",
            "created": created,
            "owned_by": "consilium",
            "max_model_len": current.service.length,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return json_answer({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        current.service.check_model(name)
        return json_answer(model())

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if current.service.worker.is_alive else 503)

    @app.get("/ready")
    async def is_ready() -> Response:
        return Response(status_code=200 if current.service.worker.is_alive and ready() else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = await asking.metrics_text(current.service)
        return Response(text, media_type="text/plain; version=0.0.4")


def _schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    return kind.model_json_schema(ref_template=f"#/components/schemas/{kind.__name__}-{{model}}")


def _body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """What /openapi.json says of a body that we read ourselves."""
    schema = {name: value for name, value in _schema_of(kind).items() if name != "$defs"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _described(app: FastAPI) -> dict[str, Any]:
    """What /openapi.json says, with the parts that bodies refer to."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    parts = found.setdefault("components", {}).setdefault("schemas", {})
    for kind in _BODIES:
        parts |= {f"{kind.__name__}-{name}": part for name, part in _schema_of(kind).get("$defs", {}).items()}
    return found


_B = TypeVar("_B", bound=BaseModel)


async def _parsed(request: Request, kind: type[_B]) -> _B:
    return await asyncio.to_thread(parsed, await request.body(), kind)


async def _answered(request: Request, service: Service, asked: Generating, job: Job) -> Response:
    service.worker.check_room(len(job.requests))
    if not asked.stream:
        return json_answer(await _unless_gone(request.receive, asking.whole(service, job)))
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    chunks = asking.streamed(service, job, with_usage=with_usage)
    return EventStream(_events(chunks))


@final
class EventStream(StreamingResponse):
    """Ends when the client leaves, as Starlette's own does, but by one cancellation instead of many.

    Its own cancels again at each ``await``, and what a stream holds could not be given back in order.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(Refused):
            await _unless_gone(receive, self.stream_response(send))


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """What ``work`` returns, which is cancelled when the client leaves."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_leaves(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Refused(_GONE, "the client left")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _events(chunks: AsyncGenerator[Object, None]) -> AsyncGenerator[bytes, None]:
    """Server-sent events, with a comment where nothing else comes for a while."""
    coming: asyncio.Task[Object | None] | None = None
    try:
        while True:
            coming = coming or asyncio.create_task(_next(chunks))
            done, _ = await asyncio.wait({coming}, timeout=COMMENT_SECONDS)
            if not done:
                yield _COMMENT
                continue
            chunk, coming = coming.result(), None
            if chunk is None:
                break
            yield _event(chunk)
    except Exception as error:  # noqa: BLE001 - the headers are sent, so an error is an event
        yield _event(error_object(refusal(error)))
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await chunks.aclose()
    yield _DONE


async def _next(chunks: AsyncGenerator[Object, None]) -> Object | None:
    return await anext(chunks, None)


def _event(value: object) -> bytes:
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    return f"data: {text}\n\n".encode("utf-8", "replace")
