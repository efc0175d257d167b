"""What every configuration class shares: frozen, keyword-only, strict, and mistakes told in one sentence."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from consilium.errors import ConsiliumError, nearest

C = TypeVar("C")

_SAID = 60
"""Characters of what is quoted."""
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Size = Annotated[int, Field(gt=0, lt=2**48)]
"""A number of things, small enough that products of a few and their square roots are ordinary numbers."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def configuration(cls: type[C]) -> type[C]:
    """Make ``cls`` a frozen, keyword-only, checked dataclass whose constructor raises ConsiliumError.

    Pydantic wraps what a constructor raises in an error of its own, ``__post_init__`` included.
    """
    checked: Any = dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
    construct = checked.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            construct(self, *args, **values)
        except ValidationError as error:
            raise ConsiliumError(sentence(checked, error)) from None

    checked.__init__ = __init__
    return checked


def sentence(cls: type[Any], error: ValidationError, where: str = "") -> str:
    """Tell the first mistake of ``error``, made in ``cls`` and read from ``where`` (a file or an option)."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    path = [str(part)[:_SAID] for part in first["loc"]]
    prefix = f"{where or cls.__name__}: "
    match first["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"{prefix}unknown key {'.'.join(path)}.{nearest(path[-1], _fields_at(cls, path[:-1]))}"
        case "value_error":
            # Its sentence names its own place in the configuration, which may be where it was read.
            said = str(context["error"])
            return said if not where or said.startswith(prefix) else f"{prefix}{said}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{prefix}key {'.'.join(path)} is missing; add it."
        case "union_tag_invalid":
            known = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
            tag = str(context["tag"])[:_SAID]
            return f"{prefix}unknown kind {tag!r} for {'.'.join(path)}.{nearest(tag, known)}"
        case "model_attributes_type" | "dataclass_type":
            keys = ", ".join(sorted(set(_fields_at(cls, path))))
            return f"{prefix}{'.'.join(path) or 'it'} has keys of its own: {keys}; set those."
        case "union_tag_not_found":
            name = ".".join(path)
            return f"{prefix}{name} has no kind; add {name}.kind."
        case _:
            # Pydantic names what was tried of a union too, as ``constrained-int``.
            name = ".".join(part for part in path if part.isidentifier() or part.isdigit()) or "value"
            given, why = str(first["input"])[:_SAID], f"{first['msg'][0].lower()}{first['msg'][1:]}"
            return f"{prefix}{name} = {given!r}: {why}."


def _fields_at(cls: object, path: list[str]) -> list[str]:
    """Fields of the dataclasses reached from ``cls`` by ``path``; parts may be union tags or indices."""
    nodes = list(_classes(cls))
    for part in path:
        below = [
            found
            for node in nodes
            for name, hint in typing.get_type_hints(node).items()
            if name == part
            for found in _classes(hint)
        ]
        nodes = below or [n for n in nodes if _kind(n) in {part, None}]
    return [field.name for node in nodes for field in dataclasses.fields(node)]


def _kind(cls: type[Any]) -> object:
    """The tag of a member of a union, None for other classes."""
    return {field.name: field.default for field in dataclasses.fields(cls)}.get("kind")


def _classes(hint: object) -> Iterator[type[Any]]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    elif typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list, typing.Annotated):
        for inner in typing.get_args(hint):
            yield from _classes(inner)
