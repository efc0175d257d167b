"""Make sparse models of a small dense one by every method, train all on the same text, keep what came of it.

usage: python bench/upcycle.py [NAME ...] [--jobs 2] [--again] [--steps 244] [--seeds 3]

NAME is a method, or one of ``dense`` (trained on as it is), ``dense-small`` (a dense model as wide as what
a split keeps active, from nothing), ``scratch`` and ``scratch-long`` (the sparse model of ``copy``, from
nothing, for the steps after the dense model's training and for both). Seeds are paired: for each seed all
begin with the same dense model and read the same text in the same order. Each NAME is a record of its own;
stop it at any time, and it goes on with the first that has no record of these settings and this machine.
Settings are the methods' defaults; none was chosen after a result was seen.

Legend: E experts, P values of an expert.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from studies import Measure, Settings, Study, ended

from consilium.benchmarking.record import once
from consilium.checkpoint import store
from consilium.config.attention import GQA
from consilium.config.data import Data
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.training import Training
from consilium.config.upcycling import Copy, Qwen, Upcycling, VirtualGroup
from consilium.data.corpus import Corpus, build_corpus
from consilium.evaluation.bits import Evaluation, Reading, measure
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.planner.upcycled import upcycled
from consilium.records.bench import Figure
from consilium.records.loads import max_over_mean
from consilium.training.optimizer import build_optimizer
from consilium.training.run import loader_of
from consilium.training.step import train_step
from consilium.upcycling.run import upcycle

DENSE = Model(
    family="llama",
    vocab_size=2048,
    hidden_size=192,
    layers=6,
    attention=GQA(heads=6, kv_heads=6, head_dim=32),
    dense=FeedForward(width=768),
    norm_epsilon=1e-5,
    max_length=256,
)
"""3.5 million parameters beside the embeddings."""
BEFORE = 600
"""Steps of the dense model's own training."""
AT = (0, 24, 60, 122)
"""Steps after which the held-out text is measured, beside the last."""
METHODS: Mapping[str, Mapping[str, Any]] = {
    "split-random": {"method": "split-random", "experts": 8, "top_k": 4},
    "split-random-ratio": {"method": "split-random", "experts": 8, "top_k": 4, "scale": "ratio"},
    "split-random-none": {"method": "split-random", "experts": 8, "top_k": 4, "scale": "none"},
    "split-random-mlp": {"method": "split-random", "experts": 8, "top_k": 4, "gate": "mlp"},
    "split-cluster": {"method": "split-cluster", "experts": 8, "top_k": 4},
    "split-inner": {"method": "split-inner", "experts": 8, "top_k": 4},
    "split-inter": {"method": "split-inter", "experts": 6, "top_k": 2, "shared": 2},
    "split-graph": {"method": "split-graph", "experts": 8, "top_k": 4},
    "carve": {"method": "carve", "experts": 6, "top_k": 2, "shared": 2},
    "copy": {"method": "copy", "experts": 4, "top_k": 2},
    "copy-standardised": {"method": "copy", "experts": 4, "top_k": 2, "gate": "standardised"},
    "virtual-group": {"method": VirtualGroup(granularity=4), "experts": 4, "top_k": 4},
    "virtual-group-normalised": {
        "method": VirtualGroup(granularity=4, weights="normalised"),
        "experts": 4,
        "top_k": 4,
    },
    "qwen": {"method": Qwen(granularity=4), "experts": 4, "top_k": 4},
    "drop": {"method": "drop", "experts": 4, "top_k": 2},
}
OTHERS = ("dense", "dense-small", "scratch", "scratch-long")


def training_of(model: Model, steps: int, seed: int) -> Training:
    """One thread, so that runs beside each other change nothing."""
    data = Data(sequence_length=128)
    return Training(model=model, data=data, steps=steps, batch=16, seed=seed)


def trained(
    model: Decoder, corpus: Corpus, steps: int, seed: int, at: Sequence[int] = ()
) -> dict[int, Evaluation]:
    """Train ``model`` in place; held-out text measured after each of ``at`` steps and at the end."""
    config = training_of(model.config, steps, seed)
    optimizer, loader = build_optimizer(model, config.optimizer), loader_of(config, corpus)
    found: dict[int, Evaluation] = {}
    for step in range(steps):
        if step in at:
            found[step] = held_out(model, corpus)
        train_step(model, optimizer, loader, config, step)
    return found | {steps: held_out(model, corpus)}


