"""Write docs/conformance.md and its picture: what proves the routers, and what the known mistakes do.

``--check`` changes nothing and fails when a page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from mistakes import INPUTS, MEANS, MISTAKES, TOKENS, V3, Effect, Leak, zero_masks

from consilium.conformance.suite import TOLERANCE, Vectors, shipped
from consilium.report.bars import Bar, bar_chart
from consilium.report.plain import markdown
from consilium.report.svg import standalone

DOCS = Path(__file__).parent
STYLE = DOCS.parent / "src" / "consilium" / "report" / "templates" / "report.css"

HEAD = f"""\
# Conformance of routers

Every published router ships with golden vectors: inputs, and what must come of them. This command runs them
all on the installed package, in seconds and without any other library:

```sh
consilium doctor --routers
```

Experts must be the same in the same order; ties go to the lower number. Weights may differ by
{TOLERANCE:.6f}, relative to weights above 1. What a capacity turns away, loads and losses are compared as
well. A file of vectors names a recipe and gives it small sizes, never a rule, so that it is the recipe
itself that is tested.

Each system has ordinary logits, ties, uniform and one-hot logits, padding, fewer tokens than experts, one
token, every expert at once, a gate that is no identity, and selection biases around 2 and -2 (a bias to
ignore where there is none). Systems with a capacity have crowded batches too.

## Where the expectations come from

Nothing here was made by the package. Where transformers has the router, it is asked; plain loops over
Python numbers must agree with it and give what it lacks, such as losses. Other systems have a case of six
tokens worked by hand, with the arithmetic in `tests/conformance/by_hand.py`. transformers leaves the order
of ties open, so there its weights are compared and its expert numbers are not, nor anything where groups
tie. `tests/conformance/generate.py` writes the vectors, and a test makes them anew and compares. Another
asks the independent single-file reference of each system (`tests/reference`) for every vector once more:
experts, weights, drops and losses.

"""

MISTAKES_TEXT = f"""\

## What the known mistakes do

The rule of groups, the mask, the bias in the weight and the gate in bfloat16 have all been wrong in
releases of well-known libraries. {TOKENS:,} random tokens, standard normal logits from a gate of {INPUTS}
inputs, the published numbers of experts and groups, no selection bias unless the row is about it (then
spread by a tenth). *Other experts* is the share of tokens whose set of experts changes; *weight* is the
largest change of a weight. Trained weights differ from random ones; the shares say how much a rule matters,
not what a certain model would lose.

"""

LEAK_TEXT = """\

![share of tokens that use other experts, by mistake](pictures/conformance.svg)

A mistake without a bar moves no expert and is harder to see: the model still writes text.

## A mask of 0.0 in place of -inf

DeepSeek-V3 closes groups of experts. Where closed experts get 0.0 instead of -inf they lose as long as
scores plus bias are positive, and win as soon as these are negative. The share of tokens that use an expert
of a closed group, by the mean of the selection biases:

"""

TAIL = """\

The tests in `tests/conformance` make these mistakes on purpose, one at a time, and see the vectors fail.
"""


def source(vectors: Vectors) -> str:
    """The router of transformers that was asked, or the case by hand."""
    for case in vectors.cases:
        if case.origin.startswith("transformers"):
            return f"`{case.origin.partition(', ')[2].partition(';')[0]}` of transformers"
    return "six tokens by hand, plain loops"


def system_row(vectors: Vectors) -> tuple[str, ...]:
    choices = sum(len(row) for case in vectors.cases for row in case.experts_TK)
    config = vectors.moe(vectors.cases[0])
    return (vectors.model, str(config.experts), str(len(vectors.cases)), str(choices), source(vectors))


def effect_row(effect: Effect) -> tuple[str, ...]:
    sets = f"{effect.sets:.1%}" if effect.sets else "none"
    return (effect.model, effect.mistake, sets, f"{effect.weight:.2f}")


def leak_row(leak: Leak) -> tuple[str, ...]:
    return (f"{leak.mean:g}", f"{leak.share:.0%}")


def page(effects: Sequence[Effect], leaks: Iterable[Leak]) -> str:
    return "".join(
        (
            HEAD,
            markdown(("System", "Experts", "Cases", "Choices", "Source"), map(system_row, shipped())),
            MISTAKES_TEXT,
            markdown(("System", "Mistake", "Other experts", "Weight"), map(effect_row, effects)),
            LEAK_TEXT,
            markdown(("Mean bias", "Tokens with a closed expert"), map(leak_row, leaks)),
            TAIL,
        )
    )


def picture(effects: Sequence[Effect]) -> str:
    """Bars in percent as one SVG that stands alone."""
    moved = [effect for effect in effects if effect.sets]
    bars = [
        Bar(f"{model.partition(':')[0]}: {effect.mistake}", 100 * effect.sets)
        for model, group in groupby(moved, key=lambda effect: effect.model)
        for effect in group
    ]
    title, unit = "tokens that use other experts, in percent", "of tokens"
    drawn = bar_chart(title, unit, tuple(bars), width=720, shown_as="{:.1f} %")
    return standalone(drawn, STYLE.read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    effects = [mistake() for mistake in MISTAKES]
    texts = {
        DOCS / "conformance.md": page(effects, zero_masks(V3, MEANS)),
        DOCS / "pictures" / "conformance.svg": picture(effects),
    }
    stale = {
        path: text for path, text in texts.items() if not path.exists() or path.read_text("utf-8") != text
    }
    if "--check" in arguments:
        for path in stale:
            print(f"docs/{path.relative_to(DOCS)} is out of date; run python docs/generate_conformance.py")
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote docs/{path.relative_to(DOCS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
