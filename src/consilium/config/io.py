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
    """Return ``config`` with dotted keys replaced; values are read as YAML (``--set key.path=value``).

    Another ``kind`` is another member of its union: it begins at its own defaults, and its keys may be given
    beside it, in any order.
    """
    data = to_data(config)
    fresh: set[int] = set()
    for key in sorted(assignments, key=_kinds_first):
        _assign(data, key.split("."), _plain(assignments[key], where), fresh, f"{where}: unknown key {key!r}")
    return from_data(type(config), data, where=where)


def _kinds_first(key: str) -> tuple[bool, int]:
    """A kind decides which keys there are below and beside it; equal keys keep their order."""
    is_kind = key.rpartition(".")[2] == "kind"
    return not is_kind, key.count(".") if is_kind else 0


def _assign(node: Any, parts: list[str], value: object, fresh: set[int], unknown: str) -> None:
    """Put ``value`` below ``node``; what is in ``fresh`` takes any key, which the union member will check."""
    part, *below = parts
    known = _known(node)
    if part not in known and id(node) not in fresh:
        raise ConsiliumError(f"{unknown}.{nearest(part, known)}")
    key = known.get(part, part)
    if below:
        if part not in known or node[key] is None:
            node[key] = {}
            fresh.add(id(node[key]))
        _assign(node[key], below, value, fresh, unknown)
    elif key == "kind" and value != node.get(key):
        node.clear()
        node[key] = value
        fresh.add(id(node))
    else:
        node[key] = value


def _known(node: object) -> dict[str, Any]:
    """What may stand in a dotted key below ``node``: keys of a dict, places of a list."""
    if isinstance(node, list):
        return {str(i): i for i in range(len(cast("list[object]", node)))}
    return {str(key): key for key in cast("dict[object, object]", node)} if isinstance(node, dict) else {}


def _plain(value: str, where: str) -> Any:
    if value.startswith(("*", "!")):  # an alias or a tag to YAML, a pattern to whoever writes it here
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConsiliumError(f"{where}: the value {value!r} is not valid YAML; quote it.") from None
