"""Write docs/upcycling.md and its pictures from bench/records/upcycle-*.json and real_upcycling-*.json.

``--check`` changes nothing and fails when a page is out of date.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from paired import DOCS, RECORDS, Studies, Study, cell, side_by_side, source, write
from upcycling_claims import LAST, START, claims, is_paired
from upcycling_real import REAL_NAMES, Answers, curves, read_answers, real_section

from consilium.report.lines import LineChart, Series
from consilium.report.plain import markdown
from consilium.report.series import Point

PANELS: Mapping[str, tuple[str, ...]] = {
    "beginnings": ("dense", "dense-small", "scratch", "scratch-long", "copy", "virtual-group"),
    "splits": (
        "dense",
        "split-random",
        "split-cluster",
        "split-inner",
        "split-inter",
        "split-graph",
        "carve",
    ),
    "random-splits": (
        "dense",
        "split-random",
        "split-random-ratio",
        "split-random-none",
        "split-random-mlp",
        "split-random-fluent",
        "split-random-dynamic",
        "split-random-sheared",
    ),
    "copies": ("dense", "copy", "copy-standardised", "copy-shared", "drop", "qwen", "expand", "btx"),
    "groups": ("dense", "virtual-group", "virtual-group-1", "virtual-group-normalised", "mla-half"),
}
"""Pictures, each of as many methods as the page has colours at most."""
NAMES = tuple(dict.fromkeys(name for names in PANELS.values() for name in names))
ABOUT: Mapping[str, str] = {
    "beginnings": "From a dense model and from nothing",
    "splits": "Splits",
    "random-splits": "Random splits by scale, gate and text",
    "copies": "Copies and branches",
    "groups": "Virtual groups and latent attention",
}
BASE = "dense"
AT_STEP = re.compile(r"bits per byte at step (\d+)")
LATE = 60
"""Step from which the right side of a picture shows how far curves are from that of the dense model."""
NEAR = 0.2
"""A curve that is ever further away is not on the right side."""
SIDE, HEIGHT = 470.0, 320.0
"""Of one side."""

HEAD = """\
# Upcycling beside each other

Written by `docs/generate_upcycle.py` from the records of `python bench/upcycle.py` and
`python bench/real_upcycling.py`. Settings are the methods' defaults; none was chosen after a result was seen.

"""
SMALL = """\
## A small model, three seeds

A dense Llama of 3.5 million parameters beside its embeddings is trained on the built-in text; then what each
method makes of it is trained for 244 steps of 2,048 tokens, about half a million. For each seed all begin
with the same dense model and read the same text in the same order. `dense` is the model itself, trained on;
`dense-small` a dense model as wide as what the splits keep active, trained as long in all; `scratch` the
sparse model of `copy` from nothing, for these steps alone, and `scratch-long` for as many as the dense model
and these together. `-fluent` reads what the fluency filter leaves of each domain, `-dynamic` domains in
shares that follow the losses, and `-sheared` in the shares at which those end, from the first step; `expand`
doubles the experts of `copy`, and `btx` takes its experts from four branches of the dense model, each
trained on one domain. `copy-shared` keeps the whole network for every token beside the copies;
`virtual-group` cuts four copies into four shards each and chooses four, `virtual-group-1` chooses two whole
copies of four. `mla-half` has no experts: keys and values become a latent of half the cache.

- *Start* and *end*: bits per byte of held-out text before and after.
- *Busiest*: tokens of the busiest expert over its share; *entropy* of the router in nats; *likeness*: mean
  cosine between experts of a layer; before and after.
- *Seconds*: what all seeds took by the clock, one thread each; *n*: the seeds.

Numbers are means over seeds, and in brackets the lowest and the highest where they differ.

"""
PICTURES = f"""\
On the left of a picture is the whole run, on the right the mean difference to `dense` from step {LATE} on,
of methods that are paired with it and within {NEAR}.

"""
LONE = """\
A dashed line is of a record whose dense models are others than those of most records, or are not named: it
is paired with none of these, and marked * in the table.

"""
LEFT_OUT = """\
Left out, since one evening on two cores holds no more: `split-cluster` by gate rows and by cosine; Nvidia's
cube root, which is exact for squared ReLU alone (this model has SwiGLU); finer groups such as E8G8T8; `btx`
with gates from prompts and with the base's rest, which need fine-tunes that prompts can tell apart; router
noise; `dense_first` and `moe_every`; latents of other ranks, which `bench/mla.py` measures without training;
a fresh share other than a half for `drop` and `qwen`.

"""
ORDERINGS = """\
## What papers say, and what came of it here

Each line is decided by a rule from the records alone. The difference is left less right, seed by seed: its
mean and the standard error of that over the seeds. *Within noise* is a difference whose sign is not that of
every seed, or whose mean is less than two standard errors from zero; otherwise what was said is *reproduced*
or *not reproduced*. Records of other dense models, or of ones they do not name, are *not paired*.

