"""Sentences about a run, computed from its records and never assumed."""

from __future__ import annotations

import math

from consilium.records.specialisation import Association, Specialisation
from consilium.report.load_map import WINDOW, LoadMap
from consilium.report.source import Run

LIMIT = 1.5
"""max/mean load up to which a layer counts as balanced."""
NEGLIGIBLE = 0.002
"""Shares of the expert choice closer than this are not told apart."""


def balance(run: Run, loads: LoadMap) -> str:
    """How even the loads were at the end."""
    worst, final = loads.worst, float(loads.final_L[loads.worst])
    if math.isnan(final):
        return "Nothing was routed in the last recorded steps."
    window = min(WINDOW, loads.steps_S.shape[0])
    dead = int(loads.dead_LE.sum())
    verdict = "within" if final <= LIMIT else "above"
    experts = "No expert is dead" if dead == 0 else f"{dead} of {loads.dead_LE.size} experts are dead"
    return (
        f"Over the last {window} recorded steps the busiest expert of the least even layer,"
        f" {run.layer_name(loads.layers[worst])}, carried {final:.2f} times its fair share,"
        f" {verdict} the limit of {LIMIT}."
        f" {experts}{'' if dead == 0 else ': no token in these steps, marked × at the right edge'}."
    )


def explained(parts: list[Association]) -> float:
    """Share of the expert choice that a label explains, above chance, mean over layers."""
    return sum(part.normalised for part in parts) / len(parts)


def specialisation(record: Specialisation) -> str:
    """Which labelling says more about the choice of expert on this run."""
    if not record.layers:
        return "No layer of this model routes to experts."
    absent = [
        name
        for name, part in (("domain", record.layers[0].domain), ("syntactic class", record.layers[0].syntax))
        if labels_seen(part) < 2
    ]
    if absent:
        return (
            f"The observed text has no two labels of a kind for: {' and '.join(absent)}; nothing to compare."
        )
    domain = explained([layer.domain for layer in record.layers])
    syntax = explained([layer.syntax for layer in record.layers])
    told = f"domain explains {domain:.1%} of the choice of expert, syntax {syntax:.1%}"
    told += " (mean over layers, chance subtracted)"
    if max(domain, syntax) < NEGLIGIBLE:
        return f"Neither says anything about the experts of this run: {told}."
    if abs(domain - syntax) < NEGLIGIBLE:
        return f"Domain and syntax say the same amount about the experts of this run: {told}."
    larger, other = ("syntax", "domain") if syntax > domain else ("domain", "syntax")
    agreeing = sum(
        (layer.syntax.normalised > layer.domain.normalised) == (syntax > domain) for layer in record.layers
    )
    share = f"so in {agreeing} of {len(record.layers)} layers"
    return f"On this run experts follow {larger} more than {other}: {told}; {share}."


def labels_seen(part: Association) -> int:
    """Labels that any token carries."""
    return sum(any(column) for column in zip(*part.counts_EL, strict=True))
