"""Configurations to and from plain data, JSON and YAML; every mistake becomes one sentence."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from consilium.errors import ConsiliumError, nearest

C = TypeVar("C")


@functools.cache
def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def to_data(config: object) -> Any:
    """Return ``config`` as JSON-compatible dicts, lists, numbers and strings."""
    return _adapter(type(config)).dump_python(config, mode="json")


def to_json(config: object, *, indent: int | None = 2) -> str:
    return _adapter(type(config)).dump_json(config, indent=indent).decode()


def to_yaml(config: object) -> str:
    return yaml.safe_dump(to_data(config), sort_keys=False, allow_unicode=True)


def from_data(cls: type[C], data: object, *, where: str = "") -> C:
    """Build ``cls`` from plain data.

    Raises ConsiliumError naming ``where``, the key and the nearest known key.
    """
    try:
        return _adapter(cls).validate_python(data)
    except ValidationError as error:
        raise ConsiliumError(_sentence(cls, error, where)) from None


def from_json(cls: type[C], text: str, *, where: str = "") -> C:
    try:
        return _adapter(cls).validate_json(text)
    except ValidationError as error:
        raise ConsiliumError(_sentence(cls, error, where)) from None


def from_yaml(cls: type[C], text: str, *, where: str = "") -> C:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConsiliumError(
            f"{where or 'configuration'} is not valid YAML: {error}".replace("\n", " ")
        ) from None
    return from_data(cls, data, where=where)


def read_yaml(cls: type[C], path: Path) -> C:
    try:
        return from_yaml(cls, path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(f"cannot read the configuration {path}: {error}; give a YAML file.") from None


def changed(config: C, *, where: str = "", **values: object) -> C:
    """``dataclasses.replace`` for top-level keys; mistakes are sentences, values may be configurations."""
    plain = {
        key: to_data(value) if dataclasses.is_dataclass(value) else value for key, value in values.items()
    }
    return from_data(type(config), to_data(config) | plain, where=where)


def replace(config: C, assignments: Mapping[str, str], *, where: str = "--set") -> C:
    """Return ``config`` with dotted keys replaced; values are read as YAML (``--set key.path=value``)."""
    data = to_data(config)
    for key, value in assignments.items():
        parts = key.split(".")
        node: Any = data
        for depth, part in enumerate(parts):
            known = _keys(node)
            if part not in known:
                wrong = ".".join(parts[: depth + 1])
                raise ConsiliumError(f"{where}: unknown key {wrong!r}.{nearest(part, known)}")
            if depth < len(parts) - 1:
                node = node[part]
        node[parts[-1]] = _plain(value, where)
    return from_data(type(config), data, where=where)


def _keys(node: object) -> list[str]:
    return [str(key) for key in cast("dict[object, object]", node)] if isinstance(node, dict) else []


def _plain(value: str, where: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConsiliumError(f"{where}: the value {value!r} is not valid YAML; quote it.") from None


def _sentence(cls: type[Any], error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    path = [str(part) for part in first["loc"]]
    prefix = f"{where}: " if where else ""
    match first["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"{prefix}unknown key {'.'.join(path)}.{nearest(path[-1], _fields_at(cls, path[:-1]))}"
        case "value_error":
            return f"{prefix}{context['error']}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{prefix}key {'.'.join(path)} is missing; add it."
        case "union_tag_invalid":
            known = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
            tag = str(context["tag"])
            return f"{prefix}unknown kind {tag!r} for {'.'.join(path)}.{nearest(tag, known)}"
        case _:
            name = ".".join(path) or "value"
            return (
                f"{prefix}{name} = {str(first['input'])[:60]!r}: {first['msg'][0].lower()}{first['msg'][1:]}."
            )


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
        nodes = below or [n for n in nodes if getattr(n, "kind", part) == part]
    return [field.name for node in nodes for field in dataclasses.fields(node)]


def _classes(hint: object) -> Iterator[Any]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    elif typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list, typing.Annotated):
        for inner in typing.get_args(hint):
            yield from _classes(inner)
