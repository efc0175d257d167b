"""``consilium --completion SHELL``: what the shell needs to complete verbs, options and paths."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, get_args

from consilium.cli.arguments import Parser, path
from consilium.config.upcycling import Method
from consilium.errors import ConsiliumError, nearest
from consilium.recipes import balances

_PATHS: Final = frozenset({"DIR", "FOLDER", "MODEL", "PATH", "RUN"})
"""Metavariables of what may be a path, and may be a name."""
_NAMES: Final[Mapping[str, Sequence[str]]] = {
    "balance": tuple(balances.TEXTS),
    "method": [member.kind for member in get_args(get_args(Method)[0])],
}
"""What options take that are checked later than by the parser."""


def completion(shell: str, parsers: Mapping[str, Parser], helps: Mapping[str, str]) -> str:
    """The script for ``shell``. Raises ConsiliumError for another shell, or without the package shtab."""
    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError:
        raise ConsiliumError(
            "--completion needs the package shtab: pip install 'consilium-moe[completion]'."
        ) from None
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ConsiliumError(
            f"no completion for the shell {shell!r}.{nearest(shell, shtab.SUPPORTED_SHELLS)}"
        )
    root = argparse.ArgumentParser(prog="consilium")
    root.add_argument("--version", action="store_true", help="the version")
    verbs = root.add_subparsers()
    for name, parser in parsers.items():
        _complete_values(parser.actions(), shtab.FILE)
        verbs.add_parser(name, help=helps[name], parents=[parser], add_help=False)
    script: str = shtab.complete(root, shell)
    return script


def _complete_values(actions: Iterable[argparse.Action], files: Any) -> None:
    for action in actions:
        if action.dest in _NAMES:
            action.choices = _NAMES[action.dest]
        if action.type is path or (isinstance(action.metavar, str) and action.metavar in _PATHS):
            vars(action)["complete"] = files  # the attribute that shtab reads
