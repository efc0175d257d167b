"""What the files of a model say about ending and sampling its text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Token ids that begin, end and pad a text, and how its authors sample; None is what no file says.

    Any of ``ends`` ends a text. A ``temperature`` of 0 is greedy. The two mappings are those keys as
    config.json and generation_config.json had them, so that a copy says the same.
    """

    begin: int | None = None
    ends: tuple[int, ...] = ()
    padding: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    in_config: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    in_generation_config: Mapping[str, Any] = field(default_factory=lambda: _NONE)

    def or_tokens(self, begin: int | None, end: int) -> GenerationDefaults:
        """The same, with the ids of a tokenizer where no file names an end."""
        if self.ends:
            return self
        return dataclasses.replace(
            self, begin=begin, ends=(end,), in_config=_NONE, in_generation_config=_NONE
        )
