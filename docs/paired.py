"""Records of runs with paired seeds, what papers say of them, and the page that says what came of it.

What docs/generate_balance.py and docs/generate_upcycle.py share.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from consilium.records.bench import BenchRecord
from consilium.records.io import read_json
from consilium.report.lines import LineChart, line_chart
from consilium.report.svg import picture, standalone

DOCS = Path(__file__).parent
RECORDS = DOCS.parent / "bench" / "records"
STYLE = DOCS.parent / "src" / "consilium" / "report" / "templates" / "report.css"
FIGURE = re.compile(r"(?P<name>.+), seed (?P<seed>\d+)")


@dataclass(frozen=True, slots=True)
class Study:
    """One record: each figure's value by seed. What never happened has no value."""

    values: Mapping[str, Mapping[int, float]]
    record: BenchRecord

    @staticmethod
    def read(path: Path) -> Study:
        record = read_json(BenchRecord, path)
        values: dict[str, dict[int, float]] = {}
        for figure in record.figures:
            found = FIGURE.fullmatch(figure.name)
            assert found is not None, f"{path.name}: {figure.name!r} is of no seed"
            values.setdefault(found["name"], {})[int(found["seed"])] = figure.median
        return Study(values, record)

    def of(self, name: str) -> Mapping[int, float]:
        return self.values.get(name, {})

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({seed for of in self.values.values() for seed in of}))


Studies = Mapping[str, Study]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def cell(values: Mapping[int, float]) -> str:
    if not values:
        return "never"
    low, high = min(values.values()), max(values.values())
    spread = f" ({number(low)} to {number(high)})" if low != high else ""
    return f"{number(statistics.fmean(values.values()))}{spread}"


@dataclass(frozen=True, slots=True)
class Claim:
    """``left`` is below ``right`` in ``figure``; what never happened is later than everything.

    With ``beside``, ``right`` has it in that figure.
    """

    text: str
    figure: str
    left: str
    right: str
    beside: str | None = None

    def verdict(self, found: Studies) -> str:
        if self.left not in found or self.right not in found:
            return "not measured"
        left, right = found[self.left], found[self.right]
        seeds = [seed for seed in left.seeds if seed in right.seeds]
        never, other = float("inf"), self.beside or self.figure
        pairs = [(left.of(self.figure).get(seed, never), right.of(other).get(seed, never)) for seed in seeds]
        holds: Sequence[Callable[[float, float], bool]] = (lambda a, b: a < b, lambda a, b: a > b)
        for name, relation in zip(("reproduced", "opposite"), holds, strict=True):
            if pairs and all(relation(a, b) for a, b in pairs):
                return f"{name}, {len(pairs)} of {len(pairs)} seeds"
        return f"undecided, {sum(a < b for a, b in pairs)} of {len(pairs)} seeds"


def claim_row(claim: Claim, found: Studies) -> tuple[str, ...]:
    beside = "" if claim.beside is None else f", {claim.beside}"
    rule = f"{claim.figure}: `{claim.left}` < `{claim.right}`{beside}"
    return claim.text, rule, claim.verdict(found)


def source(found: Studies, script: str) -> str:
    """Which machines and settings the records are of."""
    settings = sorted(
        {
            (study.record.machine, study.record.command.partition(" --")[2], str(study.record.date.date()))
            for study in found.values()
        }
    )
    return "".join(
        f"Measured {date} on {machine}: `python bench/{script}.py --{command}`.\n"
        for machine, command, date in settings
    )


def side_by_side(charts: Sequence[LineChart], label: str) -> str:
    """Charts of one size as one SVG that stands alone, on light and dark pages."""
    parts: list[str] = []
    at = 0.0
    for chart in charts:
        inside = line_chart(chart).partition(">")[2].removesuffix("</svg>")
        parts.append(f'<g transform="translate({at:g} 0)">{inside}</g>')
        at += chart.width
    return standalone(picture(at, charts[0].height, label, parts), STYLE.read_text(encoding="utf-8"))


def write(texts: Mapping[Path, str], script: str, arguments: Sequence[str]) -> int:
    """Write the pages that changed; with ``--check`` name them, and return 1 where there are any."""
    written = texts.items()
    stale = {path: text for path, text in written if not path.exists() or path.read_text("utf-8") != text}
    if "--check" in arguments:
        for path in stale:
            print(f"docs/{path.relative_to(DOCS)} is out of date; run python docs/{script}.py")
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote docs/{path.relative_to(DOCS)}")
    return 0
