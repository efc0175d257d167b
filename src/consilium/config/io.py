"""Configurations to and from plain data, JSON and YAML; every mistake becomes one sentence."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from consilium.config.base import sentence
from consilium.errors import ConsiliumError, nearest

C = TypeVar("C")
_LARGEST: Final = 2**16
"""Characters: twenty times what the largest configuration of ours takes."""
_DEEPEST: Final = 64
_SAID: Final = 200
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""A tenth of the time, where the library was built with it."""


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
    return from_data(cls, _yaml(text, where or "configuration"), where=where)


def read_yaml(cls: type[C], path: Path | str) -> C:
    return from_yaml(cls, read_text(path), where=str(path))


def read_text(path: Path | str) -> str:
    """Return what is in ``path``, or enough to be refused. Raises ConsiliumError where it is no text."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(_LARGEST + 1)
    except UnicodeDecodeError:
        raise ConsiliumError(f"{path} is not UTF-8 text; give the YAML file of a configuration.") from None
    except OSError as error:
        why = (error.strerror or "error").lower()
        raise ConsiliumError(f"cannot read the configuration {path}: {why}; give a YAML file.") from None


def _yaml(text: str, where: str) -> Any:
    """Plain data out of YAML. Aliases are refused: a few of them make a small file of a huge one.

    Raises ConsiliumError naming ``where``.
    """
    if len(text) > _LARGEST:
        raise ConsiliumError(f"{where} is longer than {_LARGEST} characters; give a configuration.")
    try:
        events = cast("Iterable[yaml.Event]", yaml.parse(text, Loader=_LOADER))  # pyright: ignore[reportUnknownMemberType]
        fault = _fault(events)
        data = None if fault else yaml.safe_load(text)
    # The YAML library lets what Python says of a bad number or date through as it is.
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        fault, data = f"is not valid YAML: {' '.join(str(error).split())[:_SAID]}; restore the file", None
    if fault:
        raise ConsiliumError(f"{where} {fault}.")
    return data


def _fault(events: Iterable[yaml.Event]) -> str | None:
    depth = 0
    for event in events:
        match event:
            case yaml.AliasEvent() | yaml.NodeEvent(anchor=str()):
                return "has an anchor or an alias (& or *); write the values out"
            case yaml.CollectionStartEvent():
                depth += 1
            case yaml.CollectionEndEvent():
                depth -= 1
            case _:
                pass
        if depth > _DEEPEST:
            return "is nested too deeply; restore the file"
    return None


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
        return _yaml(value, value)
    except ConsiliumError:
        raise ConsiliumError(f"{where}: the value {value[:_SAID]!r} is not plain YAML; quote it.") from None
