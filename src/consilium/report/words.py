"""Sentences about a run, computed from its records and never assumed."""

from __future__ import annotations

import math

from consilium.records.loads import WINDOW
from consilium.records.specialisation import Association, Specialisation
from consilium.report.load_map import LoadMap
from consilium.report.source import Run
from consilium.words.say import say

LIMIT = 1.5
"""max/mean load up to which a layer counts as balanced."""
NEGLIGIBLE = 0.002
"""Shares of the expert choice closer than this are not told apart."""


def spikes(run: Run) -> str | None:
    """Steps whose loss or gradient norm jumped; None where none did."""
    found = [record for record in run.metrics.records if record.spike]
    if not found:
        return None
    return say(
        "{run}: loss or gradient norm jumped far above the steps before in {count} steps, first in step"
        " {first}, last in step {last}; {skipped} of them were skipped.",
        run=run.name,
        count=len(found),
        first=found[0].step,
        last=found[-1].step,
        skipped=sum(bool(record.skipped) for record in found),
    )


def diverged(run: Run) -> str | None:
    """The first step from which on no loss is a number; None where the newest one is."""
    told = [(record.step, record.loss) for record in run.metrics.records if record.loss is not None]
    bad = [step for step, loss in told if not math.isfinite(loss)]
    if not bad or math.isfinite(told[-1][1]):
        return None
    return say("{run}: the loss is not a number at the end, first in step {step}.", run=run.name, step=bad[0])


def dropping(run: Run) -> str | None:
    """The share of copies that the newest step dropped; None where it dropped none."""
    told = [record for record in run.metrics.records if record.dropped_frac is not None]
    share = told[-1].dropped_frac if told else None
    if not share:
        return None
    return say(
        "{run}: {share:.1%} of the copies that routers wanted were dropped in step {step}.",
        run=run.name,
        share=share,
        step=told[-1].step,
    )


def balance(run: Run, loads: LoadMap) -> str:
    """How even the loads were at the end."""
    worst, final = loads.worst, loads.final[loads.worst].ratio
    if math.isnan(final):
        return say("Nothing was routed in the last recorded steps.")
    window = min(WINDOW, loads.steps_S.shape[0])
    dead = loads.dead
    asked = {
        "steps": window,
        "layer": run.layer_name(loads.layers[worst]),
        "ratio": final,
        "limit": LIMIT,
    }
    if final <= LIMIT:
        told = say(
            "Over the last {steps} recorded steps the busiest expert of the least even layer, {layer},"
            " carried {ratio:.2f} times its fair share, within the limit of {limit}.",
            **asked,
        )
    else:
        told = say(
            "Over the last {steps} recorded steps the busiest expert of the least even layer, {layer},"
            " carried {ratio:.2f} times its fair share, above the limit of {limit}.",
            **asked,
        )
    if dead == 0:
        return f"{told} {say('No expert is dead.')}"
    return told + say(
        " {dead} of {experts} experts are dead: no token in these steps, marked × at the right edge.",
        dead=dead,
        experts=len(loads.layers) * loads.experts,
    )


def explained(parts: list[Association]) -> float:
    """Share of the expert choice that a label explains, above chance, mean over layers."""
    return sum(part.normalised for part in parts) / len(parts)


def specialisation(record: Specialisation) -> str:
    """Which labelling says more about the choice of expert on this run."""
    if not record.layers:
        return say("No layer of this model routes to experts.")
    first = record.layers[0]
    named = ((say("domain"), first.domain), (say("syntactic class"), first.syntax))
    absent = [name for name, part in named if labels_seen(part) < 2]
    if absent:
        return say(
            "The observed text has no two labels of a kind for: {kinds}; nothing to compare.",
            kinds=say(" and ").join(absent),
        )
    domain = explained([layer.domain for layer in record.layers])
    syntax = explained([layer.syntax for layer in record.layers])
    told = say(
        "domain explains {domain:.1%} of the choice of expert, syntax {syntax:.1%} (mean over layers, chance"
        " subtracted)",
        domain=domain,
        syntax=syntax,
    )
    if max(domain, syntax) < NEGLIGIBLE:
        return say("Neither says anything about the experts of this run: {told}.", told=told)
    if abs(domain - syntax) < NEGLIGIBLE:
        return say("Domain and syntax say the same amount about the experts of this run: {told}.", told=told)
    return _preference(record, told, syntax_wins=syntax > domain)


def _preference(record: Specialisation, told: str, *, syntax_wins: bool) -> str:
    agreeing = sum(
        (layer.syntax.normalised > layer.domain.normalised) == syntax_wins for layer in record.layers
    )
    said = {"told": told, "agreeing": agreeing, "layers": len(record.layers)}
    if syntax_wins:
        return say(
            "On this run experts follow syntax more than domain: {told}; so in {agreeing} of"
            " {layers} layers.",
            **said,
        )
    return say(
        "On this run experts follow domain more than syntax: {told}; so in {agreeing} of {layers} layers.",
        **said,
    )


def labels_seen(part: Association) -> int:
    """Labels that any token carries."""
    return sum(any(column) for column in zip(*part.counts_EL, strict=True))
