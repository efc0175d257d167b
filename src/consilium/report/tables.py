"""The numbers of a page: headline tiles, scores by domain, specialists, commands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from consilium.records.run import CONFIG_FILE, BitsPerByte, RunMeta, Summary
from consilium.records.specialisation import Association, Specialisation
from consilium.report.bars import Bar
from consilium.report.source import Run
from consilium.report.svg import short
from consilium.report.words import LIMIT
from consilium.words.say import say

SPECIALISTS = 6


@dataclass(frozen=True, slots=True)
class Tile:
    label: str
    value: str
    note: str
    tone: Literal["plain", "good", "bad"] = "plain"


@dataclass(frozen=True, slots=True)
class Scores:
    """Bits per byte by domain, one column a model; the last row is the mean."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class Specialist:
    layer: int
    expert: int
    label: str
    share: float
    """Of the expert's tokens that carry the label."""
    usual: float
    """Share of all tokens that carry it."""


def facts(meta: RunMeta) -> list[tuple[str, str]]:
    """Name and value of what identifies a run."""
    hardware, versions = meta.hardware, meta.versions
    total, active = short(meta.parameters_total), short(meta.parameters_active)
    memory = f", {hardware.memory_bytes / 2**30:.0f} GiB" if hardware.memory_bytes else ""
    where = say("{cpu}, {threads} threads", cpu=hardware.cpu, threads=hardware.threads) + memory
    return [
        (say("Parameters"), say("{total}, {active} active a token", total=total, active=active)),
        (say("Text"), f"{meta.corpus}, SHA-256 {meta.corpus_sha256[:12]}"),
        (say("Machine"), where if hardware.accelerator is None else f"{hardware.accelerator}; {where}"),
        (say("Started"), f"{meta.started:%Y-%m-%d %H:%M %Z}"),
        (say("Seed"), str(meta.seed)),
        (
            say("Versions"),
            f"consilium {versions.consilium}, torch {versions.torch}, Python {versions.python}",
        ),
    ]


def tiles(run: Run) -> list[Tile]:
    """Headline numbers, the most important first. A run without a summary shows where it stands."""
    summary = run.summary
    found = [] if summary is None else [_bits_tile(summary), *_rival_tiles(summary)]
    if summary is None:
        measured = [r for r in run.metrics.records if r.bits_per_byte is not None]
        if measured:
            bits, first = measured[-1].bits_per_byte or math.nan, measured[0].bits_per_byte or math.nan
            note = say(
                "at step {step:,}; {before:.3f} at step {start:,}",
                step=measured[-1].step,
                before=first,
                start=measured[0].step,
            )
            found.append(Tile(say("bits per byte"), f"{bits:.3f}", note))
    return found + _speed_tiles(run) + _balance_tiles(run)


def _bits_tile(summary: Summary) -> Tile:
    bits, before = summary.trained.macro, summary.untrained
    if before is None:
        return Tile(say("bits per byte"), f"{bits:.3f}", say("held out, mean over domains"))
    note = say(
        "held out; {before:.3f} before training, so {share:.0%} of it",
        before=before.macro,
        share=bits / before.macro,
    )
    return Tile(say("bits per byte"), f"{bits:.3f}", note, "good" if bits < before.macro else "bad")


def _rival_tiles(summary: Summary) -> Iterator[Tile]:
    bits = summary.trained.macro
    dense = None if summary.dense is None else summary.dense.bits_per_byte
    for name, rival in ((say("byte trigram"), summary.trigram), (say("dense, same active size"), dense)):
        if rival is not None:
            beaten, not_beaten = (
                say("bits per byte; this run is below it"),
                say("bits per byte; this run is not below it"),
            )
            yield Tile(name, f"{rival.macro:.3f}", beaten if bits < rival.macro else not_beaten)


def _speed_tiles(run: Run) -> list[Tile]:
    if run.summary is not None:
        s = run.summary
        note = say(
            "{tokens} tokens in {steps:,} steps, {seconds:,.0f} s",
            tokens=short(s.tokens),
            steps=s.steps,
            seconds=s.seconds,
        )
        return [Tile(say("training tokens/s"), short(s.tokens_per_second), note)]
    last = next((r for r in reversed(run.metrics.records) if r.tok_per_sec is not None), None)
    if last is None:
        return []
    note = say("at step {step:,}", step=last.step)
    return [Tile(say("training tokens/s"), short(last.tok_per_sec or math.nan), note)]


