"""Write docs/balance.md and its pictures from bench/records/balance-*.json.

``--check`` changes nothing and fails when a page is out of date.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from paired import DOCS, RECORDS, STYLE, Claim, Studies, Study, cell, claim_row, source, write

from consilium.recipes.balances import TEXTS
from consilium.report.lines import LineChart, Rule, Series, line_chart
from consilium.report.plain import markdown
from consilium.report.svg import standalone

SCORES = ("softmax", "sigmoid")
CHOICES = ("k2", "k4", "k8")
DRAWN = ("none", "switch", "sequence", "bias", "bias-linear", "smebu", "quantile", "sinkhorn")
"""As many as the page has colours."""
AT_STEP = re.compile(r"MaxVio at step (\d+)")
BITS, BATCH, GLOBAL, TIME = "bits per byte", "MaxVio batch", "MaxVio global", "steps to MaxVio < 0.5"

HEAD = """\
# Balance methods beside each other

Written by `docs/generate_balance.py` from the records of `python bench/balance.py`. One small model is
trained by every method of `consilium train --balance NAME`, on softmax and on sigmoid scores. Seeds are
paired: for each seed all methods begin with the same weights and read the same text in the same order. Rates
are each method's defaults; none was chosen after a result was seen.

- *Bits per byte* are of held-out text; *beside none* is the mean over seeds of the difference to the run
  without balance.
- *MaxVio* is the load of the busiest expert over the mean load, less one (2408.15664), mean over layers:
  *batch* over the last 50 steps of training, *global* over the held-out text.
- *Steps to 0.5* are those after which ten steps in a row have a mean MaxVio below 0.5.
- *Dead* experts got no token in the last 50 steps; *dropped* is the share of choices that a capacity cut.
- A *spike* is a loss above 1.15 times the median of the 20 steps before it, a *peak* a gradient norm above 3
  times that median.

Numbers are means over seeds, and in brackets the lowest and the highest where they differ.

## The methods

"""
UNMEASURED = "Not measured yet; `python bench/balance.py` writes the records.\n"
ORDERINGS = """\
## What papers say, and what came of it here

Each line is decided by a rule from the records alone: *reproduced* where the relation holds for every seed,
*opposite* where its contrary does, *undecided* otherwise. A model of this size settles no question of loss:
published differences are smaller than those between seeds.

