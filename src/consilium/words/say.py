"""What the command and its pages say, in the reader's language: English in the code, Chinese in zh.json.

The English texts are the keys, so that the code reads as it speaks. What other programs read is the same in
every language: JSON, files, options, names of metrics and places. So are errors, which people search for.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from consilium.errors import ConsiliumError, nearest

Say = Callable[..., str]
"""``say`` or ``plain``."""

VARIABLE: Final = "CONSILIUM_LANG"
LANGUAGES: Final = ("en", "zh")
CATALOGUE: Final = Path(__file__).with_name("zh.json")


def say(text: str, /, **values: object) -> str:
    """Return ``text`` in the reader's language, its placeholders filled: ``say("{n:,} steps", n=8)``."""
    return plain(_chinese().get(text, text) if language() == "zh" else text, **values)


def plain(text: str, /, **values: object) -> str:
    """Return ``text`` as programs read it, where people are told the same by ``say``."""
    return text.format(**values) if values else text


def language() -> str:
    """``zh`` or ``en``, as CONSILIUM_LANG says, or else the locale."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        settings = ("LC_ALL", "LC_MESSAGES", "LANG")  # in the order of POSIX
        asked = next(filter(None, map(os.environ.get, settings)), "")
    return "zh" if asked.lower().startswith("zh") else "en"


def check_language() -> None:
    """Raise ConsiliumError where CONSILIUM_LANG asks for a language that nobody speaks here."""
    asked = os.environ.get(VARIABLE, "")
    if asked and not asked.lower().startswith(LANGUAGES):
        raise ConsiliumError(f"{VARIABLE}={asked} is no language of this command.{nearest(asked, LANGUAGES)}")


@functools.cache
def _chinese() -> Mapping[str, str]:
    return MappingProxyType(json.loads(CATALOGUE.read_text(encoding="utf-8")))
