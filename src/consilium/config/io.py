"""Configurations to and from plain data, JSON and YAML; every mistake becomes one sentence."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from consilium.config.base import sentence
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
        raise ConsiliumError(sentence(cls, error, where)) from None


def from_json(cls: type[C], text: str, *, where: str = "") -> C:
    try:
        return _adapter(cls).validate_json(text)
    except ValidationError as error:
        raise ConsiliumError(sentence(cls, error, where)) from None


def from_yaml(cls: type[C], text: str, *, where: str = "") -> C:
    try:
        data = yaml.safe_load(text)
    except RecursionError:
        raise ConsiliumError(f"{where or 'configuration'} is nested too deeply; restore the file.") from None
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
