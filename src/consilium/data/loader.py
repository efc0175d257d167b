"""What a model is fed: training rows as a pure function of corpus, seed and step, and held-out windows.

Legend: B rows, S tokens a row, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from consilium.config.data import Data
from consilium.data.batch import Batch
from consilium.data.corpus import Corpus
from consilium.data.encoding import TokenizedText
from consilium.data.mixture import start_shares
from consilium.data.packing import PackedDomain, Row
from consilium.data.schedule import MOST_DOMAINS, Schedule
from consilium.data.syntax import UNKNOWN
from consilium.data.windows import Windows, cut_windows, learned_windows, limit_windows
from consilium.errors import ConsiliumError
from consilium.words.say import say


@final
class Loader:
    """Deals rows from the domains in the shares that ``data`` asks for. To resume takes the step alone."""

    def __init__(
        self,
        corpus: Corpus,
        data: Data,
        *,
        batch: int,
        seed: int,
        first: Sequence[int] = (),
        dealt: tuple[int, int] = (0, 0),
    ) -> None:
        """``batch`` is global, in rows, behind the ``first`` steps, which have batches of their own.

        ``dealt`` are the steps and rows before the batches were these.

        Raises ConsiliumError when no domain fills one sequence, for a domain that has nothing to learn, and
        for weights that do not fit the text.
        """
        sequence_length = data.sequence_length
        counts = {domain: text.token_count for domain, text in corpus.train.items()}
        long_enough = {domain: count for domain, count in counts.items() if count >= sequence_length}
        if not long_enough:
            raise ConsiliumError(_too_short(counts, sequence_length))
        if len(long_enough) > MOST_DOMAINS:
            raise ConsiliumError(
                f"data: {len(long_enough)} domains are more than the {MOST_DOMAINS} that can be mixed; put"
                " the text into fewer folders."
            )
        _refuse_unlearned({domain: corpus.train[domain] for domain in long_enough})
        self.domains: tuple[str, ...] = tuple(long_enough)
        self.notices: tuple[str, ...] = tuple(
            say(
                "domain {domain!r} is left out of training: its {count} tokens do not fill a sequence of"
                " {length}",
                domain=domain,
                count=count,
                length=sequence_length,
            )
            for domain, count in counts.items()
            if domain not in long_enough
        )
        self._batch = batch
        self._ramp = [0, *itertools.accumulate(first)]
        self._first_row = dealt[1] - self.rows_before(dealt[0])
        self._packed = [PackedDomain(corpus.train[d], sequence_length, seed, d) for d in self.domains]
        shares = start_shares(data, long_enough, corpus.owners)
        self.asked: Mapping[str, float] = shares
        """Shares at the first step as they were asked for; rows come as near as a period allows."""
        self._schedule = Schedule([shares[domain] for domain in self.domains])

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over all training text, were the domains dealt by size."""
        return sum(packed.rows_per_epoch for packed in self._packed)

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of the rows that each domain gets."""
        return dict(zip(self.domains, self._schedule.shares, strict=True))

    def rows_before(self, step: int) -> int:
        """Rows that steps before ``step`` have, were their batches these."""
        ramped = min(step, len(self._ramp) - 1)
        return self._ramp[ramped] + (step - ramped) * self._batch

    def size(self, step: int) -> int:
        """Rows of the global batch of ``step``."""
        return self.rows_before(step + 1) - self.rows_before(step)

    def change_shares(self, row: int, shares: Mapping[str, float]) -> None:
        """Deal by ``shares`` from row ``row`` of the run on, behind every change before."""
        self._schedule.change(row, [shares[domain] for domain in self.domains])

    def batch(self, step: int) -> Batch:
        """Return the global batch of ``step``, counted from 0."""
        return self.micro(step, 0, 1)

    def micro(self, step: int, index: int, count: int) -> Batch:
        """Return part ``index`` of the ``count`` equal parts that the batch of ``step`` consists of."""
        assert self.size(step) % count == 0
        assert 0 <= index < count
        size = self.size(step) // count
        first = self._first_row + self.rows_before(step) + index * size
        return _stack([self._row(number) for number in range(first, first + size)])

    def part(self, step: int, micro: tuple[int, int], rank: tuple[int, int]) -> Batch:
        """Return what rank r of R trains on in micro-batch m of M, given ``(m, M)`` and ``(r, R)``.

        The parts of all ranks, one after the other, are the micro-batch, so that no order depends on R.
        """
        (index, count), (place, ranks) = micro, rank
        return self.micro(step, index * ranks + place, count * ranks)

    def row_domains(self, step: int) -> tuple[str, ...]:
        """Return the domain of each row of the batch of ``step``."""
        first = self._first_row + self.rows_before(step)
        return tuple(self.domains[self._schedule.row(first + row)[0]] for row in range(self.size(step)))

    def _row(self, number: int) -> Row:
        domain, rank = self._schedule.row(number)
        return self._packed[domain].row(rank)


def _too_short(counts: dict[str, int], sequence_length: int) -> str:
    available = max(counts.values())
    return (
        f"data: the training text is too short: its largest domain has {available} tokens and one sequence"
        f" needs {sequence_length}; give more text or set --seq to {available} or less."
    )


def _refuse_unlearned(texts: Mapping[str, TokenizedText]) -> None:
    for domain in (domain for domain, text in texts.items() if not text.is_learned):
        raise ConsiliumError(
            f"data: nothing of domain {domain!r} is learned, since all its completions or answers are empty;"
            " fill them, or take the domain out."
        )


def _stack(rows: list[Row]) -> Batch:
    ids_BS = torch.from_numpy(np.stack([row.ids_S for row in rows]))
    return Batch(
        ids_BS=ids_BS,
        targets_BS=torch.from_numpy(np.stack([row.targets_S for row in rows])),
        sequence_BS=torch.from_numpy(np.stack([row.sequence_S for row in rows])),
        position_BS=torch.from_numpy(np.stack([row.position_S for row in rows])),
        valid_BS=torch.ones_like(ids_BS, dtype=torch.bool),
    )


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """Windows of one domain. Bits per byte: -log2 p summed over targets by the sum of ``bytes_BS``."""

    batch: Batch
    """One window a row, padded on the right; targets are the text's tokens, never the EOS that closes it."""
    domain: str
    bytes_BS: Tensor
    """int64 bytes of the source behind each target, 0 where there is none."""
    syntax_BS: Tensor
    """int64 index into syntax.CLASSES of each input token, -1 where unknown."""


