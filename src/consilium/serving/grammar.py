"""Answers of a form: JSON by a schema, text by a regular expression, one of several choices.

llguidance keeps the automaton; here a form is checked before anything runs, and a mask becomes a tensor.

Legend: V vocabulary of the model, W ids of the tokenizer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import llguidance
import torch
from torch import Tensor

from consilium.data.tokenizer import TOKENIZER_FILE, Tokenizer
from consilium.serving.body import Refused
from consilium.serving.limits import FORM_CHARACTERS
from consilium.serving.protocol import Generating

SECONDS: Final = 2.0
"""In which it has to be understood."""
_LIMITS: Final = llguidance.LLParserLimits(initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000)
_NOT_KEPT: Final = "no answer can keep the form from here on; give one that an answer can complete"
_COMPACT: Final[Any] = {"whitespace_flexible": False}
"""Where blanks may be without end, some models write nothing else."""


def form_of(asked: Generating, schema: Mapping[str, Any] | None = None) -> str | None:
    """The grammar of what was asked for, or of ``schema``; None where any text will do.

    Raises Refused for what is no form.
    """
    forms = [] if schema is None else [_schema(schema)]
    match asked.response_format:
        case None:
            pass
        case given if given.type == "json_object":
            forms.append(_schema({"type": "object"}))
        case given if given.type == "json_schema":
            if given.json_schema is None:
                raise Refused(
                    400, "response_format of type json_schema needs json_schema", param="response_format"
                )
            forms.append(_schema(given.json_schema.schema_))
        case _:
            pass
    if (wanted := asked.structured_outputs) is not None:
        if wanted.json_ is not None:
            forms.append(_schema(wanted.json_))
        if wanted.regex is not None:
            forms.append(llguidance.LLMatcher.grammar_from_regex(wanted.regex))
        if wanted.choice is not None:
            forms.append(_choice(wanted.choice))
    if len(forms) > 1:
        raise Refused(400, "an answer has one form; ask for one of them", param="structured_outputs")
    if forms and len(forms[0]) > FORM_CHARACTERS:
        raise Refused(400, f"the form of the answer has more than {FORM_CHARACTERS:,} characters")
    return forms[0] if forms else None


def _schema(schema: Mapping[str, Any]) -> str:
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)
    except ValueError as error:
        raise Refused(
            400, f"the schema cannot be used: {str(error)[:200]}", param="response_format"
        ) from None


def _choice(texts: Sequence[str]) -> str:
    return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))


@final
class Grammars:
    """What a tokenizer's grammars share; made when the first is asked for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self._files = tokenizer.files()
        self._markers = tuple(token for token in tokenizer.markers.values() if token < vocab_size)
        self._size = vocab_size
        self._end = ends[0]
        self._made: llguidance.LLTokenizer | None = None

    async def constraint(self, form: str) -> Grammar:
        """Raises Refused for a form that cannot be used, or not be understood in time."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._checked, form), SECONDS)
        except TimeoutError:
            raise Refused(400, f"the form took longer than {SECONDS:.0f} seconds to understand") from None

    def _checked(self, form: str) -> Grammar:
        if self._made is None:
            # A marker is never text: llguidance would offer it for its name, and then refuse it.
            known = json.loads(self._files[TOKENIZER_FILE]) | {"added_tokens": []}
            text = json.dumps(known)
            self._made = llguidance.LLTokenizer(text, n_vocab=self._size, eos_token=self._end)
        grammar = Grammar(self._made, form, self._size, self._markers)
        matcher = grammar.matcher()
        if not matcher.is_error():
            matcher.compute_bitmask()  # some faults show with the first token
        if matcher.is_error():
            raise Refused(
                400, f"the form cannot be used: {_in_one_line(matcher.get_error())}", param="response_format"
            )
        return grammar


def _in_one_line(text: str) -> str:
    return " ".join(text.split())[:200] or "no reason told"


@final
@dataclass(frozen=True, slots=True)
class Grammar:
    """A ``Constraint`` of the engine."""

    tokenizer: llguidance.LLTokenizer
    form: str
    vocab_size: int
    markers: tuple[int, ...]
    """Tokens that are no text: what they are called is written with other tokens."""

    def matcher(self) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self.tokenizer, self.form, log_level=0, limits=_LIMITS)

    def begin(self) -> Match:
        return Match(self.matcher(), self)


@final
class Match:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, grammar: Grammar) -> None:
        self._matcher = matcher
        self._size = grammar.vocab_size
        self._markers = list(grammar.markers)

    def allowed(self) -> Tensor:
        """Bool [V]; all False where the form cannot go on, which is then an error of the request."""
        mask_W = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        allowed_V = torch.zeros(self._size, dtype=torch.bool)
        allowed_V[: len(mask_W)] = mask_W[: self._size]
        allowed_V[self._markers] = False
        return allowed_V

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise Refused(400, _NOT_KEPT, param="response_format")

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()
