"""Write docs/upcycling.md and its picture from bench/records/upcycle-*.json and real_upcycling-*.json.

``--check`` changes nothing and fails when a page is out of date.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from paired import DOCS, RECORDS, STYLE, Claim, Studies, Study, cell, claim_row, source, write

from consilium.report.lines import LineChart, Series, line_chart
from consilium.report.plain import markdown
from consilium.report.svg import standalone

NAMES = (
    "dense",
    "dense-small",
    "scratch",
    "scratch-long",
    "split-random",
    "split-random-ratio",
    "split-random-none",
    "split-random-mlp",
    "split-random-fluent",
    "split-random-dynamic",
    "split-random-sheared",
    "split-cluster",
    "split-inner",
    "split-inter",
    "split-graph",
    "carve",
    "copy",
    "copy-standardised",
    "virtual-group",
    "virtual-group-normalised",
    "qwen",
    "drop",
    "expand",
    "btx",
)
REAL = (
    "split-random",
    "split-cluster",
    "split-inner",
    "split-inter",
    "split-graph",
    "carve",
    "virtual-group",
)
DRAWN = ("dense", "dense-small", "scratch", "split-random", "carve", "copy", "virtual-group", "drop")
"""As many as the page has colours."""
AT_STEP = re.compile(r"bits per byte at step (\d+)")
START, LAST = "bits per byte at step 0", "bits per byte at step 244"

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
trained on one domain.

- *Start* and *end*: bits per byte of held-out text before and after.
- *Busiest*: tokens of the busiest expert over its share; *entropy* of the router in nats; *likeness*: mean
  cosine between experts of a layer; before and after.

Numbers are means over seeds, and in brackets the lowest and the highest where they differ.

"""
PRETRAINED = """\
## A real pretrained model

SmolLM2-135M-Instruct, through every split and virtual groups, with a half and a quarter of the neurons
active. Gates train alone for 20 steps, then everything for 98 steps of 1,024 tokens on the Python manual,
Python modules and sums as conversations. Bits per byte, mean over the three.

"""
ORDERINGS = """\
## What papers say, and what came of it here

Each line is decided by a rule from the records alone: *reproduced* where the relation holds for every seed,
*opposite* where its contrary does, *undecided* otherwise.

"""
UNMEASURED = "Not measured yet; `python bench/{script}.py` writes the records.\n"
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
    "n",
)


def studies(script: str, names: Iterable[str]) -> dict[str, Study]:
    paths = {name: RECORDS / f"{script}-{name}.json" for name in names}
    return {name: Study.read(path) for name, path in paths.items() if path.exists()}


def row(name: str, study: Study) -> tuple[str, ...]:
    pairs = (
        f"{what}, {when}"
        for what in ("busiest expert", "router entropy", "expert similarity")
        for when in ("before", "after")
    )
    values = (study.of(figure) for figure in pairs)
    ends = (cell(study.of(START)), cell(study.of(LAST)))
    return (f"`{name}`", *ends, *(cell(v) if v else "" for v in values), str(len(study.seeds)))


def table(found: Studies) -> str:
    if not found:
        return UNMEASURED.format(script="upcycle")
    rows = markdown(HEADINGS, (row(name, found[name]) for name in NAMES if name in found))
    missing = ", ".join(f"`{name}`" for name in NAMES if name not in found)
    return f"{rows}\nNot measured yet: {missing}.\n" if missing else rows


def curve(study: Study) -> tuple[tuple[float, float], ...]:
    steps = ((float(at[1]), of) for name, of in study.values.items() if (at := AT_STEP.fullmatch(name)))
    return tuple(sorted((step, statistics.fmean(of.values())) for step, of in steps))


def picture(found: Studies) -> str:
    """Held-out bits per byte over the steps, as one SVG that stands alone, on light and dark pages."""
    drawn = [name for name in DRAWN if name in found]
    series = tuple(Series(name, curve(found[name]), place) for place, name in enumerate(drawn))
    chart = LineChart(
        "Held-out bits per byte over the steps", "step", "bits per byte", series, width=720, height=360
    )
    return standalone(line_chart(chart), STYLE.read_text(encoding="utf-8"))


