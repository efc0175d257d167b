"""The sequences that run together, and the only place of the engine that knows their cache.

A prompt is read in parts at fixed places, each a pass of its own; then all rows decode one token a pass, each
at its own position. Rows own pages of one pool. What a part computes depends on its own prompt alone, so
prompts that begin with the same whole parts share the pages of these.

Legend: B rows of a pass, S tokens of a part, M pages of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.engine.request import Routes, Scored
from consilium.engine.rows import Row, pool
from consilium.engine.sampler import likeliest
from consilium.evaluation.loads import LoadCounter
from consilium.kv.build import build_pool
from consilium.kv.paged import CachePart
from consilium.kv.pages import Pages
from consilium.kv.prefixes import Prefixes, digests
from consilium.kv.rows import CacheFormat
from consilium.model.decoder import Decoder
from consilium.model.native import NativeDecoder
from consilium.model.types import Inputs, Options
from consilium.moe.types import Chosen

PROMPT_PART: Final = 512
"""Tokens of a prompt that are computed at once, at fixed places: experts are read once for all of them."""
PAGE: Final = 64
"""Tokens of a page; parts are whole pages."""
FEWEST_PAGES: Final = 4
_SCORED: Final = 64
"""Tokens of a prompt whose logits are there at once."""


@final
class Batch:
    """Rows of one model and the pages of all, which grow with need, or are so many tokens from the start."""

    def __init__(
        self, model: Decoder, options: Options, most_tokens: int | None = None, form: CacheFormat = "model"
    ) -> None:
        self._model = model
        self._options = options
        self._native = NativeDecoder.of(model) if options.mode.observer is None else None
        self._reader = self._native if self._native is not None and self._native.reads_prompts else None
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

    @property
    def use(self) -> float:
        """The share of pages that somebody owns; 0 without any."""
        return 1 - self._pages.free / self._pages.total if self._pages.total else 0.0

    def admit(self, row: Row) -> bool:
        """Give a row that has no pages those of its tokens and the next; False where there are too few.

        Whole parts of its prompt that are in the cache are not read again, but for the last token, whose
        logits nobody kept.
        """
        row.parts = row.parts or digests(row.tokens[: row.prompt], PROMPT_PART, row.request.salt)
        useful = 0 if row.request.reads_all else (row.prompt - 1) // PROMPT_PART
        known = self._prefixes.find(row.parts[:useful])
        needed = len(row.tokens) // PAGE + 1 - len(known)
        if not self._room(needed):
            self._pages.release(known)
            return False
        row.pages, row.cached = known + self._taken(needed), len(known) * PAGE
        row.shared = row.shared or row.cached
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
        x_SD = self._states(inputs, self._part([row]), [row])
        row.cached = end
        if row.request.scores_prompt:
            self._score(row, first, x_SD)
        if row.request.pools is not None:
            pool(row, x_SD if self._reader is None else self._model.norm(x_SD))
        if end - first == PROMPT_PART:
            pages = row.pages[first // PAGE : end // PAGE]
            self._prefixes.keep(row.parts[first // PROMPT_PART], pages)
        if end < row.prompt:
            return None
        self.rows.append(row)
        return self._logits(x_SD[-1:])

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row]) -> Tensor:
        """Compute the next token of each that is not in the cache; logits [B, V] after it."""
        inputs = Inputs(
            self._tensor([[row.tokens[row.cached]] for row in rows]),
            position_BS=self._tensor([[row.cached] for row in rows]),
        )
        part = self._part(rows)
        if self._native is not None:
            found = self._native.states(inputs, part, self._options, many=False)
            self.loads.add(found.reports.values())
            if any(row.request.routes for row in rows):
                _route(rows, found.chosen())
            logits_BV = self._native.logits(found.x_TD)
        else:
            output = self._model(inputs, cache=part, options=self._asked(rows))
            self.loads.add(output.reports.values())
            _route(rows, {layer: routing.chosen for layer, routing in output.routings.items()})
            logits_BV = output.logits[:, 0]
        for row in rows:
            row.cached += 1
        return logits_BV

    def _states(self, inputs: Inputs, part: CachePart, rows: Sequence[Row]) -> Tensor:
        """What the head reads [S, D] of a part of a prompt of one row."""
        if self._reader is not None:
            found = self._reader.states(inputs, part, self._options, many=True)
            self.loads.add(found.reports.values())
            if rows[0].request.routes:
                _route(rows, found.chosen())
            return found.x_TD
        hidden = self._model.hidden(inputs, cache=part, options=self._asked(rows))
        self.loads.add(hidden.reports)
        _route(rows, {layer: routing.chosen for layer, routing in hidden.routings.items()})
        return hidden.final_BSD[0]

    def _asked(self, rows: Sequence[Row]) -> Options:
        """Decisions of routers are kept where somebody wants to know."""
        wanted = any(row.request.routes for row in rows)
        return replace(self._options, routings=True) if wanted else self._options

    def _logits(self, x_SD: Tensor) -> Tensor:
        """[S, V]; the head reads no state but those that somebody asks for."""
        if self._reader is not None:
            return self._reader.logits(x_SD)
        return self._model.logits(x_SD[None])[0]

    def _score(self, row: Row, first: int, x_SD: Tensor) -> None:
        """Tell how likely the tokens behind those from ``first`` on are, as far as the prompt goes."""
        if not first:
            row.scored = [Scored(row.tokens[0], None)]
        following = row.tokens[first + 1 : min(first + len(x_SD) + 1, row.prompt)]
        for begin in range(0, len(following), _SCORED):
            tokens = following[begin : begin + _SCORED]
            logits_SV = self._logits(x_SD[begin : begin + len(tokens)]).float()
            logprobs_SV = torch.log_softmax(logits_SV, -1)
            for token, logprobs_V in zip(tokens, logprobs_SV.cpu(), strict=True):
                top = likeliest(logprobs_V, row.request.top)
                row.scored.append(Scored(token, float(logprobs_V[token]), top))

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


def _route(rows: Sequence[Row], chosen: Mapping[int, Chosen]) -> None:
    """Tell each row that asked where its tokens went: one of each, or all of one row."""
    if not chosen:
        return
    most = max(layer.experts_TK.shape[1] for layer in chosen.values())
    experts_TMK, weights_TMK = (
        torch.stack([F.pad(values, (0, most - values.shape[1]), value=spare) for values in layers], 1).cpu()
        for layers, spare in (
            ([layer.experts_TK for layer in chosen.values()], -1),
            ([layer.weights_TK.float() for layer in chosen.values()], 0),
        )
    )
    each = len(experts_TMK) // len(rows)
    for place, row in enumerate(rows):
        told = max(row.routed - row.cached, 0)  # of a row that is computed again
        if row.request.routes and told < each:
            own = slice(place * each + told, (place + 1) * each)
            row.routes.append(Routes(tuple(chosen), experts_TMK[own].to(torch.int16), weights_TMK[own]))
            row.routed = row.cached + each
