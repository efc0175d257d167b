"""What papers say of upcycling, and what the records of bench/upcycle.py say of that.

A difference is taken seed by seed, of runs that begin with the same dense model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from paired import Studies, Study

START, LAST = "bits per byte at step 0", "bits per byte at step 244"
BEFORE, AFTER = "expert similarity, before", "expert similarity, after"
LIKELY = 2
"""Standard errors that a mean difference must be away from zero to count."""


@dataclass(frozen=True, slots=True)
class Difference:
    """``by_seed`` is left less right."""

    by_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed)

    @property
    def error(self) -> float:
        """The standard error of the mean; of one seed nothing is known."""
        count = len(self.by_seed)
        return statistics.stdev(self.by_seed) / math.sqrt(count) if count > 1 else math.inf

    @property
    def is_noise(self) -> bool:
        agree = all(d < 0 for d in self.by_seed) or all(d > 0 for d in self.by_seed)
        return not agree or abs(self.mean) < LIKELY * self.error

    def __str__(self) -> str:
        spread = f" ± {self.error:.4f}" if math.isfinite(self.error) else ""
        return f"{self.mean:+.4f}{spread}"


@dataclass(frozen=True, slots=True)
class Said:
    """``left`` is below ``right`` in ``figure``, or with ``within`` as far from it as that at most.

    With ``beside``, ``right`` has it in that figure.
    """

    text: str
    figure: str
    left: str
    right: str
    beside: str | None = None
    within: float | None = None

    @property
    def rule(self) -> str:
        beside = "" if self.beside is None else f", {self.beside}"
        if self.within is not None:
            return f"{self.figure}: `{self.left}` within {self.within:g} of `{self.right}`"
        return f"{self.figure}: `{self.left}` < `{self.right}`{beside}"

    def row(self, found: Studies) -> tuple[str, ...]:
        """What is said, the rule, the difference, the seeds and the verdict."""
        why = self._undecidable(found)
        if why is not None:
            return self.text, self.rule, "", "", why
        made = self._difference(found)
        return self.text, self.rule, str(made), str(len(made.by_seed)), self._verdict(made)

    def _undecidable(self, found: Studies) -> str | None:
        if self.left not in found or self.right not in found:
            return "not measured"
        left, right = found[self.left], found[self.right]
        if not is_paired(left, right):
            return "not paired"
        return None if self._seeds(left, right) else "not measured"

    def _seeds(self, left: Study, right: Study) -> list[int]:
        theirs = right.of(self.beside or self.figure)
        return sorted(seed for seed in left.of(self.figure) if seed in theirs)

    def _difference(self, found: Studies) -> Difference:
        left, right = found[self.left], found[self.right]
        mine, theirs = left.of(self.figure), right.of(self.beside or self.figure)
        return Difference(tuple(mine[seed] - theirs[seed] for seed in self._seeds(left, right)))

    def _verdict(self, made: Difference) -> str:
        if self.within is not None:
            held = all(abs(d) <= self.within for d in made.by_seed)
            return "reproduced" if held else "not reproduced"
        if made.is_noise:
            return "within noise"
        return "reproduced" if made.mean < 0 else "not reproduced"


def is_paired(left: Study, right: Study) -> bool:
    """Whether both begin with, or stand beside, the same dense model for each seed that both have."""
    if left.record == right.record:
        return True
    ours, theirs = left.record.sources, right.record.sources
    seeds = [f"seed {seed}" for seed in left.seeds if seed in right.seeds]
    return all(seed in ours and ours[seed] == theirs.get(seed) for seed in seeds)


def claims() -> Iterator[Said]:
    yield from _of_splits()
    yield from _of_copies()
    for method in ("copy", "drop", "qwen"):
        yield Said(f"experts grow apart in training: {method} (2406.06563)", AFTER, method, method, BEFORE)


def _of_splits() -> Iterator[Said]:
    for other in ("split-cluster", "split-inner", "split-inter", "split-graph"):
        text = f"a random split is better than {other} after training (LLaMA-MoE)"
        yield Said(text, LAST, "split-random", other)
    better = "a scaled output is much better at the start (LLaMA-MoE)"
    yield Said(better, START, "split-random-ratio", "split-random-none")
    yield Said("the same, scaled by k as here", START, "split-random", "split-random-none")
    yield Said("a filter for fluency helps (LLaMA-MoE)", LAST, "split-random-fluent", "split-random")
    static = "static shares that dynamic ones end at are better than shares by size (LLaMA-MoE)"
    yield Said(static, LAST, "split-random-sheared", "split-random")
    yield Said("and better than the dynamic ones", LAST, "split-random-sheared", "split-random-dynamic")
    yield Said("a split beats a dense model as wide as its active part", LAST, "split-random", "dense-small")


def _of_copies() -> Iterator[Said]:
    start = "virtual groups with scaling start at the dense loss (2410.07524)"
    yield Said(start, START, "virtual-group", "dense", within=1e-3)
    order = "softmax-then-top-k is better than top-k-then-softmax (2410.07524)"
    yield Said(order, LAST, "virtual-group", "virtual-group-normalised")
    yield Said("upcycled beats continued dense training (2410.07524)", LAST, "virtual-group", "dense")
    yield Said("the same of whole networks, two of four", LAST, "virtual-group-1", "dense")
    yield Said("the same of copies (2212.05055)", LAST, "copy", "dense")
    yield Said("the same of copies in part anew (2502.19261)", LAST, "drop", "dense")
    anew = "a part anew is better than plain copies in the end (2502.19261)"
    yield Said(anew, LAST, "drop", "copy")
    shared = (
        "copies alone are better than beside a shared expert, of which the paper has no gain (2410.07524)"
    )
    yield Said(shared, LAST, "copy", "copy-shared")
    scratch = "upcycled beats a sparse model from nothing on as little text (2406.06563)"
    yield Said(scratch, LAST, "copy", "scratch")
    longer = (
        "and one on as much text as the dense model and it; from nothing should win from twice the dense"
        " model's text on, which is more than here (2406.06563)"
    )
    yield Said(longer, LAST, "copy", "scratch-long")
    yield Said("standardised logits lower the loss (2406.06563)", LAST, "copy-standardised", "copy")