def real_rows(found: Studies) -> Iterator[tuple[str, ...]]:
    whens = ("at step 0", "after gates warmed up", "after training")
    for name, study in found.items():
        bits = (study.of(f"bits per byte {when}") for when in whens)
        yield (f"`{name}`", *(cell(values) if values else "" for values in bits), answer(name))


def answer(name: str) -> str:
    """What it says of the capital of France in the end."""
    path = RECORDS / "answers" / f"{name}.json"
    if not path.exists():
        return ""
    said = json.loads(path.read_text(encoding="utf-8"))["after training"]
    return " ".join(next(iter(said.values())).split()).replace("|", "\\|")[:80]


def real_names() -> tuple[str, ...]:
    return ("dense", *(f"{name}-{share}" for name in REAL for share in ("half", "quarter")))


def real_table(found: Studies) -> str:
    if not found:
        return UNMEASURED.format(script="real_upcycling")
    head = ("Method", "At step 0", "Gates warm", "After training", "The capital of France, after")
    missing = ", ".join(f"`{name}`" for name in real_names() if name not in found)
    rows = markdown(head, real_rows(found))
    return f"{rows}\nNot measured yet: {missing}.\n" if missing else rows


def claims() -> Iterable[Claim]:
    for other in ("split-cluster", "split-inner", "split-inter", "split-graph"):
        yield Claim(
            f"a random split is no worse than {other} after training (LLaMA-MoE)", LAST, "split-random", other
        )
    yield Claim(
        "a scaled output is much better at the start (LLaMA-MoE)",
        START,
        "split-random-ratio",
        "split-random-none",
    )
    yield Claim("the same, scaled by k as here", START, "split-random", "split-random-none")
    yield Claim(
        "a filter for fluency helps (LLaMA-MoE)",
        LAST,
        "split-random-fluent",
        "split-random",
    )
    yield Claim(
        "static shares that dynamic ones end at are better than shares by size (LLaMA-MoE)",
        LAST,
        "split-random-sheared",
        "split-random",
    )
    yield Claim(
        "and better than the dynamic ones (LLaMA-MoE)",
        LAST,
        "split-random-sheared",
        "split-random-dynamic",
    )
    yield Claim(
        "virtual groups start at the dense loss, others above (2410.07524)",
        START,
        "virtual-group",
        "split-random",
    )
    yield Claim(
        "softmax-then-top-k is better than top-k-then-softmax (2410.07524)",
        LAST,
        "virtual-group",
        "virtual-group-normalised",
    )
    yield Claim("upcycled beats continued dense training (2410.07524)", LAST, "virtual-group", "dense")
    yield Claim("the same of copies (2212.05055)", LAST, "copy", "dense")
    yield Claim("the same of copies in part anew (2502.19261)", LAST, "drop", "dense")
    yield Claim("a part anew is better than plain copies in the end (2502.19261)", LAST, "drop", "copy")
    yield Claim(
        "upcycled beats a sparse model from nothing on as little text (2406.06563)", LAST, "copy", "scratch"
    )
    yield Claim("a split beats a dense model as wide as its active part", LAST, "split-random", "dense-small")
    yield Claim("standardised logits lower the loss (2406.06563)", LAST, "copy-standardised", "copy")
    yield Claim(
        "experts grow apart in training (2406.06563)",
        "expert similarity, after",
        "copy",
        "copy",
        "expert similarity, before",
    )


def page(small: Studies, real: Studies) -> str:
    verdicts = markdown(("Said", "Rule", "Here"), (claim_row(claim, small) for claim in claims()))
    image = "![Held-out bits per byte over the steps by method](pictures/upcycling.svg)\n\n" if small else ""
    parts = (
        HEAD,
        SMALL,
        image,
        table(small),
        "\n",
        PRETRAINED,
        real_table(real),
        "\n",
        ORDERINGS,
        verdicts,
        "\n",
    )
    return ("".join(parts) + source(small, "upcycle") + source(real, "real_upcycling")).rstrip() + "\n"


def texts(small: Studies, real: Studies) -> dict[Path, str]:
    pictures = {DOCS / "pictures" / "upcycling.svg": picture(small)} if small else {}
    return {DOCS / "upcycling.md": page(small, real), **pictures}


def main(arguments: Sequence[str]) -> int:
    found = texts(studies("upcycle", NAMES), studies("real_upcycling", real_names()))
    return write(found, "generate_upcycle", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
