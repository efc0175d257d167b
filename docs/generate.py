"""Fill the generated blocks of the documents from bench/records and from the planner.

A block lies between ``<!-- generated:NAME -->`` and ``<!-- end:NAME -->``. NAME is a record's name,
``promises`` for the table of promises, or a block of planned.py. Records of other kinds of processors lie in
folders of their own, and stand one after the other. ``--check`` changes nothing and fails when a block is out
of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planned import BLOCKS

from consilium.records.bench import BenchRecord, Figure
from consilium.records.io import read_json
from consilium.records.promise import Promise, Promises
from consilium.report.plain import markdown

Records = Mapping[str, Sequence[BenchRecord]]
"""By name: of the first kind of processor, then of others."""
ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "bench" / "records"
PROMISES = ROOT / "bench" / "promises.json"
BLOCK = re.compile(r"(<!-- generated:([\w.-]+) -->\n)(.*?)(<!-- end:\2 -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Words:
    """The few words a generated block needs, in one language."""

    repeated: tuple[str, ...]
    """Headings of a table in which something was measured more than once."""
    single: tuple[str, ...]
    promises: tuple[str, ...]
    source: str
    unmeasured: str
    pending: str
    figures: tuple[tuple[str, str], ...] = ()
    """Patterns of names and units, and what stands for them."""

    def named(self, text: str) -> str:
        for pattern, replacement in self.figures:
            text = re.sub(pattern, replacement, text)
        return text


ENGLISH = Words(
    repeated=("What", "Median (n = 1: only value)", "Range", "n", "Against", "Ratio"),
    single=("What", "Value", "Against", "Ratio"),
    promises=("Promise", "Test", "What was broken on purpose", "N", "Failures", "Date"),
    source="Measured {date} on {machine}: `{command}`.",
    unmeasured="Not measured yet; `make bench` writes this record.",
    pending="not run yet",
)
CHINESE = Words(
    repeated=("项目", "中位数（n = 1 时为单次值）", "范围", "n", "对比对象", "比值"),
    single=("项目", "数值", "对比对象", "比值"),
    promises=("承诺", "测试", "人为破坏", "次数", "失败", "日期"),
    source="{date} 测于 {machine}：`{command}`。",
    unmeasured="尚未测量；`make bench` 会写入这份记录。",
    pending="尚未运行",
    figures=(
        (r"^untrained$", "未训练"),
        (r"^trained$", "已训练"),
        (r"^dense twin$", "稠密对照"),
        (r"^byte trigram model$", "字节三元组模型"),
        (r"^training speed$", "训练速度"),
        (r"^training time$", "训练时间"),
        (r"^tokens$", "词元数"),
        (
            r"^layer (\d+): max/mean load, mean of the last (\d+) steps$",
            r"第 \1 层：最大/平均负载，最后 \2 步的平均",
        ),
        (r"^dead experts in the last (\d+) steps$", r"最后 \1 步的失活专家"),
        (r"^bits per byte$", "比特/字节"),
        (r"^tokens/s$", "词元/秒"),
        (r"^s$", "秒"),
    ),
)


def number(value: float) -> str:
    """Three significant digits, thousands separated, never scientific."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def figure_cells(figure: Figure, words: Words, *, repeated: bool) -> tuple[str, ...]:
    value = f"{number(figure.median)} {words.named(figure.unit)}".strip()
    spread = f"{number(figure.minimum)} to {number(figure.maximum)}" if figure.n > 1 else ""
    shares = figure.unit == "bits/byte"  # differences of a thousandth, which a ratio would hide
    form = "+.2%" if shares else ".2f"
    ratio = "" if figure.ratio is None else format(figure.ratio - shares, form)
    measured = (spread, str(figure.n)) if repeated else ()
    return words.named(figure.name), value, *measured, words.named(figure.against or ""), ratio


def records_block(records: Sequence[BenchRecord], words: Words) -> str:
    if not records:
        return f"{words.unmeasured}\n"
    return "\n".join(record_block(record, words) for record in records)


def record_block(record: BenchRecord, words: Words) -> str:
    repeated = any(figure.n > 1 for figure in record.figures)
    rows = [figure_cells(figure, words, repeated=repeated) for figure in record.figures]
    source = words.source.format(date=record.date.date(), machine=record.machine, command=record.command)
    return f"{markdown(words.repeated if repeated else words.single, rows)}\n{source}\n"


def promise_row(promise: Promise, record: BenchRecord | None, words: Words) -> tuple[str, ...]:
    tests = ", ".join(f"`{test}`" for test in promise.tests)
    broken = ", ".join(promise.broken)
    if record is None:
        return (promise.sentence, tests, broken, words.pending, "", "")
    counts = {figure.name: number(figure.median) for figure in record.figures}
    return promise.sentence, tests, broken, counts["trials"], counts["failures"], str(record.date.date())


def promises_block(records: Records, words: Words) -> str:
    known = read_json(Promises, PROMISES).promises
    rows = [promise_row(one, next(iter(records.get(one.record, ())), None), words) for one in known]
    return markdown(words.promises, rows)


def block(name: str, records: Records, words: Words) -> str:
    if name == "promises":
        return promises_block(records, words)
    if name in BLOCKS:
        return BLOCKS[name]()
    return records_block(records.get(name, ()), words)


def filled(page: Path, records: Records) -> str:
    """Text of ``page`` with every block written anew."""
    words = CHINESE if page.name.endswith(".zh.md") else ENGLISH
    text = page.read_text(encoding="utf-8")
    return BLOCK.sub(lambda hit: f"{hit[1]}{block(hit[2], records, words)}{hit[4]}", text)


def read_records() -> dict[str, list[BenchRecord]]:
    """By name, those of other processors behind; ``answers`` holds what models said, which is no record."""
    records: dict[str, list[BenchRecord]] = {}
    others = (path for path in RECORDS.glob("*/*.json") if path.parent.name != "answers")
    for path in (*sorted(RECORDS.glob("*.json")), *sorted(others)):
        record = read_json(BenchRecord, path)
        records.setdefault(record.name, []).append(record)
    return records


def main(arguments: list[str]) -> int:
    records = read_records()
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
