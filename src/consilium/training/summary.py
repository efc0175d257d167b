"""``summary.json``: how a run ended, beside what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from consilium.evaluation.bits import Evaluation
from consilium.records.io import read_json_if_present, write_json
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

    The untrained figure is the one logged before the very first step. What an earlier summary compares with
    stays where it is not given: other models of the text always, a twin and a sample of the same steps.
    """
    assert finished.last is not None, "a stopped run has no summary"
    records = read_metrics(out / METRICS_FILE).records
    seconds = spent(records)
    earlier = read_json_if_present(Summary, out / SUMMARY_FILE)
    same = None if earlier is None or earlier.steps != finished.steps else earlier
    summary = Summary(
        steps=finished.steps,
        tokens=finished.tokens,
        seconds=seconds,
        tokens_per_second=finished.tokens / seconds if seconds else 0.0,
        trained=bits(finished.last),
        untrained=_untrained(records),
        trigram=trigram or (earlier and earlier.trigram),
        xz=xz or (earlier and earlier.xz),
        dense=dense or (same and same.dense),
        sample=sample or (same and same.sample),
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
