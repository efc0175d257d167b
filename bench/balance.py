"""Train a small model by every balance method, on softmax and on sigmoid scores, and keep what came of it.

usage: python bench/balance.py [NAME ...] [--jobs 2] [--again] [--steps 240] [--seeds 3]

NAME is ``softmax-METHOD``, ``sigmoid-METHOD`` or ``kN-METHOD``, all by default. Seeds are paired: every
method sees the same first weights and the same text in the same order. Each NAME is a record of its own;
stop it at any time, and it goes on with the first that has no record of these settings.
Then ``python docs/generate_balance.py`` writes docs/balance.md. Rates are the defaults of each method.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from studies import Measure, Settings, Study, ended

from consilium.benchmarking.record import once
from consilium.config.attention import GQA
from consilium.config.data import Data
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Router, Score, Sigmoid, Softmax, TopK
from consilium.config.training import Bytes, Training
from consilium.data.corpus import Corpus, build_corpus
from consilium.evaluation.bits import Evaluation, Reading, measure
from consilium.evaluation.loads import ExpertLoad
from consilium.model.build import build
from consilium.recipes.balances import TEXTS
from consilium.recipes.variants import with_balance
from consilium.records.bench import Figure
from consilium.records.loads import WINDOW, max_over_mean
from consilium.training.optimizer import build_optimizer
from consilium.training.run import loader_of
from consilium.training.step import StepResult, train_step

SCORES: Mapping[str, Score] = {"softmax": Softmax(), "sigmoid": Sigmoid()}
CHOICES = (2, 4, 8)
"""k of the study by k, at the same active and the same total width."""
BY_K = ("none", "switch", "bias-linear", "quantile")
BEFORE = 20
"""Steps to whose median a step is compared."""
SPIKE, PEAK = 1.15, 3.0
"""A spike is a loss, and a peak a gradient norm, that many times as high as the median before it."""
BALANCED, HELD = 0.5, 10
"""Balanced from the first step on after which so many steps have a mean MaxVio below this."""
POINTS = 24
"""Of the curve over the steps."""


def names() -> tuple[str, ...]:
    scored = [f"{score}-{method}" for method in TEXTS for score in SCORES]
    return (*scored, *(f"k{k}-{method}" for method in BY_K for k in CHOICES))


def model_of(name: str) -> Model:
    """Two MoE layers behind a dense one; a token uses k of 4 k experts, which are 128 / k wide."""
    kind, _, method = name.partition("-")
    k = int(kind[1:]) if kind not in SCORES else 4
    router = Router(score=SCORES.get(kind, Sigmoid()), select=TopK(k=k))
    return with_balance(
        Model(
            family="balance",
            vocab_size=320,
            hidden_size=64,
            layers=3,
            attention=GQA(heads=4, kv_heads=2, head_dim=16),
            dense=FeedForward(width=192),
            dense_first=1,
            moe=MoE(experts=4 * k, width=128 // k, router=router),
            max_length=256,
        ),
        method,
    )


def training_of(name: str, steps: int, seed: int) -> Training:
    """One thread, so that runs beside each other change nothing; two micro-batches, so that scopes differ."""
    return Training(
        model=model_of(name),
        tokenizer=Bytes(),
        data=Data(sequence_length=64),
        steps=steps,
        batch=12,
        accumulate=2,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """One run: a result a step, and the held-out text at its end."""

    results: Sequence[StepResult]
    final: Evaluation

    def violations(self) -> list[float]:
        """MaxVio of each step, mean over layers: max load / mean load - 1 (2408.15664)."""
        return [violation(result.loads) for result in self.results]


def violation(loads: Mapping[int, ExpertLoad]) -> float:
    return statistics.fmean(max_over_mean(load.counts) - 1 for load in loads.values())


def trained(config: Training, corpus: Corpus) -> Trained:
    model = build(config.model, seed=config.seed)
    optimizer, loader = build_optimizer(model, config.optimizer), loader_of(config, corpus)
    results = [train_step(model, optimizer, loader, config, step) for step in range(config.steps)]
    kept = [dataclasses.replace(result, loads=plain(result.loads)) for result in results]
    return Trained(kept, measure(model, corpus, Reading(64, limit_tokens=4096)))


def plain(loads: Mapping[int, ExpertLoad]) -> dict[int, ExpertLoad]:
    """Without the margins, which are as large as a step."""
    return {layer: dataclasses.replace(load, margins=None) for layer, load in loads.items()}


def above_median(values: Sequence[float], times: float) -> int:
    """Steps whose value is ``times`` the median of those before, or not finite."""
    return sum(
        not values[i] <= times * statistics.median(values[i - BEFORE : i]) for i in range(BEFORE, len(values))
    )


def steps_to_balance(violations: Sequence[float]) -> float:
    held = (
        i for i in range(len(violations) - HELD + 1) if statistics.fmean(violations[i : i + HELD]) < BALANCED
    )
    return next(held, math.inf)


def dead(results: Sequence[StepResult]) -> int:
    """Experts of all layers without a token in the last steps."""
    last = results[-WINDOW:]
    loads = [sum(result.loads[layer].load_E for result in last) for layer in last[0].loads]
    return sum(int((load_E == 0).sum()) for load_E in loads)


def figures(run: Trained, seed: int) -> Iterator[Figure]:
    """What never happened, as a number of steps, is left out."""
    violations, results = run.violations(), run.results
    losses, norms = [r.ce for r in results], [r.norm for r in results]
    found = {
        "bits per byte": run.final.bits_per_byte,
        "MaxVio batch": statistics.fmean(violations[-WINDOW:]),
        "MaxVio global": violation(run.final.loads),
        "steps to MaxVio < 0.5": steps_to_balance(violations),
        "dead experts": dead(results),
        "dropped": statistics.fmean(map(drop, results)),
        "loss spikes": above_median(losses, SPIKE),
        "norm peaks": above_median(norms, PEAK),
        "highest norm over median": max(norms[BEFORE:]) / statistics.median(norms[BEFORE:]),
    }
    found |= {f"MaxVio at step {step}": value for step, value in curve(violations)}
    yield from (once(f"{name}, seed {seed}", "", v) for name, v in found.items() if math.isfinite(v))


def drop(result: StepResult) -> float:
    return statistics.fmean(load.dropped_fraction for load in result.loads.values())


def curve(violations: Sequence[float]) -> list[tuple[int, float]]:
    """Means of equal stretches, each at its last step."""
    size = max(1, len(violations) // POINTS)
    ends = range(size, len(violations) + 1, size)
    return [(end, statistics.fmean(violations[end - size : end])) for end in ends]


def prepare(_: Settings, _jobs: int) -> Measure:
    """Read the text once; every run reads it in the same order."""
    config = training_of(names()[0], 1, 0)
    corpus = build_corpus(config.data, config.model.vocab_size, start=config.tokenizer)

    def measured(name: str, settings: Settings) -> Iterator[Figure]:
        for seed in range(settings.seeds):
            yield from figures(trained(training_of(name, settings.steps, seed), corpus), seed)

    return measured


STUDY = Study("balance", names(), 240, prepare)

if __name__ == "__main__":
    ended(STUDY, __doc__ or "")
