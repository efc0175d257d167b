"""Make sparse models of a small dense one by every method, train all on the same text, keep what came of it.

usage: python bench/upcycle.py [NAME ...] [--jobs 2] [--again] [--steps 244] [--seeds 3]

NAME is a method, or one of ``dense`` (trained on as it is), ``dense-small`` (a dense model as wide as what
a split keeps active, from nothing), ``scratch`` and ``scratch-long`` (the sparse model of ``copy``, from
nothing, for the steps after the dense model's training and for both). A random split reads other text too:
``-fluent`` what the fluency filter leaves of each domain, ``-dynamic`` in shares that follow the losses,
``-sheared`` in the shares at which those end, from the first step. ``expand`` doubles the experts of
``copy``, ``btx`` takes its experts from branches of the dense model, each trained on one domain, and
``mla-half`` has no experts: its attention is latent, with half the cache. Seeds
are paired: for each seed all begin with the same dense model and, but for those named, read the same text in
the same order. Each NAME is a record of its own, which names the dense models by their hash; stop it at any
time, and it goes on with the first that has no record of these settings and these dense models. Settings are
the methods' defaults; none was chosen after a result was seen.

Legend: E experts, P values of an expert.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from studies import Measure, Settings, Sources, Study, beside, ended, timed

from consilium.benchmarking.record import once
from consilium.checkpoint import store
from consilium.checkpoint.weights import digest
from consilium.config.attention import GQA
from consilium.config.data import BuiltIn, Data, Dynamic, Measured
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.training import Training
from consilium.config.upcycling import Copy, Latent, Qwen, Upcycling, VirtualGroup
from consilium.data.corpus import Corpus, build_corpus
from consilium.data.encoding import TokenizedText
from consilium.data.filters import classifier
from consilium.evaluation.bits import Evaluation, Reading, measure
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.planner.upcycled import upcycled
from consilium.records.bench import Figure
from consilium.records.loads import max_over_mean
from consilium.training.mixing import LossesOf, Mixing, mix
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
BRANCHES = ("code", "mathematics", "prose", "qa")
"""Domains of which each trains a branch for ``BRANCH_STEPS``."""
BRANCH_STEPS = 60
CHANGES = 24
"""Steps between changes of the shares that follow the losses."""
SPLIT: Mapping[str, Any] = {"method": "split-random", "experts": 8, "top_k": 4}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "split-random": SPLIT,
    "split-random-fluent": SPLIT,
    "split-random-dynamic": SPLIT,
    "split-random-sheared": SPLIT,
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
    "copy-shared": {"method": "copy", "experts": 4, "top_k": 2, "shared": 1},
    "virtual-group": {"method": VirtualGroup(granularity=4), "experts": 4, "top_k": 4},
    "virtual-group-1": {"method": VirtualGroup(granularity=1), "experts": 4, "top_k": 2},
    "virtual-group-normalised": {
        "method": VirtualGroup(granularity=4, weights="normalised"),
        "experts": 4,
        "top_k": 4,
    },
    "qwen": {"method": Qwen(granularity=4), "experts": 4, "top_k": 4},
    "drop": {"method": "drop", "experts": 4, "top_k": 2},
    "expand": {"method": "expand", "experts": 8, "top_k": 2},
    "btx": {"method": "btx", "experts": 4, "top_k": 2},
    "mla-half": {"method": Latent(kv_rank=96, rope_dim=96)},
}
KEPT = 0.5
"""Least chance of being fluent of what the filter leaves."""
OTHERS = ("dense", "dense-small", "scratch", "scratch-long")


@dataclass(frozen=True, slots=True)
class Text:
    """What a model reads, and beside it the held-out text, which is the same for all."""

    corpus: Corpus
    data: Data = Data(sequence_length=128)


def training_of(model: Model, steps: int, seed: int, data: Data) -> Training:
    """One thread, so that runs beside each other change nothing."""
    return Training(model=model, data=data, steps=steps, batch=16, seed=seed)


def trained(
    model: Decoder, text: Text, steps: int, seed: int, at: Sequence[int] = (), mixing: Mixing | None = None
) -> dict[int, Evaluation]:
    """Train ``model`` in place; held-out text measured after each of ``at`` steps and at the end.

    Changes of the shares of domains are put into ``mixing``.
    """
    config = training_of(model.config, steps, seed, text.data)
    optimizer, loader = build_optimizer(model, config.optimizer), loader_of(config, text.corpus)
    found: dict[int, Evaluation] = {}
    mixing = mixing or Mixing()
    for step in range(steps):
        if step in at:
            found[step] = held_out(model, text.corpus)
        mix(config.data, mixing, loader, model, (step, step * config.batch), losses_on(text.corpus))
        train_step(model, optimizer, loader, config, step)
    return found | {steps: held_out(model, text.corpus)}


def held_out(model: Decoder, corpus: Corpus) -> Evaluation:
    return measure(model, corpus, Reading(128, limit_tokens=8192))


def losses_on(corpus: Corpus) -> LossesOf:
    return lambda model: held_out(model, corpus).nats_per_token


def read_by(name: str, dense: Path, corpus: Corpus, steps: int, seed: int) -> Text:
    """Return the text that ``name`` trains on."""
    follows = Dynamic(start="given", every=CHANGES, reference=Measured(path=str(dense)))
    dynamic = Text(corpus, Data(sequence_length=128, mixture=follows))
    match name:
        case "split-random-fluent":
            return Text(fluent(corpus))
        case "split-random-dynamic":
            return dynamic
        case "split-random-sheared":
            mixing = Mixing()
            with made(dense, seed, SPLIT) as (model, _):
                trained(model, dynamic, steps, 1000 + seed, mixing=mixing)
            weights = dict(mixing.changes[-1].shares)
            return Text(corpus, Data(sources=(BuiltIn(weights=weights),), sequence_length=128))
        case _:
            return Text(corpus)


def fluent(corpus: Corpus) -> Corpus:
    """Training text without what the filter for fluency drops.

    A domain of which it leaves nothing, here the lists of words in two languages, stays whole: what is
    measured is what the filter does to text that it is for.
    """
    judge = classifier("fluency")

    def kept(text: TokenizedText) -> TokenizedText:
        parts = [text.ids_T[slice(*ends)] for ends in zip(text.starts_N, text.ends_N, strict=True)]
        left = [part for part in parts if judge.score(corpus.tokenizer.decode(part.tolist())) >= KEPT]
        starts_N = np.cumsum([0, *(len(part) for part in left[:-1])])
        return dataclasses.replace(text, ids_T=np.concatenate(left), starts_N=starts_N) if left else text

    return dataclasses.replace(corpus, train={name: kept(text) for name, text in corpus.train.items()})


@contextlib.contextmanager
def made(dense: Path, seed: int, asked: Mapping[str, Any]) -> Iterator[tuple[Decoder, float]]:
    """Yield what a method makes of a model, and by how much its logits differ from the model's."""
    with tempfile.TemporaryDirectory() as folder:
        result = upcycle(dense, Path(folder) / "sparse", seed=seed, **asked)
        yield store.load(Path(folder) / "sparse"), result.relative


