"""The tables of both examples of 1991 as one record: the gate and the experts of each case, by error.

usage: python bench/jacobs.py [--seeds 5] [--epochs 600] [--experts 4] [--out FILE]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from consilium.benchmarking.record import once, record
from consilium.records.bench import Figure
from consilium.records.io import write_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import jacobs_regression as regression  # noqa: E402 - the examples are scripts beside this one's folder
import jacobs_vowels as vowels  # noqa: E402
from jacobs_study import Claim, Results, median, study  # noqa: E402

FIELDS: Mapping[str, tuple[str, str]] = {
    "entropy": ("gate entropy", "nats"),
    "effective": ("experts a case", ""),
    "correct": ("right on new speakers", ""),
    "epochs": ("epochs to the criterion", ""),
}


def figures(task: str, results: Results, claims: Sequence[Claim], fields: Sequence[str]) -> Iterator[Figure]:
    """Medians over seeds; what never reached the criterion has no epochs. A claim is 1 where it holds."""
    for field in fields:
        name, unit = FIELDS[field]
        for error in results:
            value = median(results, error, field)
            if math.isfinite(value):
                yield once(f"{task}, {error}: {name}", unit, value)
    for claim in claims:
        yield once(f"{task}: {claim.text} ({claim.rule}); 1 is reproduced", "", claim.holds(results))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("seeds", 5), ("epochs", 600), ("experts", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "records" / "jacobs.json")
    chosen = parser.parse_args()
    size = chosen.experts, chosen.seeds, chosen.epochs
    clusters, spoken = study(regression.make_task, *size), study(vowels.make_task, *size)
    network = statistics.median(vowels.backpropagation(seed, chosen.epochs) for seed in range(chosen.seeds))
    found = [
        *figures("regression", clusters, regression.CLAIMS, ("entropy", "effective", "epochs")),
        *figures("vowels", spoken, vowels.claims(network), ("entropy", "effective", "correct", "epochs")),
    ]
    if math.isfinite(network):
        found.append(once("vowels, a network of 6 hidden units: epochs to the criterion", "", network))
    command = f"python bench/jacobs.py --seeds {chosen.seeds} --epochs {chosen.epochs}"
    write_json(chosen.out, record("jacobs", command, found))


if __name__ == "__main__":
    main()