def _balance_tiles(run: Run) -> list[Tile]:
    if run.loads is None:
        return []
    worst, dead = run.loads.final[run.loads.worst].ratio, run.loads.dead
    return [
        Tile(
            say("max / mean load"),
            f"{worst:.2f}",
            say("least even layer, last steps; 1.00 = fair share"),
            "good" if worst <= LIMIT else "bad",
        ),
        Tile(
            say("dead experts"),
            str(dead),
            say("of {experts}", experts=len(run.loads.layers) * run.loads.experts),
            "good" if dead == 0 else "bad",
        ),
    ]


def bars(run: Run, beside: Run | None) -> tuple[Bar, ...]:
    """Bits per byte of everything that was measured on the same held-out text, worst first."""
    if run.summary is None:
        return ()
    columns = _columns(run, beside)
    found = [
        Bar(name, score.macro, "bar ours" if place == 0 else "bar")
        for place, (name, score) in enumerate(columns)
    ]
    return tuple(sorted(found, key=lambda bar: -bar.value if math.isfinite(bar.value) else -math.inf))


def scores(run: Run, beside: Run | None) -> Scores | None:
    if run.summary is None:
        return None
    columns = _columns(run, beside)
    names = list(run.summary.trained.domains)
    rows = [(name, tuple(score.domains.get(name) for _, score in columns)) for name in names]
    rows.append((say("mean"), tuple(score.macro for _, score in columns)))
    return Scores(tuple(name for name, _ in columns), tuple(rows))


def _columns(run: Run, beside: Run | None) -> list[tuple[str, BitsPerByte]]:
    summary = run.summary
    assert summary is not None, "asked for the scores of a run that has not ended"
    dense = None if summary.dense is None else summary.dense.bits_per_byte
    other = None if beside is None or beside.summary is None else beside.summary.trained
    found = [
        (say("this model"), summary.trained),
        (beside.name if beside else "", other),
        (say("dense, same active size"), dense),
        (say("byte trigram"), summary.trigram),
        ("xz", summary.xz),
        (say("before training"), summary.untrained),
    ]
    return [(name, score) for name, score in found if score is not None]


def specialists(record: Specialisation, which: Literal["domain", "syntax"]) -> list[Specialist]:
    """The pairs of expert and label that carry most of the mutual information."""
    names = record.domains if which == "domain" else record.syntaxes
    found: list[tuple[float, Specialist]] = []
    for layer in record.layers:
        found += _pairs(layer.layer, names, layer.domain if which == "domain" else layer.syntax)
    return [pair for _, pair in sorted(found, key=lambda item: -item[0])[:SPECIALISTS]]


def _pairs(layer: int, names: Sequence[str], part: Association) -> Iterator[tuple[float, Specialist]]:
    total = sum(sum(row) for row in part.counts_EL)
    of_label = [sum(column) for column in zip(*part.counts_EL, strict=True)]
    for expert, row in enumerate(part.counts_EL):
        for label, copies in enumerate(row):
            if copies:
                share, usual = copies / sum(row), of_label[label] / total
                yield (
                    copies / total * math.log2(share / usual),
                    Specialist(layer, expert, names[label], share, usual),
                )


def commands(run: Run) -> list[tuple[str, str]]:
    """What to try next, and what it does: each runs as it stands where the page was written."""
    folder, found = shlex.quote(str(run.folder)), list[tuple[str, str]]()
    if run.checkpoint is not None:
        if run.generates:
            found += [
                (f'consilium generate {folder} --prompt "def fibonacci(n):"', say("write on from a prompt")),
                (f"consilium chat {folder}", say("talk to it in the terminal")),
            ]
        found.append((f"consilium eval {folder}", say("bits per byte of the text that it held out")))
    if run.summary is None:
        config = shlex.quote(str(run.folder / CONFIG_FILE))
        found.append((f"consilium train {config} --out {folder} --resume", say("continue, bit for bit")))
    return found
