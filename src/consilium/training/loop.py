"""Training from first step to last, or to a polite stop, with everything saved on the way."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from consilium.config.training import Training, minutes
from consilium.data.corpus import Corpus, build_corpus
from consilium.evaluation.bits import Evaluation, Reading, measure
from consilium.machine.device import choose_device
from consilium.model.build import torch_dtype
from consilium.model.decoder import Decoder
from consilium.model.types import Options
from consilium.parallel.mesh import ALONE, Mesh
from consilium.records.run import checkpoint_at
from consilium.report.build import REPORT_FILE, build_report
from consilium.training.events import Evaluated, Event, Finished, Listener, Notice, Saved, Started, Stepped
from consilium.training.files import locked_by_one
from consilium.training.guard import check_disk, check_memory, check_patience, memory_told
from consilium.training.interrupt import borrowed_signals
from consilium.training.measures import bias_spread, evaluation_record, shares_record, step_record
from consilium.training.mixing import mix
from consilium.training.run import Run, Site, open_run, save_run, saved, saved_on_error
from consilium.training.spikes import Spike
from consilium.training.spread import agree, dealt
from consilium.training.step import StepResult, gradients, update
from consilium.training.summary import write_summary
from consilium.words.say import say

FIRST_EVALUATION = 0.1
"""Tokens that the untrained model is measured on at most, in tokens of the whole run."""

LOGGED = 1000
"""A run logs at most about this many steps; shorter runs log every step."""


def train(  # noqa: PLR0913 - the public face, by keyword
    config: Training,
    out: Path | str,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    corpus: Corpus | None = None,
    stop: Callable[[], bool] | None = None,
    device: str = "cpu",
    mesh: Mesh = ALONE,
) -> Finished:
    """Train in the run folder ``out`` and return how it ended; a summary and a report lie there then.

    ``device`` is ``cpu``, ``cuda``, ``cuda:N`` or ``auto``. ``stop`` says whether to end after the step in
    progress, by default once Ctrl-C, SIGTERM or SIGHUP came. The processes of ``mesh`` call this together,
    with the same arguments; one of them writes and tells, and all stop where one is asked to.

    The result is a function of the configuration, the text, torch, the thread count and the CPU's features: a
    run stopped anywhere and resumed reaches the same weights, bit for bit. Raises ConsiliumError for a model
    that memory cannot hold, a folder that is in use or holds anything but this run, text that changed, a full
    disk, weights that are no longer finite, or ten non-finite steps in a row. An error in a step or a
    listener is raised once what had been reached is saved; the signal that stopped the run is raised again
    behind it, where ``stop`` is not given.
    """

    def emit(event: Event) -> None:
        for listener in listeners if mesh.world.leads else ():
            listener(event)

    def notice(text: str) -> None:
        emit(Notice(text))

    out, device = Path(out), choose_device(device)
    config = dealt(config, mesh)
    mesh.world.agreed(lambda: check_memory(config, mesh))
    mesh.world.led(lambda: check_disk(config, out))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if corpus is None:
        corpus = build_corpus(config.data, config.model.vocab_size, start=config.tokenizer, progress=notice)
    agree(config, corpus, mesh)
    with ExitStack() as stack:
        asked = stack.enter_context(borrowed_signals() if stop is None else nullcontext(stop))
        stack.enter_context(mesh.watched())
        stack.enter_context(locked_by_one(out, notice, mesh))
        run = open_run(config, Site(out, corpus, device, notice, mesh), resume=resume)
        stack.enter_context(saved_on_error(run, notice))
        emit(Started(run.config, out, run.progress.step))
        meter = Meter()
        first = None if run.progress.step or _stops(run, asked) else _evaluate(run, emit)
        while run.progress.step < run.config.steps and not _stops(run, asked):
            _step(run, meter, emit)
        return _finish(run, meter, first, emit)


def _stops(run: Run, asked: Callable[[], bool]) -> bool:
    """Whether a stop was asked of any process."""
    return run.mesh.world.any(asked())[0]


@dataclass(slots=True)
class Meter:
    """What this process did: time spent in steps, and the newest steps' time."""

    seconds: float = 0.0
    tokens: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    saved_at: float = field(default_factory=time.monotonic)

    def add(self, seconds: float, result: StepResult) -> None:
        self.seconds += seconds
        self.tokens += result.tokens
        self.recent.append(seconds)


def _mix(run: Run, emit: Callable[[Event], None]) -> None:
    """Shares change before a step and not after one, so that a stop between the two loses no change."""

    def losses(model: Decoder) -> Mapping[str, float]:
        reading = Reading(run.config.data.sequence_length, limit_tokens=run.config.eval_tokens)
        options = Options(dtype=torch_dtype(run.config.dtype))
        return measure(model, run.corpus, reading, options=options, mesh=run.mesh).nats_per_token

    progress = run.progress
    at = (progress.step, progress.rows)
    if mix(run.config.data, progress.mixing, run.loader, run.model, at, losses):
        newest = progress.mixing.changes[-1]
        run.files.log_once(shares_record(newest.step, progress.tokens, newest.shares))
        told = ", ".join(f"{domain} {share:.1%}" for domain, share in newest.shares.items())
        emit(Notice(say("from step {step} on rows are {shares}", step=newest.step, shares=told)))


