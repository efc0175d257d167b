"""The sequences that run together, and the only place of the engine that knows their cache.

A prompt is read in parts at fixed places, each a pass of its own; then all rows decode one token a pass, each
at its own position. Rows own pages of one pool. What a part computes depends on its own prompt alone, so
prompts that begin with the same whole parts share the pages of these.

Legend: B rows of a pass, S tokens of a part, M pages of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, final

import torch
from torch import Tensor

from consilium.engine.request import Finish, Request
from consilium.engine.stops import StopText
from consilium.evaluation.loads import LoadCounter
from consilium.kv.build import build_pool
from consilium.kv.paged import CachePart
from consilium.kv.pages import Pages
from consilium.kv.prefixes import Prefixes, digests
from consilium.kv.rows import CacheFormat
from consilium.model.decoder import Decoder
from consilium.model.native import NativeDecoder
from consilium.model.types import Inputs, Options, Output

PROMPT_PART: Final = 512
"""Tokens of a prompt that are computed at once, at fixed places: experts are read once for all of them."""
PAGE: Final = 64
"""Tokens of a page; parts are whole pages."""
FEWEST_PAGES: Final = 4


class TextStream(Protocol):
    """Turns tokens into text that is never taken back."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(slots=True, eq=False)
class Row:
    """One sequence, waiting or running; owned by the engine."""

    id: int
    request: Request
    tokens: list[int]
    prompt: int
    """How many of ``tokens`` were given."""
    most: int
    """How many ``tokens`` there can be."""
    ends: frozenset[int]
    generator: torch.Generator
    stream: TextStream | None
    stops: StopText
    finished: Finish | None = None
    pages: list[int] = field(default_factory=list)
    """Of its tokens; none while it waits for its turn."""
    cached: int = 0
    """How many of ``tokens`` are in the cache. Beyond the prompt those that are not are decoded anew."""
    parts: tuple[bytes, ...] = ()
    """Digests of the whole parts of its prompt."""


@final
class Batch:
    """Rows of one model and the pages of all, which grow with need, or are so many tokens from the start."""

    def __init__(
        self, model: Decoder, options: Options, most_tokens: int | None = None, form: CacheFormat = "model"
    ) -> None:
        self._model = model
        self._options = options
        self._native = NativeDecoder.of(model) if options.mode.observer is None else None
        self._pages = Pages()
        self._pool = build_pool(
            model.config, pages=0, page=PAGE, dtype=model.dtype, form=form, device=model.device
        )
        self._prefixes = Prefixes(self._pages)
        self._grows = most_tokens is None
        if most_tokens is not None:
            self._grow(most_tokens // PAGE)
        self.rows: list[Row] = []
        """Those whose prompt is read, in the order in which they joined."""
        self.loads = LoadCounter()
        """Of all passes since the beginning."""

    @property
    def by_kernels(self) -> bool:
        return self._native is not None

    def admit(self, row: Row) -> bool:
        """Give a row that has no pages those of its tokens and the next; False where there are too few.

        Whole parts of its prompt that are in the cache are not read again, but for the last token, whose
        logits nobody kept.
        """
        row.parts = row.parts or digests(row.tokens[: row.prompt], PROMPT_PART)
        known = self._prefixes.find(row.parts[: (row.prompt - 1) // PROMPT_PART])
        needed = len(row.tokens) // PAGE + 1 - len(known)
        if not self._room(needed):
            self._pages.release(known)
            return False
        row.pages, row.cached = known + self._taken(needed), len(known) * PAGE
        return True

    def extend(self, row: Row) -> bool:
        """Give a row the page of its next token, if it is without; False where there is none."""
        if row.cached < len(row.pages) * PAGE:
            return True
        if not self._room(1):
            return False
        row.pages += self._taken(1)
        return True

    def leave(self, row: Row) -> None:
        """Take a row out, or what is read of it so far; it may come back."""
        self.rows = [other for other in self.rows if other is not row]
        self._pages.release(row.pages)
        row.pages, row.cached = [], 0

    @torch.inference_mode()
    def read(self, row: Row) -> Tensor | None:
        """Compute the next part of a prompt; with the last the row joins, and there are logits [1, V]."""
        first, end = row.cached, min(row.cached + PROMPT_PART, row.prompt)
        position_1S = torch.arange(first, end, device=self._model.device)[None]
        inputs = Inputs(self._tensor([row.tokens[first:end]]), position_BS=position_1S)
        part = self._part([row])
        if self._native is not None and self._native.reads_prompts:
            output = self._native.read(inputs, part, self._options)
        else:
            output = self._last(inputs, part)
        self.loads.add(output.reports.values())
        row.cached = end
        if end - first == PROMPT_PART:
            pages = row.pages[first // PAGE : end // PAGE]
            self._prefixes.keep(row.parts[first // PROMPT_PART], pages)
        if end < row.prompt:
            return None
        self.rows.append(row)
        return output.logits[:, 0]

    @torch.inference_mode()
    def decode(self) -> Tensor:
        """Compute the next token of every row that is not in the cache; logits [B, V] after it."""
        inputs = Inputs(
            self._tensor([[row.tokens[row.cached]] for row in self.rows]),
            position_BS=self._tensor([[row.cached] for row in self.rows]),
        )
        part = self._part(self.rows)
        if self._native is not None:
            output = self._native.step(inputs, part, self._options)
        else:
            output = self._model(inputs, cache=part, options=self._options)
        self.loads.add(output.reports.values())
        for row in self.rows:
            row.cached += 1
        return output.logits[:, 0]

    def _last(self, inputs: Inputs, part: CachePart) -> Output:
        """By modules: the head reads the last state alone."""
        hidden = self._model.hidden(inputs, cache=part, options=self._options)
        reports = {report.layer: report for report in hidden.reports}
        return Output(self._model.logits(hidden.final_BSD[:, -1:]), reports, {})

    def _part(self, rows: Sequence[Row]) -> CachePart:
        """Tables of one width: beyond its last page a row sees that again, and never one of another."""
        longest = max(len(row.pages) for row in rows)
        tables = [row.pages + row.pages[-1:] * (longest - len(row.pages)) for row in rows]
        return self._pool.part(self._tensor(tables))

    def _room(self, count: int) -> bool:
        """Make ``count`` pages free: those of prompts that nobody reads, else new ones."""
        while self._pages.free < count:
            if self._prefixes.forget():
                continue
            if not self._grows:
                return False
            self._grow(max(count - self._pages.free, self._pages.total // 2, FEWEST_PAGES))
        return True

    def _grow(self, pages: int) -> None:
        self._pool.grow(pages)
        self._pages.add(pages)

    def _taken(self, count: int) -> list[int]:
        taken = self._pages.take(count)
        self._pool.clear(taken)
        return taken

    def _tensor(self, values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=self._model.device)
