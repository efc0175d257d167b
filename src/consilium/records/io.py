"""Records to and from JSON. Numbers that are not finite are written as null and read back as NaN."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

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


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` whole or not at all: temporary file, fsync, rename.

    Raises ConsiliumError naming the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConsiliumError(
            f"cannot write {path}: {error.strerror or error}; free space or give another folder."
        ) from None


def write_json(path: Path, record: object) -> None:
    write_text(path, to_json(record) + "\n")


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
