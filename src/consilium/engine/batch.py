"""The sequences that run together, and the only place of the engine that knows their cache.

Sequences that join are right-padded and computed in one pass; then all decode one token a pass, each at its
own position. Sequence i of the cache is that of row i: the last row moves into the place of one that leaves,
so that a pass reads a slice of the cache and computes nothing for rows that have finished.

Legend: B rows of a pass, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, final

import torch
from torch import Tensor

from consilium.engine.request import Finish, Request
from consilium.engine.stops import StopText
from consilium.evaluation.loads import LoadCounter
from consilium.kv.build import build_cache
from consilium.kv.dense import DenseCache, DensePart
from consilium.model.decoder import Decoder
from consilium.model.native import NativeDecoder
from consilium.model.types import Inputs, Options, Output

FEWEST_SLOTS: Final = 256
PROMPT_PART: Final = 512
"""Tokens of a prompt that are computed at once, at fixed places: experts are read once for all of them."""


class TextStream(Protocol):
    """Turns tokens into text that is never taken back."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(slots=True)
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


@final
class Batch:
    """Rows of one model and their cache, which lasts as long as there are rows."""

    def __init__(self, model: Decoder, options: Options) -> None:
        self._model = model
        self._options = options
        self._native = NativeDecoder.of(model) if options.mode.observer is None else None
        self._device = model.device
        self._cache: DenseCache | None = None
        self.rows: list[Row] = []
        self.loads = LoadCounter()
        """Of all passes since the beginning."""

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> Tensor:
        """[B, V] logits after the last token of each new row: the head reads no other state."""
        if self._native is not None and self._native.reads_prompts:
            return torch.cat([self._read(self._native, row) for row in rows])
        longest = max(len(row.tokens) for row in rows)
        ids_BS = self._tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in rows])
        lengths_B = self._tensor([len(row.tokens) for row in rows])
        position_BS = torch.arange(longest, device=self._device).expand_as(ids_BS)
        inputs = Inputs(ids_BS, position_BS=position_BS, valid_BS=position_BS < lengths_B[:, None])
        part = self._part(len(self.rows), len(rows), longest)
        hidden = self._model.hidden(inputs, cache=part, options=self._options)
        self.loads.add(hidden.reports)
        self.rows += rows
        return self._model.logits(
            hidden.final_BSD[torch.arange(len(rows), device=self._device), lengths_B - 1]
        )

    def _read(self, native: NativeDecoder, row: Row) -> Tensor:
        """[1, V] logits after the last token of a row that joins, whose prompt is read part by part."""
        tokens, place = row.tokens, len(self.rows)
        cache = self._part(place, 1, len(tokens))
        logits_1V = torch.empty(0)
        for first in range(0, len(tokens), PROMPT_PART):
            ids_1S = self._tensor([tokens[first : first + PROMPT_PART]])
            position_1S = torch.arange(first, first + ids_1S.shape[1])[None]
            output = native.read(Inputs(ids_1S, position_BS=position_1S), cache, self._options)
            self.loads.add(output.reports.values())
            logits_1V = output.logits[:, 0]
        self.rows.append(row)
        return logits_1V

    @torch.inference_mode()
    def decode(self) -> Tensor:
        """[B, V] logits after the newest token of every row."""
        inputs = Inputs(
            self._tensor([[row.tokens[-1]] for row in self.rows]),
            position_BS=self._tensor([[len(row.tokens) - 1] for row in self.rows]),
        )
        keys = max(len(row.tokens) for row in self.rows)
        part = self._part(0, len(self.rows), keys)
        output = self._step(inputs, part)
        self.loads.add(output.reports.values())
        return output.logits[:, 0]

    def _step(self, inputs: Inputs, part: DensePart) -> Output:
        if self._native is not None:
            return self._native.step(inputs, part, self._options)
        output: Output = self._model(inputs, cache=part, options=self._options)
        return output

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Take ``row`` out and give its memory to the last one."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if self._cache is not None and place != last:
            self._cache.move(last, place)
        self.rows[place] = self.rows[last]
        self.rows.pop()
        if not self.rows:
            self._cache = None

    def _part(self, first: int, count: int, keys: int) -> DensePart:
        return DensePart(self._reserved(first + count, keys), slice(first, first + count))

    def _reserved(self, batch: int, keys: int) -> DenseCache:
        """The cache with room for ``batch`` sequences of ``keys`` slots; it grows by half at least."""
        config, cache = self._model.config, self._cache
        if cache is None or cache.batch < batch or cache.capacity < keys:
            slots = min(max(keys + keys // 2, FEWEST_SLOTS), config.max_length)
            grown = build_cache(
                config,
                batch=batch if cache is None else max(batch, cache.batch),
                capacity=slots if cache is None or cache.capacity < keys else cache.capacity,
                dtype=self._model.dtype,
                device=self._device,
            )
            if cache is not None:
                grown.take(cache)
            self._cache = cache = grown
        return cache

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=self._device)