def held_out_batches(
    corpus: Corpus,
    domain: str,
    sequence_length: int,
    batch: int,
    *,
    stride: int | None = None,
    limit_tokens: int | None = None,
) -> Iterator[LabelledBatch]:
    """Yield the held-out windows of ``domain``, ``batch`` rows at a time.

    A document is predicted from its opening EOS on, every token once; a window's first input is the last
    token of the window before, with no more context than that; with a ``stride`` below the sequence length
    it begins earlier, among tokens that count already. With ``limit_tokens`` windows spread evenly over the
    documents are taken while their targets do not exceed it, at least one window. Windows of which nothing is
    learned are left out.
    """
    text = corpus.held_out[domain]
    windows = learned_windows(cut_windows(text, sequence_length, stride), text)
    windows = limit_windows(windows, limit_tokens)
    for start in range(0, len(windows.first_W), batch):
        rows = slice(start, start + batch)
        yield _label(text, domain, windows.rows(rows))


def held_out_tokens(text: TokenizedText, limit_tokens: int | None) -> int:
    """Return how many targets the windows of ``text`` have at most."""
    targets = text.token_count - len(text.starts_N)
    return targets if limit_tokens is None else min(targets, limit_tokens)


def _label(text: TokenizedText, domain: str, windows: Windows) -> LabelledBatch:
    first_B, length_B = windows.first_W, windows.length_W
    position_S = np.arange(length_B.max())
    valid_BS = position_S < length_B[:, None]
    # Padding repeats the window's first token: any valid id will do.
    source_BS = np.where(valid_BS, first_B[:, None] + position_S, first_B[:, None])
    next_BS = np.where(valid_BS, source_BS + 1, source_BS)
    fresh_BS = valid_BS & (position_S >= windows.seen_W[:, None]) & text.learned(next_BS)
    batch = Batch(
        ids_BS=torch.from_numpy(text.ids_T[source_BS].astype(np.int64)),
        targets_BS=torch.from_numpy(np.where(fresh_BS, text.ids_T[next_BS].astype(np.int64), -1)),
        sequence_BS=torch.zeros(valid_BS.shape, dtype=torch.int64),
        position_BS=torch.from_numpy(np.where(valid_BS, position_S, 0)),
        valid_BS=torch.from_numpy(valid_BS),
    )
    return LabelledBatch(
        batch=batch,
        domain=domain,
        bytes_BS=torch.from_numpy(np.where(fresh_BS, text.sizes_T[next_BS].astype(np.int64), 0)),
        syntax_BS=torch.from_numpy(np.where(valid_BS, text.syntax_T[source_BS], UNKNOWN).astype(np.int64)),
    )
