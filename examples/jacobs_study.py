"""What both examples share: a mixture trained under each of the three errors of 1991, and how it came out.

Legend: T cases, I inputs, O outputs, E experts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from consilium.moe.adaptive_mixture import (
    AdaptiveMixture,
    Unit,
    competitive_error,
    cooperative_error,
    log_likelihood_error,
)
from consilium.moe.types import LayerMode, Tokens

Error = Callable[[Tensor, Tensor, Tensor], Tensor]
ERRORS: Mapping[str, Error] = {
    "cooperative": cooperative_error,
    "competitive": competitive_error,
    "log likelihood": log_likelihood_error,
}
STEP = 0.05
"""Of Adam over all cases at once, the same for every error: it does not see that they differ in scale."""
BUSY = 0.05
"""Probability from which an expert counts as taking part in a case."""


@dataclass(frozen=True, slots=True)
class Cases:
    x_TI: Tensor
    target_TO: Tensor
    label_T: Tensor
    """int64: the cluster or the class of each case, which the mixture never sees."""

    @property
    def tokens(self) -> Tokens:
        """Each case as a token of one sequence."""
        number_T = torch.arange(len(self.x_TI))
        return Tokens(number_T, torch.zeros_like(number_T), number_T, torch.ones_like(number_T).bool())


@dataclass(frozen=True, slots=True)
class Task:
    train: Cases
    fresh: Cases
    """Cases of the same kind, kept for the end."""
    unit: Unit
    criterion: float
    """Mean squared error an output of the blend, over training cases, at which the task counts as learnt."""


@dataclass(frozen=True, slots=True)
class Result:
    """One training, judged on fresh cases."""

    entropy: float
    """Of the gate, in nats, mean over cases."""
    effective: float
    """Experts a case: exp of that case's entropy, mean over cases."""
    busy: float
    """Experts above ``BUSY`` a case."""
    leaders: int
    """Different experts among those that lead most cases of a cluster or class."""
    error: float
    """Mean squared error an output of the blend."""
    correct: float
    """Share of cases whose largest output is that of their label."""
    epochs: float
    """Epochs until the criterion; infinite where it was not reached."""


Results = Mapping[str, Sequence[Result]]


@dataclass(frozen=True, slots=True)
class Claim:
    """What the paper says, and the rule that decides on it, fixed before any run."""

    text: str
    rule: str
    holds: Callable[[Results], bool]


def train(task: Task, error: Error, experts: int, seed: int, epochs: int) -> Result:
    """Train a fresh mixture for ``epochs`` passes over all cases."""
    inputs, outputs = task.train.x_TI.shape[1], task.train.target_TO.shape[1]
    mixture = AdaptiveMixture(inputs, outputs, experts, unit=task.unit, seed=seed)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=STEP)
    tokens, learnt = task.train.tokens, math.inf
    for epoch in range(epochs):
        said = mixture(task.train.x_TI, tokens, LayerMode(training=True))
        if learnt == math.inf and squared_error(said.blend_TO, task.train) <= task.criterion:
            learnt = epoch
        optimizer.zero_grad()
        error(said.routing.logits_TE, said.output_TEO, task.train.target_TO).backward()
        optimizer.step()
    return judge(mixture, task.fresh, learnt)


@torch.no_grad()
def judge(mixture: AdaptiveMixture, cases: Cases, epochs: float) -> Result:
    said = mixture(cases.x_TI, cases.tokens, LayerMode())
    gate_TE = said.routing.scores_TE
    entropy_T = torch.special.entr(gate_TE).sum(dim=1)
    leader_T = gate_TE.argmax(dim=1)
    labels = cases.label_T.unique().tolist()
    return Result(
        entropy=float(entropy_T.mean()),
        effective=float(entropy_T.exp().mean()),
        busy=float((gate_TE > BUSY).sum(dim=1).float().mean()),
        leaders=len({int(leader_T[cases.label_T == label].mode().values) for label in labels}),
        error=squared_error(said.blend_TO, cases),
        correct=float((said.blend_TO.argmax(dim=1) == cases.label_T).float().mean()),
        epochs=epochs,
    )


def squared_error(blend_TO: Tensor, cases: Cases) -> float:
    return float((blend_TO.detach() - cases.target_TO).square().mean())


def study(make: Callable[[int], Task], experts: int, seeds: int, epochs: int) -> Results:
    """Train with every error on the same tasks from the same start; progress goes to standard error."""
    results: dict[str, list[Result]] = {name: [] for name in ERRORS}
    for seed in range(seeds):
        task = make(seed)
        for name, error in ERRORS.items():
            print(f"seed {seed + 1} of {seeds}: {name}", file=sys.stderr, flush=True)
            results[name].append(train(task, error, experts, seed, epochs))
    return results


def median(results: Results, error: str, field: str) -> float:
    """Over seeds."""
    return statistics.median(asdict(result)[field] for result in results[error])


def table(results: Results, columns: Mapping[str, str]) -> str:
    """Medians over seeds. ``columns`` are fields and their headings; a bar shows the experts a case."""
    lines = [f"{'error':<16}{'experts a case':<26}" + "".join(f"{text:>10}" for text in columns.values())]
    for name in results:
        effective = median(results, name, "effective")
        values = "".join(f"{shown(median(results, name, field)):>10}" for field in columns)
        lines.append(f"{name:<16}{effective:<6.2f}{'#' * round(5 * effective):<20}{values}")
    return "\n".join(lines)


def shown(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def verdicts(results: Results, claims: Sequence[Claim]) -> str:
    lines = ["What is claimed, and the rule that decides:"]
    for claim in claims:
        word = "reproduced" if claim.holds(results) else "not reproduced"
        lines.append(f"  {word:<16}{claim.text} ({claim.rule})")
    return "\n".join(lines)


def arguments(description: str | None, *, epochs: int) -> argparse.Namespace:
    """--seeds, --epochs and --experts from the command line."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in (("seeds", 5), ("epochs", epochs), ("experts", 4)):
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"default {default}")
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
