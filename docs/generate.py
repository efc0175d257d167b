"""Fill the generated blocks of the documents from bench/records/*.json.

A block lies between ``<!-- generated:NAME -->`` and ``<!-- end:NAME -->``. NAME is a record's name, or
``promises`` for the table of promises. ``--check`` changes nothing and fails when a block is out of date.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from consilium.records.bench import BenchRecord, Figure
from consilium.records.io import read_json

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "bench" / "records"
BLOCK = re.compile(r"(<!-- generated:([\w-]+) -->\n)(.*?)(<!-- end:\2 -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Words:
    """The few words a generated block needs, in one language."""

    columns: tuple[str, ...]
    promises: tuple[str, ...]
    source: str
    unmeasured: str
    pending: str


ENGLISH = Words(
    columns=("What", "Median", "Range", "n", "Against", "Ratio"),
    promises=("Promise", "Test", "N", "Failures", "Date"),
    source="Measured {date} on {machine}: `{command}`.",
    unmeasured="Not measured yet; `make bench` writes this record.",
    pending="not run yet",
)
CHINESE = Words(
    columns=("项目", "中位数", "范围", "n", "对比对象", "比值"),
    promises=("承诺", "测试", "次数", "失败", "日期"),
    source="{date} 测于 {machine}：`{command}`。",
    unmeasured="尚未测量；`make bench` 会写入这份记录。",
    pending="尚未运行",
)


@dataclass(frozen=True, slots=True)
class Promise:
    """What we say, the test that would show it false, and the record of its large-count run."""

    sentence: str
    test: str
    record: str


PROMISES = (
    Promise("One routing rule: every system equals its naive reference", "tests/moe", "promise-routing"),
    Promise("One contract: cached, absorbed and batched passes agree", "tests/model", "promise-contract"),
    Promise("Greedy output does not depend on the batch", "tests/engine", "promise-greedy"),
    Promise("Padding, evaluation and recomputation never count as load", "tests/moe", "promise-load"),
    Promise("A killed run resumes to the same weights, bit for bit", "tests/training", "promise-resume"),
    Promise(
        "A truncated or damaged checkpoint is refused, never loaded", "tests/checkpoint", "promise-checkpoint"
    ),
    Promise("Bad input gives one sentence and exit code 2", "tests/cli", "promise-input"),
)


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def number(value: float) -> str:
    """Three significant digits, thousands separated, never scientific."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def figure_row(figure: Figure) -> tuple[str, ...]:
    spread = f"{number(figure.minimum)} to {number(figure.maximum)}" if figure.n > 1 else ""
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    median = f"{number(figure.median)} {figure.unit}".strip()
    return (figure.name, median, spread, str(figure.n), figure.against or "", ratio)


def record_block(record: BenchRecord | None, words: Words) -> str:
    if record is None:
        return f"{words.unmeasured}\n"
    source = words.source.format(date=record.date.date(), machine=record.machine, command=record.command)
    return f"{table(words.columns, [figure_row(figure) for figure in record.figures])}\n{source}\n"


def promise_row(promise: Promise, record: BenchRecord | None, words: Words) -> tuple[str, ...]:
    test = f"`{promise.test}`"
    if record is None:
        return (promise.sentence, test, words.pending, "", "")
    counts = {figure.name: figure.median for figure in record.figures}
    return (
        promise.sentence,
        test,
        number(counts["trials"]),
        number(counts["failures"]),
        str(record.date.date()),
    )


def block(name: str, records: dict[str, BenchRecord], words: Words) -> str:
    if name == "promises":
        rows = [promise_row(promise, records.get(promise.record), words) for promise in PROMISES]
        return table(words.promises, rows)
    return record_block(records.get(name), words)


def filled(page: Path, records: dict[str, BenchRecord]) -> str:
    """Text of ``page`` with every block written anew."""
    words = CHINESE if page.name.endswith(".zh.md") else ENGLISH
    text = page.read_text(encoding="utf-8")
    return BLOCK.sub(lambda hit: f"{hit[1]}{block(hit[2], records, words)}{hit[4]}", text)


def main(arguments: list[str]) -> int:
    found = [read_json(BenchRecord, path) for path in sorted(RECORDS.glob("*.json"))]
    records = {record.name: record for record in found}
    pages = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
    stale = {
        page: text for page in pages if (text := filled(page, records)) != page.read_text(encoding="utf-8")
    }
    if "--check" in arguments:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is out of date; run python docs/generate.py")
        return 1 if stale else 0
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
