"""What a model writes to itself before it answers: apart from the answer, and free of the answer's form.

Models that do so begin with a mark, or their chat template ends a prompt with it, and a second mark ends it
(DeepSeek-R1, 2501.12948, table 1).

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.engine.request import Constraint, Matching
from consilium.serving.answers import Spelling

BEGIN: Final = "<think>"
END: Final = "</think>"


@dataclass(frozen=True, slots=True)
class Thought:
    """What an answer says so far: of a longer one both are longer, never other."""

    reasoning: str
    rest: str


def thinks(template: str) -> bool:
    """Whether a model does, by its chat template."""
    return END in template


def opened(prompt: Iterable[int], spelling: Spelling) -> bool:
    """Whether a prompt ends inside a thought."""
    return "".join(spelling.text(token) for token in list(prompt)[-_LAST:]).rstrip().endswith(BEGIN)


_LAST: Final = 8


def split(text: str, *, inside: bool, whole: bool) -> Thought:
    """Take the thought out of an answer; what may still become a mark is held back until it is ``whole``.

    ``inside``: the prompt began the thought.
    """
    if not inside:
        begun = text.lstrip()
        if not begun.startswith(BEGIN):
            return Thought("", "" if BEGIN.startswith(begun) and not whole else text)
        text = begun.removeprefix(BEGIN)
    thought, mark, rest = text.partition(END)
    if mark:
        return Thought(thought.strip(), rest.lstrip())
    return Thought((thought if whole else without_beginning(thought, END)).strip(), "")


def without_beginning(text: str, mark: str) -> str:
    """``text`` but for blanks and what may be the beginning of ``mark`` at its end."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    size = next((size for size in sizes if text.endswith(mark[:size])), 0)
    return text[: len(text) - size].rstrip() if size else text.rstrip()


@final
@dataclass(frozen=True, slots=True)
class AfterThought:
    """A ``Constraint`` that lets a model think as it likes, and then answer in a form."""

    form: Constraint
    inside: bool
    """Whether the prompt began the thought; else the model may begin one, or answer at once."""
    spelling: Spelling
    vocab_size: int

    def begin(self) -> Matching:
        return _Thinking(self)


@final
class _Thinking:
    """One answer on its way through a thought."""

    def __init__(self, asked: AfterThought) -> None:
        self._asked = asked
        self._form = asked.form.begin()
        self._inside = asked.inside
        self._answering = False
        self._tail = ""

    def allowed(self) -> Tensor:
        """Bool [V]; a thought is free but for tokens that would end it and say more."""
        if self._answering:
            return self._form.allowed()
        if not self._inside:
            allowed_V = self._form.allowed()
            allowed_V[list(self._asked.spelling.named(BEGIN, self._asked.vocab_size))] = True
            return allowed_V
        allowed_V = torch.ones(self._asked.vocab_size, dtype=torch.bool)
        for token, text in self._asked.spelling.with_more(END[-1]):
            if (self._tail + text).partition(END)[2].strip():
                allowed_V[token] = False
        return allowed_V

    def accept(self, token: int) -> None:
        if self._answering:
            self._form.accept(token)
        elif self._inside:
            self._tail += self._asked.spelling.text(token)
            self._answering = END in self._tail
            self._tail = self._tail[-len(END) + 1 :]
        elif self._asked.spelling.text(token) == BEGIN:
            self._inside = True
        else:
            self._answering = True
            self._form.accept(token)

    @property
    def may_end(self) -> bool:
        return self._answering and self._form.may_end

    @property
    def is_over(self) -> bool:
        return self._answering and self._form.is_over
