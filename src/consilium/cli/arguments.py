"""Arguments of the verbs: a parser whose mistakes are one sentence, numbers with units."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn, final

from consilium.errors import ConsiliumError, closest
from consilium.words.say import say
from consilium.words.width import wrapped

_BELOW_ZERO: Final = re.compile(r"-(\.?\d|inf|nan)")
_COUNTS = MappingProxyType({"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12})
_BYTES = MappingProxyType(
    {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    | {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    | {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
)


@final
class _Help(argparse.RawDescriptionHelpFormatter):
    """Help in the reader's language, its lines as wide as they look."""

    def start_section(self, heading: str | None) -> None:
        super().start_section(None if heading is None else say(heading))

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Any,
        prefix: str | None = None,
    ) -> None:
        super().add_usage(usage, actions, groups, say("usage: ") if prefix is None else prefix)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(text, width)


@final
class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are ConsiliumErrors naming the nearest option."""

    def __init__(self, *, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"{say('example:')}\n  {example}",
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def actions(self) -> tuple[argparse.Action, ...]:
        """All arguments and options."""
        return tuple(self._actions)

    def show_defaults(self) -> None:
        """Let the help of every option end with its default, where it does not say what holds without it.

        Here help is put into the reader's language: what declares an option, and what tests it, is English.
        """
        for action in self._actions:
            untold = action.nargs != 0 and not action.required and "default" not in (action.help or "")
            action.help = say(action.help or "")
            if untold:
                value = say("none") if action.default in (None, []) else "%(default)s"
                action.help = say("{help}; default: {value}", help=action.help, value=value)

    def print_help(self, file: Any = None) -> None:
        """Unlike that of argparse, this says where standard output is full."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise ConsiliumError(f"{self.prog}: {message}; {self.prog} --help shows the arguments.")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse ``argv``. Raises ConsiliumError for anything that the verb does not know."""
        words = self._valued(argv)
        try:
            options, unknown = self.parse_known_args(words)
        except ConsiliumError:
            # What is missing may be there, misspelt.
            if strangers := self._strangers(words):
                raise ConsiliumError(self._unknown(strangers)) from None
            raise
        if unknown:
            raise ConsiliumError(self._unknown(unknown))
        return options

    def _strangers(self, words: Sequence[str]) -> list[str]:
        """Words of the form of an option, none of ours and none that is where the value of one belongs."""
        known = {name: action.nargs for action in self._actions for name in action.option_strings}
        ends = words.index("--") if "--" in words else len(words)
        return [
            word
            for before, word in zip(["", *words], words[:ends], strict=False)
            if word.startswith("--") and word.partition("=")[0] not in known and known.get(before, 0) == 0
        ]

    def _valued(self, argv: Sequence[str]) -> list[str]:
        """``--fit -1GiB`` as ``--fit=-1GiB``: argparse takes what begins with a dash for an option."""
        takes = {name for action in self._actions if action.nargs is None for name in action.option_strings}
        words: list[str] = []
        for word in argv:
            if words and words[-1] in takes and "--" not in words and _BELOW_ZERO.match(word):
                words[-1] += f"={word}"
            else:
                words.append(word)
        return words

    def _unknown(self, words: Sequence[str]) -> str:
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        if not flags:
            return f"{self.prog}: unexpected argument {words[0]!r}; {self.prog} --help shows the arguments."
        known = [option for action in self._actions for option in action.option_strings]
        meant = closest(flags[0], known)
        hint = f" Did you mean {meant!r}?" if meant else f" {self.prog} --help lists the options."
        return f"{self.prog}: unknown option {flags[0]}.{hint}"


def json_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``: one JSON object on standard output and nothing else there."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def count(text: str) -> int:
    """Read a positive number of things: ``8M``, ``8.1T``, ``32k``, ``1000``."""
    return _scaled(text, _COUNTS, "a positive count such as 8M, 8.1T or 32k")


def size(text: str) -> int:
    """Read a positive number of bytes with its unit: ``24GiB``, ``80GB``. A bare ``80`` would be a slip.

    A letter alone is a power of 1024, as for ls, docker and Slurm.
    """
    return _scaled(text, _BYTES, "a positive size with its unit, such as 24GiB, 80GB or 80G (as GiB)")


def path(text: str) -> Path:
    """Read a path. An empty one, as from an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def assignments(texts: Iterable[str]) -> dict[str, str]:
    """Read what ``--set KEY=VALUE`` was given. Raises ConsiliumError for one without a key or a value."""
    return dict(_assignment(text) for text in texts)


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConsiliumError(f"--set {text!r} has no '='; write --set key.path=value.")
    if not value:
        raise ConsiliumError(f"--set {text} has no value; write one, or null where none is meant.")
    return key, value


def _scaled(text: str, units: MappingProxyType[str, int], wanted: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    value = Decimal(match[1]) * units[match[2]]
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return int(value)