def figures(model: Decoder, text: Text, steps: int, seed: int) -> Iterator[Figure]:
    """Of one model, from before its training here to after it."""
    found = {"expert similarity, before": similarity(model)}
    measured = trained(model, text, steps, 1000 + seed, AT)
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


@functools.cache
def read_text() -> Corpus:
    return build_corpus(Data(sequence_length=128), DENSE.vocab_size)


def work_of(corpus: Corpus) -> Path:
    """Where the dense models are."""
    return Path(tempfile.gettempdir()) / f"consilium-upcycle-{BEFORE}-{corpus.sha256[:12]}"


def hashed(folder: Path) -> str:
    """Of its weights, as ``upcycling.json`` has it of a source."""
    source = store.open_folder(folder)
    return digest((name, source.read(name)) for name in sorted(source.state))


def sources(settings: Settings) -> Sources:
    work = work_of(read_text())
    folders = {f"seed {seed}": work / f"dense-{seed}" for seed in range(settings.seeds)}
    return {seed: hashed(folder) for seed, folder in folders.items() if folder.exists()}


def prepare(settings: Settings, jobs: int) -> Measure:
    """Read the text once, and train the dense model of each seed, ``jobs`` at once."""
    corpus = read_text()
    work = work_of(corpus)

    def train_dense(seed: int) -> None:
        model = build(DENSE, seed=seed)
        trained(model, Text(corpus), BEFORE, seed)
        store.save(model, work / f"dense-{seed}", tokenizer=corpus.tokenizer)
        print(f"dense model of seed {seed} is trained", flush=True)

    beside(
        [seed for seed in range(settings.seeds) if not (work / f"dense-{seed}").exists()], jobs, train_dense
    )

    def measured(name: str, settings: Settings) -> Iterator[Figure]:
        for seed in range(settings.seeds):
            yield from timed(seed, _measured(name, work / f"dense-{seed}", corpus, settings.steps, seed))

    return measured


def _measured(name: str, dense: Path, corpus: Corpus, steps: int, seed: int) -> Iterator[Figure]:
    match name:
        case "dense":
            yield from figures(store.load(dense), Text(corpus), steps, seed)
        case "dense-small":
            model = build(small(DENSE), seed=seed)
            trained(model, Text(corpus), BEFORE, seed)
            yield from figures(model, Text(corpus), steps, seed)
        case "scratch" | "scratch-long":
            model = build(upcycled(DENSE, Upcycling(method=Copy(), experts=4, top_k=2)), seed=seed)
            if name == "scratch-long":
                trained(model, Text(corpus), BEFORE, seed)
            yield from figures(model, Text(corpus), steps, seed)
        case _:
            with begun(name, dense, corpus, seed) as (start, more):
                text = read_by(name, dense, corpus, steps, seed)
                with made(start, seed, {**METHODS[name], **more}) as (model, relative):
                    yield once(f"relative difference of logits, seed {seed}", "", relative)
                    yield from figures(model, text, steps, seed)


@contextlib.contextmanager
def begun(
    name: str, dense: Path, corpus: Corpus, seed: int
) -> Iterator[tuple[Path, Mapping[str, Sequence[Path]]]]:
    """Yield the folder that a method begins with, and what more it takes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        match name:
            case "expand":
                upcycle(dense, folder / "copied", seed=seed, **METHODS["copy"])
                yield folder / "copied", {}
            case "btx":
                yield dense, {"sources": [branch(dense, folder, corpus, d, seed) for d in BRANCHES]}
            case _:
                yield dense, {}


def branch(dense: Path, folder: Path, corpus: Corpus, domain: str, seed: int) -> Path:
    """Train the dense model on one domain."""
    model = store.load(dense)
    alone = dataclasses.replace(corpus, train={domain: corpus.train[domain]})
    trained(model, Text(alone), BRANCH_STEPS, seed)
    store.save(model, folder / domain, tokenizer=corpus.tokenizer)
    return folder / domain


STUDY = Study("upcycle", (*OTHERS, *METHODS), 244, prepare, sources=sources)

if __name__ == "__main__":
    ended(STUDY, __doc__ or "")
