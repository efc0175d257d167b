"""Renders chat templates, in a confined process that cannot outgrow its limits.

Jinja's sandbox stops code, not work: ``range`` inside ``range`` runs for hours and ``'a' * 10**9`` needs its
gigabyte (vLLM GHSA-6fvq-23cw-5628). A thread cannot be stopped; a process can.

The environment is that of transformers' chat templates, so that a template means here what it means there.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
from collections.abc import Iterator
from typing import Any, Final, NoReturn, final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS: Final = 2.0
"""Of one processor."""
MEMORY: Final = 512 * 2**20
LONGEST: Final = 8 * 2**20
"""Characters of a rendered conversation."""


@final
class Generation(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training on it; rendered, it is its content."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType] - jinja only asks what is in it

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def environment() -> jinja2.Environment:
    """The names and rules that the templates of published models rely on."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = _now
    return made


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates give it by name
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON as it stands: jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return dt.datetime.now().strftime(form)  # noqa: DTZ005 - the user's own day


def render(template: str, context: dict[str, Any]) -> str:
    """Raises what jinja raises, MemoryError, or OverflowError for a text beyond all use."""
    return "".join(_bounded(_compiled(template).generate(**context)))


@functools.lru_cache(maxsize=2)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > LONGEST:
            raise OverflowError(f"it wrote more than {LONGEST:,} characters")
        yield piece


@final
class _Work:
    """What runs in the confined process."""

    def answer(self, request: dict[str, Any]) -> str:
        """Raises RuntimeError with what a template does wrong."""
        try:
            return render(request["template"], request["context"])
        except MemoryError:
            raise RuntimeError(f"it needs more than {MEMORY // 2**20} MiB") from None
        except Exception as error:  # noqa: BLE001 - whatever a template does wrong is told in a sentence
            raise RuntimeError(f"{type(error).__name__}: {error}"[:300]) from None


def start() -> _Work:
    return _Work()
