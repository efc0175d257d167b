"""Bodies of requests: JSON that anybody sent, read without trusting any of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from consilium.errors import nearest
from consilium.serving.limits import DEPTH

M = TypeVar("M", bound=BaseModel)

_TEXT: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
"""A text, or one without an end: there is one way to match, and it goes forward only."""
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_SAID: Final = 80
"""Characters of what is quoted."""


class Refused(Exception):
    """A request that gets an error of HTTP instead of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


class Full(Exception):
    """More sequences wait than may."""


class Failed(Exception):
    """A request that the model, or the server, could not finish."""


def parsed(body: bytes, kind: type[M]) -> M:
    """The request in ``body``. Raises Refused (400) naming the field that is wrong."""
    value = _json(body)
    if not isinstance(value, dict):
        raise Refused(400, "the body is no JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refused(error, kind) from None


def _json(body: bytes) -> Any:
    _check_depth(body)
    try:
        value = json.loads(
            body, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_object
        )
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused(400, "the body has half of a surrogate pair in a text") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are such
        raise Refused(400, f"the body is no JSON: {str(error)[:_SAID]}") from None
    return value


def _check_depth(body: bytes) -> None:
    """Before a parser recurses into them: innermost pairs of brackets are taken away, layer by layer."""
    brackets = _TEXT.sub(b"", body).translate(None, _NO_BRACKETS)
    for _ in range(DEPTH):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    unclosed = len(brackets) <= DEPTH and not (set(b"[{") & set(brackets) and set(b"]}") & set(brackets))
    if brackets and not unclosed:  # what is unclosed is for the parser to tell
        raise Refused(400, f"the body has more than {DEPTH} lists and objects in one another, or is no JSON")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_SAID]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice in an object")
    return found


def _refused(error: ValidationError, kind: type[BaseModel]) -> Refused:
    """The first fault in one sentence, with the nearest known name for an unknown one."""
    fault = _telling(error.errors(include_url=False))
    place = ".".join(str(part) for part in fault["loc"] if _is_place(part))[:_SAID] or "body"
    if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1:
        return Refused(400, f"unknown field {place!r}.{nearest(place, kind.model_fields)}", param=place)
    if fault["type"] == "value_error":
        return Refused(400, fault["msg"].removeprefix("Value error, "), param=place)
    return Refused(400, f"{place}: {fault['msg']}", param=place)


def _telling(faults: Sequence[ErrorDetails]) -> ErrorDetails:
    """The first one; where a value may be of several types, what is wrong with it as the type that it has."""
    first = faults[0]
    if not first["type"].endswith("_type") or len(first["loc"]) < 2:
        return first
    place = first["loc"][:-1]
    beside = (fault for fault in faults if fault["loc"][: len(place)] == place)
    return next((fault for fault in beside if not fault["type"].endswith("_type")), first)


def _is_place(part: int | str) -> bool:
    """Whether it is a field or a number in a list, and not which of several types was tried."""
    return isinstance(part, int) or (part.isidentifier() and part != "str")
