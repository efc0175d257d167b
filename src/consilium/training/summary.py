"""``summary.json``: how a run ended, beside what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from consilium.evaluation.bits import Evaluation
from consilium.records.io import write_json
from consilium.records.metrics import METRICS_FILE, read_metrics
from consilium.records.run import SUMMARY_FILE, BitsPerByte, Dense, Sample, StepRecord, Summary
from consilium.training.events import Finished


def write_summary(
    out: Path,
    finished: Finished,
    *,
    trigram: BitsPerByte | None = None,
    xz: BitsPerByte | None = None,
    dense: Dense | None = None,
    sample: Sample | None = None,
) -> Summary:
    """Write and return the summary of a run that reached its last step, in however many processes.

    The untrained figure is the one logged before the very first step.
    """
    assert finished.last is not None, "a stopped run has no summary"
    records = read_metrics(out / METRICS_FILE).records
    seconds = spent(records)
    summary = Summary(
        steps=finished.steps,
        tokens=finished.tokens,
        seconds=seconds,
        tokens_per_second=finished.tokens / seconds if seconds else 0.0,
        trained=bits(finished.last),
        untrained=_untrained(records),
        trigram=trigram,
        xz=xz,
        dense=dense,
        sample=sample,
    )
    write_json(out / SUMMARY_FILE, summary)
    return summary


def spent(records: Sequence[StepRecord]) -> float:
    """Seconds of all steps. A long run logs some of them, and each stands for those since the one before."""
    seconds, done = 0.0, 0
    for record in records:
        if record.tok_per_sec:
            seconds += (record.tokens - done) / record.tok_per_sec
            done = record.tokens
    return seconds


def bits(evaluation: Evaluation) -> BitsPerByte:
    return BitsPerByte(domains=evaluation.domains)


def _untrained(records: Sequence[StepRecord]) -> BitsPerByte | None:
    first = next((record for record in records if record.step == 0 and record.domains), None)
    return None if first is None else BitsPerByte(domains=first.domains)
