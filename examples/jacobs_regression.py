"""Clusters of inputs, each with a linear map of its own, and whether every cluster finds its expert.

Adaptive mixtures of local experts (Jacobs, Jordan, Nowlan, Hinton 1991) on the smallest task that has parts.
"""

from __future__ import annotations

import time

import torch
from jacobs_study import Cases, Claim, Task, arguments, median, study, table, verdicts
from torch import Tensor

CENTRES = ((3.0, 3.0), (3.0, -3.0), (-3.0, 3.0), (-3.0, -3.0))
SPREAD = 0.7
"""Standard deviation of inputs around their centre; maps and offsets have one of 2."""
NOISE = 0.1
CRITERION = 0.1
COLUMNS = {
    "busy": "over 5 %",
    "entropy": "entropy",
    "leaders": "leaders",
    "error": "error",
    "epochs": "epochs",
}


def make_task(seed: int) -> Task:
    """New maps and new cases for every seed."""
    generator = torch.Generator().manual_seed(seed)
    map_COI = 2 * torch.randn(len(CENTRES), 2, 2, generator=generator)
    offset_CO = 2 * torch.randn(len(CENTRES), 2, generator=generator)
    train, fresh = (draw(count, map_COI, offset_CO, generator) for count in (160, 400))
    return Task(train, fresh, "linear", CRITERION)


def draw(count: int, map_COI: Tensor, offset_CO: Tensor, generator: torch.Generator) -> Cases:
    label_T = torch.arange(count) % len(CENTRES)
    x_TI = torch.tensor(CENTRES)[label_T] + SPREAD * torch.randn(count, 2, generator=generator)
    clean_TO = torch.einsum("toi,ti->to", map_COI[label_T], x_TI) + offset_CO[label_T]
    return Cases(x_TI, clean_TO + NOISE * torch.randn(clean_TO.shape, generator=generator), label_T)


CLAIMS = (
    Claim(
        "under the log likelihood one expert takes a case",
        "at most 1.1 experts a case",
        lambda results: median(results, "log likelihood", "effective") <= 1.1,
    ),
    Claim(
        "under cooperation several experts share a case",
        "at least 1.5 experts a case",
        lambda results: median(results, "cooperative", "effective") >= 1.5,
    ),
    Claim(
        "the gate is surer under the log likelihood than under cooperation",
        "lower entropy",
        lambda results: (
            median(results, "log likelihood", "entropy") < median(results, "cooperative", "entropy")
        ),
    ),
    Claim(
        "under the log likelihood each cluster has an expert of its own",
        f"{len(CENTRES)} leaders",
        lambda results: median(results, "log likelihood", "leaders") == len(CENTRES),
    ),
    Claim(
        "experts weighed by the posterior learn faster than by the prior",
        "fewer epochs with the log likelihood than with competition",
        lambda results: (
            median(results, "log likelihood", "epochs") < median(results, "competitive", "epochs")
        ),
    ),
)


def main() -> None:
    chosen = arguments(__doc__, epochs=600)
    start = time.monotonic()
    results = study(make_task, chosen.experts, chosen.seeds, chosen.epochs)
    print(f"{len(CENTRES)} clusters, {chosen.experts} linear experts, medians over {chosen.seeds} seeds,")
    print(f"judged on new cases after {chosen.epochs} epochs; epochs until a squared error of {CRITERION}\n")
    print(table(results, COLUMNS))
    print()
    print(verdicts(results, CLAIMS))
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
