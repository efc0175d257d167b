"""The page: its files, the same for everybody, and what its tabs ask for beside the API of models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, final

from fastapi import FastAPI, Request, Response

from consilium.serving.body import parsed
from consilium.serving.gate import PAGE
from consilium.serving.planning import PlanRequest, planned, recipes
from consilium.serving.refusals import json_answer, tell_errors
from consilium.serving.watching import Runs

_PAGE: Final = Path(__file__).parent / "page"
_HEADERS: Final = (
    (
        "Content-Security-Policy",
        # Pictures of loads are small PNGs inside of SVG.
        (
            "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'none';"
            " base-uri 'none'"
        ),
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),
)


@final
@dataclass(frozen=True, slots=True)
class Served:
    """A model to talk to."""

    name: str
    length: int
    """Of its context."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a server has to show."""

    model: Callable[[], Served] | None = None
    """What is served now; None where there is nobody to talk to."""
    runs: Path | None = None
    """The folder of training runs, if any."""
    place: Path = Path()
    """Below which models are looked for."""


def page_app(shown: Shown) -> FastAPI:
    """An application of the page alone, without a model."""
    app = FastAPI(title="Consilium", docs_url=None, redoc_url=None)
    tell_errors(app, lambda status: None)
    add_page(app, shown)
    return app


def add_page(app: FastAPI, shown: Shown) -> None:
    """Files and routes of the page, which asks nobody but this server."""
    for path, (file, kind) in PAGE.items():
        content = (_PAGE / file).read_bytes()
        app.add_api_route(path, _always(content, kind), include_in_schema=False)
    _add_about(app, shown)
    _add_plan(app, shown)
    _add_runs(app, shown)


def _always(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, headers=dict(_HEADERS), media_type=kind)

    return answer


def _add_about(app: FastAPI, shown: Shown) -> None:
    @app.get("/page/about", include_in_schema=False)
    async def about() -> Response:
        model = None if shown.model is None else asdict(shown.model())
        return json_answer({"model": model, "recipes": await asyncio.to_thread(recipes)})


def _add_plan(app: FastAPI, shown: Shown) -> None:
    @app.post("/page/plan", include_in_schema=False)
    async def plan(request: Request) -> Response:
        asked = await asyncio.to_thread(parsed, await request.body(), PlanRequest)
        return json_answer(await asyncio.to_thread(planned, asked, shown.place))


def _add_runs(app: FastAPI, shown: Shown) -> None:
    watched = Runs(shown.runs)
    # One look at a time: it is work for a processor, and a model or a training beside has more to do.
    alone = asyncio.Lock()

    @app.get("/page/runs", include_in_schema=False)
    async def listing() -> Response:
        async with alone:
            found = await asyncio.to_thread(watched.listing)
        return json_answer({"folder": None if shown.runs is None else str(shown.runs), "runs": found})

    @app.get("/page/runs/{name:path}", include_in_schema=False)
    async def one_run(request: Request, name: str, beside: str | None = None) -> Response:
        async with alone:
            look = await asyncio.to_thread(watched.look, name, beside)
            headers = {"ETag": f'"{look.mark}"', "Cache-Control": "no-cache"}
            if request.headers.get("if-none-match") == headers["ETag"]:
                return Response(status_code=304, headers=headers)
            return json_answer(await asyncio.to_thread(look.pieces), headers=headers)
