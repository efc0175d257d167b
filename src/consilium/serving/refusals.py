"""Errors as HTTP tells them, and JSON as all answers carry it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from consilium.errors import ConsiliumError
from consilium.serving.body import Failed, Full, Refused
from consilium.serving.gate import error_object

_LOG: Final = logging.getLogger("consilium.serving")


def refusal(error: Exception) -> Refused:
    """What HTTP says of an error of ours, or of one that nobody foresaw."""
    match error:
        case Refused():
            return error
        case Full():
            return Refused(429, "too many requests wait already; ask again in a while", code="overloaded")
        case Failed():
            return Refused(500, str(error), code="failed")
        case ConsiliumError():
            return Refused(400, str(error))
        case TimeoutError():
            return Refused(408, "the answer took longer than a request may take", code="timeout")
        case HTTPException(status_code=status, detail=detail):
            return Refused(status, str(detail))
        case _:
            _LOG.error("an error that nobody foresaw", exc_info=error)
            return Refused(500, "an error of ours; it is in the server's log")


def tell_errors(app: FastAPI, count: Callable[[int], None]) -> None:
    """Let every error leave ``app`` as JSON; ``count`` hears of each status."""

    async def handle(request: Request, error: Exception) -> Response:
        del request
        refused = refusal(error)
        count(refused.status)
        headers = {"Retry-After": "1"} if refused.status in {429, 503} else None
        return json_answer(error_object(refused), status=refused.status, headers=headers)

    for kind in (Refused, Full, Failed, ConsiliumError, TimeoutError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def json_answer(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    return Response(text.encode("utf-8", "replace"), status, headers, media_type="application/json")
