"""How well the built-in filters tell apart what they were not trained on.

``python bench/filters.py --out bench/records/filters.json``: precision and recall of what is dropped, on
examples of templates, words and passages that training never saw, and how many passages of Python's language
reference, which are neither advertisements nor spoiled, are dropped by mistake.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from consilium.benchmarking.record import once, record
from consilium.data.examples import examples, passages
from consilium.data.filters import classifier
from consilium.records.bench import Figure
from consilium.records.io import to_json, write_json

KINDS = ("advertisement", "fluency")
EXAMPLES = 4000
THRESHOLD = 0.5


def judged(kind: str, count: int = EXAMPLES) -> tuple[float, float]:
    """Precision and recall of what ``kind`` drops among unseen examples, half of which are bad."""
    of = classifier(kind)
    found = [(of.score(text) < THRESHOLD, good) for text, good in examples(kind, count, seen=False, seed=1)]
    right = sum(dropped and not good for dropped, good in found)
    return right / max(sum(dropped for dropped, _ in found), 1), right / sum(not good for _, good in found)


def mistaken(kind: str) -> float:
    """Share of good passages that are dropped."""
    of, unseen = classifier(kind), passages(1)
    return sum(of.score(text) < THRESHOLD for text in unseen) / max(len(unseen), 1)


def figures() -> Iterator[Figure]:
    for kind in KINDS:
        precision, recall = judged(kind)
        yield once(f"{kind}: precision of what is dropped", "share", precision)
        yield once(f"{kind}: recall of what is to be dropped", "share", recall)
        yield once(f"{kind}: passages of a reference manual dropped by mistake", "share", mistaken(kind))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    command = f"python bench/filters.py{'' if options.out is None else f' --out {options.out}'}"
    found = record("filters", command, list(figures()))
    print(to_json(found))
    if options.out is not None:
        write_json(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