def held_out(model: Decoder, corpus: Corpus) -> Evaluation:
    return measure(model, corpus, Reading(128, limit_tokens=8192))


def figures(model: Decoder, corpus: Corpus, steps: int, seed: int) -> Iterator[Figure]:
    """Of one model, from before its training here to after it."""
    found = {"expert similarity, before": similarity(model)}
    measured = trained(model, corpus, steps, 1000 + seed, AT)
    found |= {"expert similarity, after": similarity(model)}
    found |= {f"bits per byte at step {step}": seen.bits_per_byte for step, seen in measured.items()}
    for when, seen in (("before", measured[0]), ("after", measured[steps])):
        if seen.loads:
            found[f"busiest expert, {when}"] = statistics.fmean(
                max_over_mean(load.counts) for load in seen.loads.values()
            )
            found[f"router entropy, {when}"] = statistics.fmean(
                load.entropy or 0.0 for load in seen.loads.values()
            )
    yield from (once(f"{name}, seed {seed}", "", v) for name, v in found.items() if v is not None)


@torch.no_grad()
def similarity(model: Decoder) -> float | None:
    """Mean cosine of pairs of experts of a layer, mean over layers; None without experts."""
    found: list[float] = []
    for layer in model.moe_modules().values():
        flat_EP = torch.cat([layer.experts.up.flatten(1), layer.experts.down.flatten(1)], dim=1)
        unit_EP = torch.nn.functional.normalize(flat_EP, dim=1)
        count = len(unit_EP)
        found.append(float(((unit_EP @ unit_EP.T).sum() - count) / (count * (count - 1))))
    return statistics.fmean(found) if found else None


def small(model: Model) -> Model:
    """A dense model as wide as what a split keeps active."""
    assert model.dense is not None, "the model is dense"
    return dataclasses.replace(model, dense=dataclasses.replace(model.dense, width=model.dense.width // 2))


def prepare(settings: Settings) -> Measure:
    """Read the text once, and train the dense model of each seed."""
    corpus = build_corpus(training_of(DENSE, 1, 0).data, DENSE.vocab_size)
    work = Path(tempfile.gettempdir()) / f"consilium-upcycle-{BEFORE}-{corpus.sha256[:12]}"
    for seed in range(settings.seeds):
        if not (work / f"dense-{seed}").exists():
            model = build(DENSE, seed=seed)
            trained(model, corpus, BEFORE, seed)
            store.save(model, work / f"dense-{seed}", tokenizer=corpus.tokenizer)
            print(f"dense model of seed {seed} is trained", flush=True)

    def measured(name: str, settings: Settings) -> Iterator[Figure]:
        for seed in range(settings.seeds):
            yield from _measured(name, work / f"dense-{seed}", corpus, settings.steps, seed)

    return measured


def _measured(name: str, dense: Path, corpus: Corpus, steps: int, seed: int) -> Iterator[Figure]:
    match name:
        case "dense":
            yield from figures(store.load(dense), corpus, steps, seed)
        case "dense-small":
            model = build(small(DENSE), seed=seed)
            trained(model, corpus, BEFORE, seed)
            yield from figures(model, corpus, steps, seed)
        case "scratch" | "scratch-long":
            model = build(upcycled(DENSE, Upcycling(method=Copy(), experts=4, top_k=2)), seed=seed)
            if name == "scratch-long":
                trained(model, corpus, BEFORE, seed)
            yield from figures(model, corpus, steps, seed)
        case _:
            with tempfile.TemporaryDirectory() as folder:
                made = upcycle(dense, Path(folder) / "sparse", seed=seed, **METHODS[name])
                model = store.load(Path(folder) / "sparse")
            yield once(f"relative difference of logits, seed {seed}", "", made.relative)
            yield from figures(model, corpus, steps, seed)


STUDY = Study("upcycle", (*OTHERS, *METHODS), 244, prepare)

if __name__ == "__main__":
    ended(STUDY, __doc__ or "")
