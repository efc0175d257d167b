"""The sequences that run together, and the only place of the engine that knows their cache.

A prompt is read in parts at fixed places, each a pass of its own; then all rows decode one token a pass, each
at its own position, and behind it what was guessed: to a pass, tokens of one row are as those of several.
Rows own pages of one pool. What a part computes depends on its own prompt alone, so prompts that begin with
the same whole parts share the pages of these.

Legend: B rows of a pass, S tokens of a part, N tokens of a pass, M pages of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from consilium.engine.drafts import Ahead, Drafts, Modules, NGrams, PartOf, Repeats, Speculation
from consilium.engine.request import Scored
from consilium.engine.routes import Routes
from consilium.engine.rows import Row, pool
from consilium.engine.sampler import likeliest
from consilium.errors import ConsiliumError
from consilium.evaluation.loads import LoadCounter
from consilium.kv.build import build_pool
from consilium.kv.paged import CachePart
from consilium.kv.pages import Pages
from consilium.kv.prefixes import Prefixes, digests
from consilium.kv.rows import CacheFormat
from consilium.model.decoder import Decoder
from consilium.model.native import NativeDecoder
from consilium.model.types import Inputs, Options

PROMPT_PART: Final = 512
"""Tokens of a prompt that are computed at once, at fixed places: experts are read once for all of them."""
PAGE: Final = 64
"""Tokens of a page; parts are whole pages."""
FEWEST_PAGES: Final = 4
_SCORED: Final = 64
"""Tokens of a prompt whose logits are there at once."""


@final
@dataclass(frozen=True, slots=True)
class Decoded:
    """What a pass found, the tokens of one row after those of another."""

    logits_NV: Tensor
    routes: Routes | None
    """Where somebody asked."""


@final
class Batch:
    """Rows of one model and the pages of all, which grow with need, or are so many tokens from the start."""

    def __init__(
        self,
        model: Decoder,
        options: Options,
        most_tokens: int | None = None,
        form: CacheFormat = "model",
        speculation: Speculation | None = None,
        part: int | None = None,
    ) -> None:
        """``part`` is of prompts; raises ConsiliumError where it is no number of whole pages."""
        self._part_tokens = PROMPT_PART if part is None else part
        if self._part_tokens <= 0 or self._part_tokens % PAGE:
            raise ConsiliumError(
                f"parts of {self._part_tokens} tokens are no whole pages; use a multiple of {PAGE}."
            )
        self._model = model
        self._options = options
        self._native = NativeDecoder.of(model) if options.mode.observer is None else None
        self._reader = self._native if self._native is not None and self._native.reads_prompts else None
        self._pages = Pages()
        self.drafts = _drafts(speculation, model, self._native, options, self._part)
        self._pool = build_pool(
            model.config,
            pages=0,
            page=PAGE,
            dtype=model.dtype,
            form=form,
            modules=model.config.mtp.depth if isinstance(speculation, Ahead) else 0,
            device=model.device,
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
        row.parts = row.parts or digests(row.tokens[: row.prompt], self._part_tokens, row.request.whole_salt)
        useful = 0 if row.request.reads_all else (row.prompt - 1) // self._part_tokens
        known = self._prefixes.find(row.parts[:useful])
        needed = len(row.tokens) // PAGE + 1 - len(known)
        if not self._room(needed):
            self._pages.release(known)
            return False
        row.pages, row.cached = known + self._taken(needed), len(known) * PAGE
        row.shared = row.cached if row.shared is None else row.shared
        return True

    def extend(self, row: Row, more: int = 0) -> bool:
        """Give a row the pages that its next token and ``more`` lack; False where there are none."""
        lacking = (row.cached + more) // PAGE + 1 - len(row.pages)
        if lacking <= 0:
            return True
        if not self._room(lacking):
            return False
        row.pages += self._taken(lacking)
        return True

    def leave(self, row: Row) -> None:
        """Take a row out, or what is read of it so far; it may come back."""
        self.rows = [other for other in self.rows if other is not row]
        self._pages.release(row.pages)
        row.pages, row.cached, row.states, row.pooled = [], 0, None, None

    @torch.inference_mode()
    def read(self, row: Row) -> Tensor | None:
        """Compute the next part of a prompt; with the last the row joins, and there are logits [1, V]."""
        first, end = row.cached, min(row.cached + self._part_tokens, row.prompt)
        position_1S = torch.arange(first, end, device=self._model.device)[None]
        inputs = Inputs(self._tensor([row.tokens[first:end]]), position_BS=position_1S)
        x_SD, routes = self._states(inputs, self._part([row]), [row], self._reader, many=True)
        row.tell(first, routes)
        row.cached = end
        if row.request.scores_prompt:
            self._score(row, first, x_SD)
        if row.request.pools is not None:
            pool(row, self._final(x_SD, self._reader))
        if self.drafts is not None:
            self.drafts.read(row, first, self._final(x_SD, self._reader))
        if end - first == self._part_tokens:
            pages = row.pages[first // PAGE : end // PAGE]
            self._prefixes.keep(row.parts[first // self._part_tokens], pages)
        if end < row.prompt:
            return None
        self.rows.append(row)
        return self._logits(x_SD[-1:], self._reader)

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row], guesses: Sequence[Sequence[int]]) -> Decoded:
        """Compute the next token of each that is not in the cache, and what was guessed behind it."""
        runs = [[row.tokens[row.cached], *guess] for row, guess in zip(rows, guesses, strict=True)]
        places = [
            [i] for row, run in zip(rows, runs, strict=True) for i in range(row.cached, row.cached + len(run))
        ]
        inputs = Inputs(
            self._tensor([[token] for run in runs for token in run]), position_BS=self._tensor(places)
        )
        part = self._part([row for row, run in zip(rows, runs, strict=True) for _ in run])
        x_ND, routes = self._states(inputs, part, rows, self._native, many=False)
        if self.drafts is not None:
            parts = self._final(x_ND, self._native).split([len(run) for run in runs])
            for row, final_SD in zip(rows, parts, strict=True):
                row.states = row.cached, final_SD
        return Decoded(self._logits(x_ND, self._native), routes)

    def _states(
        self,
        inputs: Inputs,
        part: CachePart,
        rows: Sequence[Row],
        native: NativeDecoder | None,
        *,
        many: bool,
    ) -> tuple[Tensor, Routes | None]:
        """What the head reads [N, D] of tokens of several rows, or of a part of the prompt of one."""
        wanted = any(row.request.routes for row in rows)
        options = replace(self._options_of(rows, inputs), routings=wanted)
        if native is not None:
            found = native.states(inputs, part, options, many=many)
            self.loads.add(found.reports.values())
            return found.x_TD, Routes.of(found.chosen()) if wanted else None
        hidden = self._model.hidden(inputs, cache=part, options=options)
        self.loads.add(hidden.reports)
        chosen = {layer: routing.chosen for layer, routing in hidden.routings.items()}
        return hidden.final_BSD.flatten(0, 1), Routes.of(chosen)

    def _options_of(self, rows: Sequence[Row], inputs: Inputs) -> Options:
        """Those of a row that is steered, which runs alone."""
        steering = rows[0].request.steering
        if steering is None:
            return self._options
        override = steering.override(self._model.config, inputs.positions().flatten())
        return replace(self._options, mode=replace(self._options.mode, override=override))

    def _final(self, x_ND: Tensor, native: NativeDecoder | None) -> Tensor:
        """States after the last norm, which the kernels leave to who asks."""
        return x_ND if native is None else self._model.norm(x_ND)

    def _logits(self, x_ND: Tensor, native: NativeDecoder | None) -> Tensor:
        """[N, V]; the head reads no state but those that somebody asks for."""
        if native is not None:
            return native.logits(x_ND)
        return self._model.logits(x_ND[None])[0]

    def _score(self, row: Row, first: int, x_SD: Tensor) -> None:
        """Tell how likely the tokens behind those from ``first`` on are, as far as the prompt goes."""
        if not first:
            row.scored = [Scored(row.tokens[0], None)]
        following = row.tokens[first + 1 : min(first + len(x_SD) + 1, row.prompt)]
        for begin in range(0, len(following), _SCORED):
            tokens = following[begin : begin + _SCORED]
            logits_SV = self._logits(x_SD[begin : begin + len(tokens)], self._reader).float()
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


def _drafts(
    speculation: Speculation | None,
    model: Decoder,
    native: NativeDecoder | None,
    options: Options,
    part: PartOf,
) -> Drafts | None:
    match speculation:
        case None:
            return None
        case NGrams():
            return Repeats()
        case Ahead():
            return Modules(model, native, options, part)
