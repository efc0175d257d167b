"""A run in progress: opened fresh or from its newest checkpoint, saved whole."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import consilium
from consilium.checkpoint import store
from consilium.checkpoint.hf.generation import read_generation
from consilium.config import io
from consilium.config.data import spelled
from consilium.config.training import Training
from consilium.data.corpus import Corpus
from consilium.data.loader import Loader
from consilium.disk import atomic
from consilium.errors import ConsiliumError
from consilium.machine.memory import physical_memory
from consilium.machine.processors import cpu_name
from consilium.model.decoder import Decoder
from consilium.parallel.mesh import ALONE, Mesh
from consilium.planner.plan import plan
from consilium.records.dropped import write_dropped
from consilium.records.io import read_json, write_json, write_text
from consilium.records.run import (
    AVERAGE,
    CHECKPOINTS,
    META_FILE,
    Change,
    Hardware,
    RunMeta,
    Versions,
    checkpoint_at,
)
from consilium.training.average import Averaged
from consilium.training.controls import controls, restore_controls
from consilium.training.files import CONFIG_FILE, Files, NoFiles, RunFiles, run_in, stored_config
from consilium.training.freeze import freeze
from consilium.training.guard import check_weights
from consilium.training.mixing import Mixing
from consilium.training.optimizer import Optimizer, build_optimizer, moments, restore_moments
from consilium.training.resume import changes, newest_checkpoint, put_records_aside
from consilium.training.saving import Saver, Written
from consilium.training.schedule import first_batches
from consilium.training.spikes import Watch
from consilium.training.spread import allocated, rows_of, stamped
from consilium.training.start import as_stored, initial, tokenizer_of
from consilium.words.say import say


@dataclass(slots=True)
class Progress:
    """The only state of a run that is not weights, moments or a function of the step."""

    step: int = 0
    tokens: int = 0
    rows: int = 0
    """Sequences trained on: where the text goes on, also after another batch size."""
    skipped_in_a_row: int = 0
    saved: int | None = None
    """The newest step that a complete checkpoint holds."""
    mixing: Mixing = field(default_factory=Mixing)
    whole: bool = True
    """False while weights move: what an error leaves then is no step."""


@dataclass(frozen=True, slots=True)
class Run:
    config: Training
    out: Path
    corpus: Corpus
    loader: Loader
    model: Decoder
    optimizer: Optimizer
    files: Files
    watch: Watch
    average: Averaged
    saver: Saver
    progress: Progress
    mesh: Mesh = ALONE


@dataclass(frozen=True, slots=True)
class Site:
    """Where a run takes place, whether it begins or goes on."""

    out: Path
    corpus: Corpus
    device: str
    notice: Callable[[str], None]
    mesh: Mesh = ALONE


def open_run(config: Training, site: Site, *, resume: bool) -> Run:
    """Start in an empty folder, or continue with ``resume``; without a checkpoint a resume starts anew.

    Raises ConsiliumError when the folder holds a run and ``resume`` is off, one with other settings or text,
    or other files.
    """
    world = site.mesh.world
    found = world.led(lambda: _checkpoint(site, resume=resume))
    stored = stored_config(site.out) if found else None
    world.agreed(lambda: None)  # nobody writes before all have read
    if stored is None:
        return _begin(config, site)
    return _go_on(config, stored, Path(found), site)


def _checkpoint(site: Site, *, resume: bool) -> str:
    """Where a run goes on; nothing where one begins."""
    stored = run_in(site.out, resume=resume)
    for folder in (site.out, site.out / CHECKPOINTS):
        atomic.sweep(folder)
    checkpoint = None if stored is None else newest_checkpoint(site.out, site.notice)
    if stored is not None and checkpoint is None:
        _start_anew(site.out, site.notice)
    return "" if checkpoint is None else str(checkpoint)


def _start_anew(out: Path, notice: Callable[[str], None]) -> None:
    aside = put_records_aside(out)
    kept = (
        "" if aside is None else say("; the records of the steps that ran are kept in {place}", place=aside)
    )
    notice(say("{run} has no checkpoint yet, so the run starts anew from step 0", run=out) + kept)


def _begin(config: Training, site: Site) -> Run:
    model, config = initial(config, site.corpus, site.device, site.mesh, notice=site.notice)
    loader = loader_of(config, site.corpus)
    for text in loader.notices:
        site.notice(text)

    def start() -> Files:
        write_json(site.out / META_FILE, _meta(config, site.corpus))
        if site.corpus.dropped:
            write_dropped(site.out, site.corpus.dropped)
        return RunFiles.start(site.out, config)

    files, mesh, saver = _files(site.mesh, start), site.mesh, Saver(config.saving)
    optimizer = build_optimizer(model, config.optimizer, mesh.sharding)
    watch, average = Watch(config.spikes), _averaged(config, model, mesh)
    out, corpus, progress = site.out, site.corpus, Progress()
    return Run(config, out, corpus, loader, model, optimizer, files, watch, average, saver, progress, mesh)


def _files(mesh: Mesh, opened: Callable[[], Files]) -> Files:
    """What ``opened`` returns in the process that leads; the others have nothing to write."""
    found: list[Files] = []

    def work() -> None:
        found.append(opened())

    mesh.world.led(work)
    return found[0] if found else NoFiles()


def _go_on(config: Training, stored: Training, checkpoint: Path, site: Site) -> Run:
    out, corpus = site.out, site.corpus
    config = as_stored(config, stored)
    changed = changes(stored, config, out)
    tokenizer_of(config, corpus)
    ends = read_generation(checkpoint)
    model = allocated(config.model, site.mesh, site.device, generation=ends, overlap=config.overlap)
    freeze(model, config.freeze)
    optimizer = build_optimizer(model, config.optimizer, site.mesh.sharding)
    watch, average = Watch(config.spikes), _averaged(config, model, site.mesh)
    progress = _restore(checkpoint, stored, model, optimizer, watch, site)
    if (averaged := average.content(model)) is not None:
        store.load_weights(averaged, checkpoint / AVERAGE, check_finite=True, mesh=site.mesh)
    if config.steps < progress.step:
        raise ConsiliumError(
            f"cannot resume {out}: it has run {progress.step} steps, more than the {config.steps} asked for;"
            " give --steps beyond that."
        )
    loader = loader_of(config, corpus, (progress.step, progress.rows))
    progress.mixing.apply(loader)

    def reopen() -> Files:
        files = RunFiles.reopen(out, progress.step, site.notice)
        if changed:
            _record(changed, config, progress.step, site)
        return files

    files, saver, mesh = _files(site.mesh, reopen), Saver(config.saving), site.mesh
    return Run(config, out, corpus, loader, model, optimizer, files, watch, average, saver, progress, mesh)


def _record(changed: list[tuple[str, str, str]], config: Training, step: int, site: Site) -> None:
    """The list first: a crash between the two leaves a change that is asked for again, never one untold."""
    meta = read_json(RunMeta, site.out / META_FILE)
    changed_now = tuple(Change(step=step, key=key, before=old, after=new) for key, old, new in changed)
    write_json(site.out / META_FILE, dataclasses.replace(meta, changes=meta.changes + changed_now))
    write_text(site.out / CONFIG_FILE, io.to_yaml(config))
    for key, before, after in changed:
        site.notice(
            say(
                "from step {step} on {key} is {after} instead of {before}",
                step=step,
                key=key,
                after=after,
                before=before,
            )
        )


def loader_of(config: Training, corpus: Corpus, dealt: tuple[int, int] = (0, 0)) -> Loader:
    first = first_batches(config)
    return Loader(corpus, config.data, batch=config.batch, seed=config.seed, first=first, dealt=dealt)


def save_run(run: Run) -> None:
    """Commit ``checkpoints/step-N`` whole, then prune older ones: ``saved`` says when that is done.

    Behind the run a copy is written, taken now. Raises ConsiliumError for bad weights.
    """
    with run.mesh.sharding.local(run.model):
        run.mesh.world.agreed(lambda: check_weights(run.model, run.progress.step))
        state = _state(run)
    folder = checkpoint_at(run.out, run.progress.step)
    run.files.sync()
    state = dataclasses.replace(state, firsts=stamped(state.tensors, run.model, run.mesh))
    run.saver.begin(Written(run.progress.step, folder), _writer(run, folder, state))


def _averaged(config: Training, model: Decoder, mesh: Mesh) -> Averaged:
    return Averaged(model, config.average, config.freeze, mesh.sharding)


def _writer(run: Run, folder: Path, state: store.TrainingState) -> Callable[[], None]:
    content, average = store.Content.of(run.model), run.average.content(run.model)
    match run.config.saving:
        case "blocking":
            pass
        case "background":
            content, state = content.copied(), state.copied()
            average = None if average is None else average.copied()
    beside = {} if average is None else {AVERAGE: average}

    def write() -> None:
        tokenizer, mesh = run.corpus.tokenizer, run.mesh
        store.save(content, folder, tokenizer=tokenizer, training_state=state, beside=beside, mesh=mesh)
        if mesh.world.leads:
            atomic.prune(run.out / CHECKPOINTS, run.config.keep, current=folder)

    return write


def saved(run: Run, *, wait: bool = True) -> Written | None:
    """What has been saved since the last call. Raises ConsiliumError where it could not be written."""
    written = run.saver.finished(wait=wait)
    if written is not None:
        run.progress.saved = written.step
    return written


def _state(run: Run) -> store.TrainingState:
    return store.TrainingState(
        tensors=moments(run.optimizer, run.model) | controls(run.model) | run.watch.state(),
        scalars={
            "step": run.progress.step,
            "tokens": run.progress.tokens,
            "rows": run.progress.rows,
            "skipped_in_a_row": run.progress.skipped_in_a_row,
            "corpus_sha256": run.corpus.sha256,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "mixing": run.progress.mixing.to_json(),
        },
    )


@contextlib.contextmanager
def saved_on_error(run: Run, notice: Callable[[str], None]) -> Iterator[None]:
    """Save the last whole step before an error in a step or a listener goes on to the caller.

    However it ends, what is being written is waited for: the folder is another's then. Over processes the
    others are elsewhere, in a collective that this one has left, and nothing can be saved.
    """
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):
            saved(run)
        alone = run.mesh.world.size == 1
        if alone and run.progress.whole and run.progress.step not in (0, run.progress.saved):
            # The error is the news: what fails here, a full disk or the same listener, must not hide it.
            with contextlib.suppress(Exception):
                save_run(run)
                if (written := saved(run)) is not None:
                    notice(say("saved {folder} before the error ends the run", folder=written.folder))
        raise
    finally:
        run.saver.close()


def _restore(
    folder: Path, stored: Training, model: Decoder, optimizer: Optimizer, watch: Watch, site: Site
) -> Progress:
    # ``newest_checkpoint`` has just compared every file of the folder with its manifest.
    store.load_weights(model, folder, check_finite=True, mesh=site.mesh)
    state = store.load_training_state(folder, verified=True, rows=rows_of(model, site.mesh))
    with site.mesh.sharding.local(model):
        restore_moments(optimizer, model, restore_controls(model, state.tensors))
    watch.restore(state.tensors)
    scalars = state.scalars
    if scalars["corpus_sha256"] != site.corpus.sha256:
        raise ConsiliumError(
            f"cannot resume from {folder}: the training text has changed (another Python, or edited files);"
            " restore the text or start a new run in another --out."
        )
    for name, now in (("threads", torch.get_num_threads()), ("torch", str(torch.__version__))):
        if scalars[name] != now:
            site.notice(
                say(
                    "resumed with {name} {now} instead of {before}: results can differ in the last bits",
                    name=name,
                    now=now,
                    before=scalars[name],
                )
            )
    step = int(scalars["step"])
    return Progress(
        step=step,
        tokens=int(scalars["tokens"]),
        rows=int(scalars.get("rows", step * stored.batch)),
        skipped_in_a_row=int(scalars["skipped_in_a_row"]),
        saved=step,
        mixing=Mixing.from_json(str(scalars["mixing"])) if "mixing" in scalars else Mixing(),
    )


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
    return ", ".join(map(spelled, config.data.sources))