"""
UNMEASURED = "Not measured yet; `python bench/upcycle.py` writes the records.\n"
HEADINGS = (
    "Method",
    "Start",
    "End",
    "Busiest before",
    "after",
    "Entropy before",
    "after",
    "Likeness before",
    "after",
    "Seconds",
    "n",
)
SAID = ("Said", "Rule", "Difference", "n", "Here")


def studies(script: str, names: Iterable[str]) -> dict[str, Study]:
    paths = {name: RECORDS / f"{script}-{name}.json" for name in names}
    return {name: Study.read(path) for name, path in paths.items() if path.exists()}


def bits(values: Mapping[int, float]) -> str:
    """To four decimals: methods differ in the third."""
    if not values:
        return ""
    low, high = min(values.values()), max(values.values())
    spread = f" ({low:.4f} to {high:.4f})" if low != high else ""
    return f"{statistics.fmean(values.values()):.4f}{spread}"


def apart(found: Studies) -> frozenset[str]:
    """Records that are not paired with most of the others."""
    named = Counter(tuple(sorted(study.record.sources.items())) for study in found.values())
    named.pop((), None)
    if not named:
        return frozenset(found)
    usual = dict(named.most_common(1)[0][0])
    reference = next(study for study in found.values() if study.record.sources == usual)
    return frozenset(name for name, study in found.items() if not is_paired(study, reference))


def row(name: str, study: Study, mark: str) -> tuple[str, ...]:
    pairs = (
        f"{what}, {when}"
        for what in ("busiest expert", "router entropy", "expert similarity")
        for when in ("before", "after")
    )
    values = (study.of(figure) for figure in pairs)
    seconds = study.of("seconds")
    return (
        f"`{name}`{mark}",
        bits(study.of(START)),
        bits(study.of(LAST)),
        *(cell(v) if v else "" for v in values),
        f"{sum(seconds.values()):,.0f}" if seconds else "",
        str(len(study.seeds)),
    )


def table(found: Studies) -> str:
    if not found:
        return UNMEASURED
    lone = apart(found)
    shown = (row(name, found[name], " *" if name in lone else "") for name in NAMES if name in found)
    missing = ", ".join(f"`{name}`" for name in NAMES if name not in found)
    rest = f"Not measured yet: {missing}.\n" if missing else ""
    return f"{markdown(HEADINGS, shown)}\n{rest}{time_taken(found)}\n"


def time_taken(found: Studies) -> str:
    """In all, of the records that say it."""
    known = [study for study in found.values() if study.of("seconds")]
    if not known:
        return ""
    clock, processor = (
        sum(sum(study.of(name).values()) for study in known) / 3600
        for name in ("seconds", "processor seconds")
    )
    return (
        f"{len(known)} of {len(found)} records say what they took: {clock:.1f} hours by the clock and"
        f" {processor:.1f} of a processor in all, one thread each, several beside each other.\n"
    )


def curve(study: Study) -> tuple[Point, ...]:
    steps = ((float(at[1]), of) for name, of in study.values.items() if (at := AT_STEP.fullmatch(name)))
    return tuple(sorted((step, statistics.fmean(of.values())) for step, of in steps))


def late(study: Study, base: Study) -> tuple[Point, ...]:
    """The mean difference to ``base``; nothing where that is ever large or runs are not paired."""
    if not is_paired(study, base):
        return ()
    theirs = dict(curve(base))
    found = tuple(
        (step, bits - theirs[step]) for step, bits in curve(study) if step >= LATE and step in theirs
    )
    return found if all(abs(d) <= NEAR for _, d in found) else ()


def file_of(panel: str) -> str:
    return f"upcycling-{panel}.svg"


def panel(name: str, found: Studies, lone: frozenset[str]) -> str:
    """Held-out bits per byte over the steps, and in the end beside those of the dense model."""
    whole = {method: curve(found[method]) for method in PANELS[name] if method in found}
    base = found.get(BASE)
    ends = {method: late(found[method], base) for method in whole} if base is not None else {}
    sides = (
        _chart(name, whole, lone, "bits per byte"),
        _chart(name, ends, lone, f"less that of {BASE}"),
    )
    return side_by_side(sides, ABOUT[name])


def _chart(name: str, drawn: Mapping[str, tuple[Point, ...]], lone: frozenset[str], of: str) -> LineChart:
    series = tuple(
        Series(method, drawn[method], place, "dashed" if method in lone else "line")
        for place, method in enumerate(PANELS[name])
        if method in drawn
    )
    return LineChart(ABOUT[name], "step", of, series, width=SIDE, height=HEIGHT)


def pictures(found: Studies) -> str:
    shown = "".join(
        f"![{ABOUT[name]}: held-out bits per byte over the steps](pictures/{file_of(name)})\n\n"
        for name in PANELS
        if any(method in found for method in PANELS[name])
    )
    return f"{PICTURES}{LONE if apart(found) else ''}{shown}" if shown else ""


def page(small: Studies, real: Studies, answers: Answers) -> str:
    verdicts = markdown(SAID, (claim.row(small) for claim in claims()))
    parts = (
        HEAD,
        SMALL,
        pictures(small),
        table(small),
        LEFT_OUT,
        ORDERINGS,
        verdicts,
        "\n",
        real_section(real, answers),
        source(small, "upcycle"),
        source(real, "real_upcycling"),
    )
    return "".join(parts).rstrip() + "\n"


def texts(small: Studies, real: Studies, answers: Answers) -> dict[Path, str]:
    lone = apart(small)
    drawn = {
        file_of(name): panel(name, small, lone)
        for name in PANELS
        if any(method in small for method in PANELS[name])
    }
    drawn |= curves(real)
    written = {DOCS / "pictures" / file: text for file, text in drawn.items()}
    return {DOCS / "upcycling.md": page(small, real, answers), **written}


def main(arguments: Sequence[str]) -> int:
    real = studies("real_upcycling", REAL_NAMES)
    found = texts(studies("upcycle", NAMES), real, read_answers(real))
    return write(found, "generate_upcycle", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