def _step(run: Run, meter: Meter, emit: Callable[[Event], None]) -> None:
    _mix(run, emit)
    progress = run.progress
    begun = time.perf_counter()
    with memory_told(run.config, progress.step + 1):
        result = gradients(run.model, run.loader, run.config, progress.step, run.mesh)
        healthy, spike = _is_healthy(result), run.watch.see(result.loss, result.norm)
        if spike is not None and run.config.spikes.action == "skip":
            result = dataclasses.replace(result, skipped=True)
        if not result.skipped:
            progress.whole = False
            update(run.model, run.optimizer, run.config, result, run.mesh)
    meter.add(time.perf_counter() - begun, result)
    progress.step += 1
    progress.tokens += result.tokens
    progress.rows += run.loader.size(progress.step - 1)
    run.average.add(run.model, progress.step)
    progress.whole = True
    progress.skipped_in_a_row = 0 if healthy else progress.skipped_in_a_row + 1
    _record(run, meter, result, spike, emit)
    check_patience(progress.skipped_in_a_row, progress.step)
    _every(run, meter, emit)


def _is_healthy(result: StepResult) -> bool:
    """Rows that hold questions alone are no sign of bad values."""
    return not (result.skipped and result.targets)


def _record(
    run: Run, meter: Meter, result: StepResult, spike: Spike | None, emit: Callable[[Event], None]
) -> None:
    """Put a step on record and tell it."""
    progress, speed = run.progress, result.tokens / meter.recent[-1]
    if progress.step % max(1, run.config.steps // LOGGED) == 0 or result.skipped or spike:
        bias = bias_spread(run.model)
        spiked = spike is not None
        run.files.log(step_record(progress.step, progress.tokens, speed, result, bias=bias, spike=spiked))
    run.files.log_loads(progress.step, result)
    left = (run.config.steps - progress.step) * sum(meter.recent) / len(meter.recent)
    emit(Stepped(progress.step, result, progress.tokens, speed, left))
    for text in _alarms(progress.step, result, spike):
        emit(Notice(text))


def _alarms(step: int, result: StepResult, spike: Spike | None) -> Iterator[str]:
    if spike is not None:
        yield spike.told(step) + (say(": skipped") if result.skipped else "")
    elif not result.targets:
        yield say("step {step}: none of its tokens are learned, skipped", step=step)
    elif result.skipped:
        yield say(
            "step {step}: loss {loss}, gradient norm {norm}: not finite, skipped",
            step=step,
            loss=result.loss,
            norm=result.norm,
        )


def _every(run: Run, meter: Meter, emit: Callable[[Event], None]) -> None:
    step, config = run.progress.step, run.config
    _tell_saved(run, emit, wait=False)
    if step == config.steps:
        return
    if _is_due(config, step):
        _evaluate(run, emit)
    if _save_is_due(config, step, run.mesh.world.of_first(time.monotonic() - meter.saved_at)):
        _tell_saved(run, emit, wait=True)
        save_run(run)
        meter.saved_at = time.monotonic()
        _tell_saved(run, emit, wait=False)


def _tell_saved(run: Run, emit: Callable[[Event], None], *, wait: bool) -> None:
    if (written := saved(run, wait=wait)) is not None:
        emit(Saved(written.step, written.folder))


def _save_is_due(config: Training, step: int, seconds: float) -> bool:
    if isinstance(config.save_every, str):
        return seconds >= 60 * minutes(config.save_every)
    return step % config.save_every == 0


def _evaluate(run: Run, emit: Callable[[Event], None]) -> Evaluation:
    """Validate; on record once, and only where an uninterrupted run does it too."""
    evaluation = measure(
        run.model,
        run.corpus,
        Reading(run.config.data.sequence_length, limit_tokens=_limit(run)),
        options=Options(dtype=torch_dtype(run.config.dtype)),
        mesh=run.mesh,
    )
    step = run.progress.step
    if not run.files.has_evaluation(step) and (step in (0, run.config.steps) or _is_due(run.config, step)):
        run.files.log(evaluation_record(step, run.progress.tokens, evaluation))
    emit(Evaluated(step, evaluation))
    return evaluation


def _limit(run: Run) -> int:
    """Held-out tokens a domain; before the first step, all domains are a tenth of the run at most."""
    if run.progress.step > 0:
        return run.config.eval_tokens
    trained = run.loader.rows_before(run.config.steps) * run.config.data.sequence_length
    share = FIRST_EVALUATION * trained / max(len(run.corpus.domains), 1)
    return min(run.config.eval_tokens, max(int(share), 1))


def _is_due(config: Training, step: int) -> bool:
    return bool(config.eval_every) and step % (config.eval_every or 1) == 0


def _finish(run: Run, meter: Meter, first: Evaluation | None, emit: Callable[[Event], None]) -> Finished:
    """Save first; a stop that was asked for does not wait for a validation."""
    folder = checkpoint_at(run.out, run.progress.step)
    _tell_saved(run, emit, wait=True)
    if run.progress.saved != run.progress.step:
        save_run(run)
        _tell_saved(run, emit, wait=True)
    interrupted = run.progress.step < run.config.steps
    last = None if interrupted else _evaluate(run, emit)
    finished = Finished(
        out=run.out,
        checkpoint=folder,
        steps=run.progress.step,
        tokens=run.progress.tokens,
        seconds=meter.seconds,
        tokens_per_second=meter.tokens / meter.seconds if meter.seconds else 0.0,
        first=first,
        last=last,
        interrupted=interrupted,
        final_load=run.files.final_load(),
        report=run.out / REPORT_FILE,
    )

    def report() -> None:
        if not interrupted:
            write_summary(run.out, finished)
        build_report(run.out)

    run.mesh.world.led(report)
    emit(finished)
    return finished
