"""Records to and from JSON. Numbers that are not finite are written as null and read back as NaN."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from consilium.disk.atomic import refuse_in_saved, write_file
from consilium.disk.files import DISK, Filesystem
from consilium.errors import ConsiliumError

STRICT = ConfigDict(extra="forbid")
"""What every record shares: unknown keys are refused."""

R = TypeVar("R")


def _nan_for_null(value: object) -> object:
    return math.nan if value is None else value


Measured = Annotated[float, BeforeValidator(_nan_for_null)]
"""A measured number. A run that diverged may hold NaN; JSON has no word for it but null."""


@functools.cache
def adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def to_json(record: object, *, indent: int | None = 2) -> str:
    return adapter(type(record)).dump_json(record, indent=indent).decode()


def from_json(cls: type[R], text: str | bytes, *, where: str) -> R:
    """Build ``cls`` from JSON. Raises ConsiliumError naming ``where`` and the first key that does not fit."""
    try:
        return adapter(cls).validate_json(text)
    except ValidationError as error:
        raise ConsiliumError(f"{where}: {_sentence(error)}; damaged, or of another version.") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return str(first.get("ctx", {})["error"])
    key = ".".join(str(part) for part in first["loc"]) or "content"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}"


def refuse_others(path: Path, what: str, ours: Callable[[str], object], option: str = "--out") -> None:
    """Raise ConsiliumError where ``path`` holds anything that ``ours`` denies: only our own is replaced.

    Likewise where it lies inside of a saved folder. ``option`` is what chose the path.
    """
    refuse_in_saved(path.resolve())
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else "\0"
        known = not text or ours(text)
    except ValueError:  # no UTF-8, or what ``ours`` raises
        known = False
    if not known:
        raise ConsiliumError(
            f"{path} is there and is no {what} of ours, so it stays; choose another {option}."
        )


def is_page(text: str) -> bool:
    """Whether ``text`` is a page that we wrote."""
    return '<meta name="generator" content="consilium">' in text


def write_text(path: Path, text: str, *, files: Filesystem = DISK) -> None:
    """Replace ``path`` whole or not at all. Raises ConsiliumError naming the path."""
    write_file(path, text.encode(), files=files)


def write_json(path: Path, record: object, *, files: Filesystem = DISK) -> None:
    write_text(path, to_json(record) + "\n", files=files)


def read_json(cls: type[R], path: Path) -> R:
    """Read one record. Raises ConsiliumError when the file is missing or damaged."""
    try:
        return from_json(cls, path.read_bytes(), where=str(path))
    except OSError as error:
        raise ConsiliumError(
            f"cannot read {path}: {error.strerror or error}; give the folder of a run."
        ) from None


def read_json_if_present(cls: type[R], path: Path) -> R | None:
    return read_json(cls, path) if path.exists() else None
