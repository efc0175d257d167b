"""``summary.json``: how a run ended, beside what it is compared with."""

from __future__ import annotations

from pathlib import Path

from consilium.evaluation.bits import Evaluation
from consilium.records.io import read_json_if_present, write_json
from consilium.records.metrics import METRICS_FILE, read_metrics
from consilium.records.run import SUMMARY_FILE, BitsPerByte, Dense, Sample, Summary
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
    """Write and return the summary of a run that reached its last step.

    The untrained figure is the one logged before the very first step.
    """
    assert finished.last is not None, "a stopped run has no summary"
    before = read_json_if_present(Summary, out / SUMMARY_FILE)
    # A finished run that was only opened again keeps the speed it was trained with.
    timed = before if before is not None and finished.seconds == 0 else finished
    summary = Summary(
        steps=finished.steps,
        tokens=finished.tokens,
        seconds=timed.seconds,
        tokens_per_second=timed.tokens_per_second,
        trained=bits(finished.last),
        untrained=_untrained(out),
        trigram=trigram,
        xz=xz,
        dense=dense,
        sample=sample,
    )
    write_json(out / SUMMARY_FILE, summary)
    return summary


def bits(evaluation: Evaluation) -> BitsPerByte:
    return BitsPerByte(domains=evaluation.domains)


def _untrained(out: Path) -> BitsPerByte | None:
    records = read_metrics(out / METRICS_FILE).records
    first = next((record for record in records if record.step == 0 and record.domains), None)
    return None if first is None else BitsPerByte(domains=first.domains)
