"""A run in progress: opened fresh or from its newest checkpoint, saved whole."""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import consilium
from consilium.checkpoint import store
from consilium.checkpoint.folders import CHECKPOINTS
from consilium.config.training import BuiltIn, Training
from consilium.config.training import Path as PathSource
from consilium.data.corpus import Corpus
from consilium.data.loader import Loader
from consilium.disk import atomic
from consilium.errors import ConsiliumError
from consilium.machine.memory import physical_memory
from consilium.machine.processors import cpu_name
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.planner.plan import plan
from consilium.records.io import write_json
from consilium.records.run import META_FILE, Hardware, RunMeta, Versions
from consilium.training.files import RunFiles, check_same, run_in
from consilium.training.guard import check_weights
from consilium.training.optimizer import build_optimizer, moments, restore_moments


@dataclass(slots=True)
class Progress:
    """The only state of a run that is not weights, moments or a function of the step."""

    step: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    config: Training
    out: Path
    corpus: Corpus
    loader: Loader
    model: Decoder
    optimizer: torch.optim.AdamW
    files: RunFiles
    progress: Progress


def open_run(
    config: Training, out: Path, corpus: Corpus, *, resume: bool, notice: Callable[[str], None]
) -> Run:
    """Start in an empty folder, or continue with ``resume``; without a checkpoint a resume starts fresh.

    Raises ConsiliumError when the folder holds a run and ``resume`` is off, one with other settings or text,
    or other files.
    """
    stored = run_in(out, resume=resume)
    if stored is not None:
        check_same(stored, config, out)
    atomic.sweep(out / CHECKPOINTS)
    checkpoint = atomic.latest(out / CHECKPOINTS, notice=notice)
    model = build(config.model, seed=config.seed)
    optimizer = build_optimizer(model, config.optimizer)
    loader = loader_of(config, corpus)
    for text in loader.notices:
        notice(text)
    if checkpoint is None:
        write_json(out / META_FILE, _meta(config, corpus))
        files, progress = RunFiles.start(out, config), Progress()
    else:
        progress = _restore(checkpoint, model, optimizer, corpus, notice)
        files = RunFiles.reopen(out, progress.step)
    return Run(config, out, corpus, loader, model, optimizer, files, progress)


def loader_of(config: Training, corpus: Corpus) -> Loader:
    return Loader(
        corpus,
        sequence_length=config.data.sequence_length,
        batch=config.batch,
        seed=config.seed,
        temperature=config.data.temperature,
    )


def save_run(run: Run) -> Path:
    """Commit ``checkpoints/step-N`` whole, then prune older ones. Raises ConsiliumError for bad weights."""
    check_weights(run.model, run.progress.step)
    state = store.TrainingState(
        tensors=moments(run.optimizer, run.model),
        scalars={
            "step": run.progress.step,
            "tokens": run.progress.tokens,
            "skipped_in_a_row": run.progress.skipped_in_a_row,
            "corpus_sha256": run.corpus.sha256,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        },
    )
    folder = run.out / CHECKPOINTS / f"step-{run.progress.step}"
    store.save(run.model, folder, tokenizer=run.corpus.tokenizer, training_state=state)
    atomic.prune(run.out / CHECKPOINTS, run.config.keep, current=folder)
    return folder


def _restore(
    folder: Path, model: Decoder, optimizer: torch.optim.AdamW, corpus: Corpus, notice: Callable[[str], None]
) -> Progress:
    # ``latest`` has just compared every file of the folder with its manifest.
    store.load_weights(model, folder, check_finite=True, verified=True)
    state = store.load_training_state(folder, verified=True)
    restore_moments(optimizer, model, state.tensors)
    scalars = state.scalars
    if scalars["corpus_sha256"] != corpus.sha256:
        raise ConsiliumError(
            f"cannot resume from {folder}: the training text has changed (another Python, or edited files);"
            " restore the text or start a new run in another --out."
        )
    for name, now in (("threads", torch.get_num_threads()), ("torch", str(torch.__version__))):
        if scalars[name] != now:
            notice(
                f"resumed with {name} {now} instead of {scalars[name]}: results can differ in the last bits"
            )
    return Progress(int(scalars["step"]), int(scalars["tokens"]), int(scalars["skipped_in_a_row"]))


def _meta(config: Training, corpus: Corpus) -> RunMeta:
    parameters = plan(config.model).parameters
    return RunMeta(
        model=config.name or config.model.family,
        parameters_total=parameters.total,
        parameters_active=parameters.active,
        corpus=_corpus_name(config),
        corpus_sha256=corpus.sha256,
        seed=config.seed,
        started=dt.datetime.now(dt.UTC),
        versions=Versions(
            consilium=consilium.__version__, torch=str(torch.__version__), python=platform.python_version()
        ),
        hardware=Hardware(cpu=cpu_name(), threads=torch.get_num_threads(), memory_bytes=physical_memory()),
    )


def _corpus_name(config: Training) -> str:
    match config.data.source:
        case BuiltIn():
            return "builtin"
        case PathSource(path=path):
            return path