"""


def curve(study: Study) -> list[tuple[int, float]]:
    """Means over seeds by step."""
    steps = ((int(at[1]), of) for name, of in study.values.items() if (at := AT_STEP.fullmatch(name)))
    return sorted((step, statistics.fmean(of.values())) for step, of in steps)


def studies() -> dict[str, Study]:
    names = [f"{kind}-{method}" for kind in (*SCORES, *CHOICES) for method in TEXTS]
    paths = {name: RECORDS / f"balance-{name}.json" for name in names}
    return {name: Study.read(path) for name, path in paths.items() if path.exists()}


def when(study: Study) -> str:
    """Steps to balance, and how many seeds came to it where not all did."""
    reached = study.of(TIME)
    some = f", {len(reached)} of {len(study.seeds)} seeds" if 0 < len(reached) < len(study.seeds) else ""
    return f"{cell(reached)}{some}"


def beside(study: Study, base: Study | None) -> str:
    if base is None or base is study:
        return ""
    both = [study.of(BITS)[seed] - base.of(BITS)[seed] for seed in study.seeds if seed in base.seeds]
    return f"{statistics.fmean(both):+.3f}" if both else ""


HEADINGS = (
    "Method",
    "Bits per byte",
    "Beside none",
    "MaxVio batch",
    "MaxVio global",
    "Steps to 0.5",
    "Dead",
    "Dropped",
    "Spikes",
    "Peaks",
    "n",
)


def row(method: str, study: Study, base: Study | None) -> tuple[str, ...]:
    plain = (study.of(name) for name in ("dead experts", "dropped", "loss spikes", "norm peaks"))
    return (
        f"`{method}`",
        cell(study.of(BITS)),
        beside(study, base),
        cell(study.of(BATCH)),
        cell(study.of(GLOBAL)),
        when(study),
        *map(cell, plain),
        str(len(study.seeds)),
    )


def table(score: str, found: Studies) -> str:
    known = {method: found[f"{score}-{method}"] for method in TEXTS if f"{score}-{method}" in found}
    if not known:
        return UNMEASURED
    rows = markdown(HEADINGS, (row(method, study, known.get("none")) for method, study in known.items()))
    missing = ", ".join(f"`{method}`" for method in TEXTS if method not in known)
    return f"{rows}\nNot measured yet: {missing}.\n" if missing else rows


def picture_name(score: str) -> str:
    return f"balancers-{score}.svg"


def drawn(score: str, found: Studies) -> tuple[str, ...]:
    return tuple(method for method in DRAWN if f"{score}-{method}" in found)


def picture(score: str, found: Studies) -> str:
    """MaxVio over the steps as one SVG that stands alone, on light and dark pages."""
    series = tuple(
        Series(method, tuple((float(step), y) for step, y in curve(found[f"{score}-{method}"])), place)
        for place, method in enumerate(drawn(score, found))
    )
    chart = LineChart(
        f"MaxVio over the steps, {score} scores",
        "step",
        "max / mean load - 1",
        series,
        rules=(Rule(0.5, "0.5"),),
        from_zero=True,
        width=720,
        height=360,
    )
    return standalone(line_chart(chart), STYLE.read_text(encoding="utf-8"))


def section(score: str, found: Studies) -> str:
    shown = drawn(score, found)
    image = f"![MaxVio over the steps by method, {score} scores](pictures/{picture_name(score)})\n\n"
    return f"## {score.capitalize()} scores\n\n{image if shown else ''}{table(score, found)}\n"


BY_K = ("Method", "k", "Spikes", "Peaks", "Highest norm over median", "Bits per byte", "MaxVio batch", "n")


def by_k(found: Studies) -> str:
    """The study by k: a token uses k of 4 k experts whose width makes all of them cost the same."""
    text = (
        "## Spikes and peaks by k\n\nSigmoid scores; a token uses k of 4 k experts, of 128 hidden units for a"
        " token in all, so that\nk changes neither the active nor the total width.\n\n"
    )
    names = ("loss spikes", "norm peaks", "highest norm over median", BITS, BATCH)
    rows = [
        (f"`{method}`", kind[1:], *(cell(study.of(name)) for name in names), str(len(study.seeds)))
        for method in TEXTS
        for kind in CHOICES
        if (study := found.get(f"{kind}-{method}")) is not None
    ]
    return f"{text}{markdown(BY_K, rows) if rows else UNMEASURED}\n"


def claims() -> Iterable[Claim]:
    for score in SCORES:
        yield Claim(
            "without a loss loads are far from even (Shazeer 2017, table 6)",
            BATCH,
            f"{score}-importance",
            f"{score}-none",
        )
        yield Claim(
            "a bias balances better than a loss (2408.15664, table 2)",
            GLOBAL,
            f"{score}-bias",
            f"{score}-switch",
        )
        yield Claim(
            "quantile balancing needs fewer steps than a rule with a rate (Su 2026)",
            TIME,
            f"{score}-quantile",
            f"{score}-bias",
        )
        yield Claim(
            "and fewer than a clamped rule with momentum (the same)",
            TIME,
            f"{score}-quantile",
            f"{score}-smebu",
        )
        yield Claim(
            "balance by sequence costs loss that balance by batch does not (2412.19437, section 4.5.3)",
            BITS,
            f"{score}-switch",
            f"{score}-sequence",
        )
        yield Claim(
            "a bias has the lower loss (2412.19437, table 5)", BITS, f"{score}-bias", f"{score}-sequence"
        )
        yield Claim(
            "counts of the global batch lower the loss (2501.11873)",
            BITS,
            f"{score}-global",
            f"{score}-switch",
        )
    finer = "more, narrower experts lower the loss (2401.06066, figure 3)"
    yield Claim(finer, BITS, "k8-switch", "k2-switch")


def page(found: Studies) -> str:
    methods = markdown(("Name", "What it is"), ((f"`{name}`", text) for name, text in TEXTS.items()))
    verdicts = markdown(("Said", "Rule", "Here"), (claim_row(claim, found) for claim in claims()))
    return (
        "".join(
            (
                HEAD,
                methods,
                "\n",
                *(section(score, found) for score in SCORES),
                by_k(found),
                ORDERINGS,
                verdicts,
                "\n",
                source(found, "balance"),
            )
        ).rstrip()
        + "\n"
    )


def texts(found: Studies) -> dict[Path, str]:
    pictures = {
        DOCS / "pictures" / picture_name(score): picture(score, found)
        for score in SCORES
        if drawn(score, found)
    }
    return {DOCS / "balance.md": page(found), **pictures}


def main(arguments: Sequence[str]) -> int:
    return write(texts(studies()), "generate_balance", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
