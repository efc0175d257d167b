"""The half of docs/upcycling.md that is of a real pretrained model: tables, pictures and what it answers."""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paired import RECORDS, Studies, Study, cell, side_by_side

from consilium.report.lines import LineChart, Series
from consilium.report.plain import markdown

METHODS = (
    "split-random",
    "split-cluster",
    "split-inner",
    "split-inter",
    "split-graph",
    "carve",
    "virtual-group",
    "virtual-group-normalised",
)
SHARES = ("half", "quarter")
REAL_NAMES = ("dense", *(f"{name}-{share}" for name in METHODS for share in SHARES))
WHENS = ("at step 0", "after gates warmed up", "after training")
"""When the model is measured and asked."""
Answers = Mapping[str, Mapping[str, Any]]
"""By name what bench/real_upcycling.py tells beside its figures."""
AT = re.compile(r"bits per byte at (\d+) tokens")
FIRST = WHENS[0], WHENS[2]
LATE = 50_000
"""Tokens after which the right side of a picture begins."""

TEXT = """\
## A real pretrained model

SmolLM2-135M-Instruct, through every split and virtual groups, with a half and a quarter of the neurons
active. Gates train alone for 20 steps, then everything for 98 steps of 1,024 tokens on the Python manual,
Python modules and sums as conversations; `dense` is the model itself, trained on as many tokens in all.
Bits per byte of held-out text, mean over the three; on the right of a picture what comes after 50,000
tokens.

"""
AFTERWARDS = """\
*Layout* is what the trained model is saved as; *in transformers* the largest difference of a logit there,
over the largest logit, where transformers has that layout; *GGUF* whether it was exported for llama.cpp.
*Busiest*, *entropy* and *likeness* mean what they do above, at step 0 and after training.

"""
BITS = ("Method", "At step 0", "Gates warm", "After training", "n")
STATE = (
    "Method",
    "Busiest, step 0",
    "after",
    "Entropy, step 0",
    "after",
    "Likeness, step 0",
    "after",
    "Layout",
    "In transformers",
    "GGUF",
)


def read_answers(found: Studies) -> dict[str, Any]:
    paths = {name: RECORDS / "answers" / f"{name}.json" for name in found}
    return {name: _read(path) for name, path in paths.items() if path.exists()}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def real_section(found: Studies, answers: Answers) -> str:
    if not found:
        return f"{TEXT}Not measured yet; `python bench/real_upcycling.py` writes the records.\n\n"
    named = {name: found[name] for name in REAL_NAMES if name in found}
    missing = [name for name in REAL_NAMES if name not in found]
    images = "".join(
        f"![The real model, {share} active: bits per byte over tokens](pictures/{file_of(share)})\n\n"
        for share in SHARES
    )
    parts = (
        TEXT,
        images,
        markdown(BITS, map(_bits_row, named, named.values())),
        "\n",
        f"Not measured yet: {_listed(missing)}.\n\n" if missing else "",
        _compared(named),
        AFTERWARDS,
        markdown(STATE, (_state_row(name, study, answers.get(name, {})) for name, study in named.items())),
        "\n",
        "### What the models answer\n\n",
        *(_asked(name, answers[name]) for name in named if name in answers),
    )
    return "".join(parts)


def _bits_row(name: str, study: Study) -> tuple[str, ...]:
    means = _means(study)
    cells = (f"{means[when]:.4f}" if when in means else "" for when in WHENS)
    return f"`{name}`", *cells, str(len(study.seeds))


def _compared(named: Studies) -> str:
    """Whose gates alone made it worse, and who ends below the dense model."""
    means = {name: _means(study) for name, study in named.items()}
    dense = means.get("dense", {}).get(WHENS[2], -math.inf)
    worse = [name for name, at in means.items() if WHENS[1] in at and at[WHENS[1]] > at[WHENS[0]]]
    below = [name for name, at in means.items() if at.get(WHENS[2], math.inf) < dense]
    return (
        f"Worse after their gates warmed up: {_listed(worse)}.\n"
        f"Below `dense` in the end: {_listed(below)}.\n\n"
    )


def _means(study: Study) -> dict[str, float]:
    found = {when: study.of(f"bits per byte {when}") for when in WHENS}
    return {when: statistics.fmean(of.values()) for when, of in found.items() if of}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _state_row(name: str, study: Study, told: Mapping[str, Any]) -> tuple[str, ...]:
    state = (
        study.of(f"{what} {when}")
        for what in ("busiest expert", "router entropy", "expert similarity")
        for when in FIRST
    )
    error = study.of("largest error of logits in transformers")
    opened = f"{max(error.values()):.1g}" if error else escaped(told.get("transformers", ""))
    return (
        f"`{name}`",
        *(cell(of) if of else "" for of in state),
        f"`{told['layout']}`" if "layout" in told else "",
        opened,
        escaped(told.get("gguf", "")),
    )


def _asked(name: str, told: Mapping[str, Any]) -> str:
    """Every question at every time, folded."""
    rows = _answer_rows(told["answers"])
    return f"<details>\n<summary>{name}</summary>\n\n{markdown(('Question', *WHENS), rows)}\n</details>\n\n"


def _answer_rows(answers: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, ...]]:
    questions = dict.fromkeys(question for said in answers.values() for question in said)
    for question in questions:
        yield question, *(escaped(answers.get(when, {}).get(question, "")) for when in WHENS)


def escaped(text: str) -> str:
    """On one line of a table, where no mark means anything; what a model says may be any."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+|~!$-])", r"\\\1", plain)


def file_of(share: str) -> str:
    return f"upcycling-real-{share}.svg"


def curves(found: Studies) -> dict[str, str]:
    """A picture for each share of active neurons, by its file."""
    return {file_of(share): _picture(share, found) for share in SHARES} if found else {}


def _picture(share: str, found: Studies) -> str:
    """The whole run, and beside it what comes after ``LATE`` tokens."""
    names = ("dense", *(f"{name}-{share}" for name in METHODS))
    title = f"The real model, {share} of the neurons active"
    sides = [
        LineChart(title, "tokens", "bits per byte", _series(names, found, first), width=480, height=380)
        for first in (0, LATE)
    ]
    return side_by_side(sides, title)


def _series(names: Sequence[str], found: Studies, first: int) -> tuple[Series, ...]:
    return tuple(
        Series(
            name,
            tuple(point for point in _curve(found[name]) if point[0] >= first),
            place - 1,
            "line" if place else "dashed",
        )
        for place, name in enumerate(names)
        if name in found
    )


def _curve(study: Study) -> tuple[tuple[float, float], ...]:
    points = ((float(at[1]), of) for name, of in study.values.items() if (at := AT.fullmatch(name)))
    return tuple(sorted((tokens, statistics.fmean(of.values())) for tokens, of in points))
