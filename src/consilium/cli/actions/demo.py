"""``consilium demo``: train, compare, study, report; nothing twice."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from consilium.analysis.passes import observe_specialisation
from consilium.checkpoint import store
from consilium.cli.actions.configure import DEMO_MODEL, demo_config
from consilium.cli.actions.live import Page
from consilium.cli.actions.showcase import conclusion
from consilium.cli.exits import INTERRUPTED, command_line
from consilium.config.training import Training
from consilium.data.corpus import Corpus, build_corpus
from consilium.engine.engine import Engine
from consilium.errors import ConsiliumError
from consilium.evaluation.baselines import baselines
from consilium.machine.allocator import keep_memory
from consilium.recipes.variants import dense_twin
from consilium.records.io import read_json_if_present, write_json
from consilium.records.run import SUMMARY_FILE, Dense, Sample, Summary
from consilium.records.specialisation import SPECIALISATION_FILE
from consilium.report.build import build_report
from consilium.training.budget import Minutes, missed, with_budget
from consilium.training.events import Finished, Notice
from consilium.training.files import locked, run_in, stored_config
from consilium.training.interrupt import polite_stop
from consilium.training.loop import train
from consilium.training.summary import write_summary

Stop = Callable[[], bool]
PROMPT = "def add(self, other):\n"
SAMPLE_TOKENS = 80
VALIDATIONS = 5
EVAL_TOKENS = 8192
"""Held-out tokens a domain: a validation takes seconds, not a tenth of the run."""


def run(options: Namespace) -> int:
    if not 0 < options.minutes < float("inf"):
        raise ConsiliumError(
            f"demo: --minutes {options.minutes:g} is not a positive number; give the minutes to train for."
        )
    keep_memory()
    summary = _finished_before(options)
    if summary is not None:
        print(conclusion(options.out, summary, DEMO_MODEL))
        return 0
    with locked(options.out, print):
        return _run(options)


def _run(options: Namespace) -> int:
    fresh, prepared = stored_config(options.out) is None, _prepare(options)
    # Until the end is told: more Ctrl-C, in impatience, must not cut the answer off.
    with polite_stop() as asked:
        summary = _train_and_study(options, *prepared, asked)
        if summary is None:
            words = command_line("demo", "--minutes", f"{options.minutes:g}", "--out", options.out)
            print(f"stopped; go on with:\n  consilium {words}")
            return INTERRUPTED
        print(conclusion(options.out, summary, DEMO_MODEL))
        if fresh and (note := missed(Minutes(options.minutes), summary.seconds)) is not None:
            print(note)
        return 0


def _finished_before(options: Namespace) -> Summary | None:
    """Nothing is trained twice: a run that ended with what is asked for now is only shown again."""
    _refuse_another_run(options.out)
    summary = read_json_if_present(Summary, options.out / SUMMARY_FILE)
    if summary is None or (options.compare == "dense" and summary.dense is None):
        return None
    print(f"{options.out} is finished and only shown again; choose another --out to train anew")
    return summary


def _refuse_another_run(out: Path) -> None:
    """Raise ConsiliumError where ``out`` holds a run of ``train`` or of another version's demo."""
    stored = run_in(out, resume=True)
    if stored is not None and stored != _with_length(demo_config(), stored.steps):
        raise ConsiliumError(f"demo: {out} holds a run that is not this demo's; choose another --out.")


def _prepare(options: Namespace) -> tuple[Training, Corpus]:
    """The run's configuration, of an earlier start or settled now, and its text."""
    with Page(Console()) as page:

        def notice(text: str) -> None:
            page(Notice(text))

        config = demo_config()
        corpus = build_corpus(config.data, config.model.vocab_size, progress=notice)
        return stored_config(options.out) or _settled(config, options.minutes, corpus, notice), corpus


def _train_and_study(options: Namespace, config: Training, corpus: Corpus, stop: Stop) -> Summary | None:
    """None after a stop that was asked for."""
    with Page(Console()) as page:
        finished = _train(config, options.out, corpus, page, stop)
        dense = None
        if options.compare == "dense" and not finished.interrupted:
            name, model = f"dense twin of {config.name}", dense_twin(config.model)
            twin = dataclasses.replace(config, name=name, model=model)
            dense = _train(twin, options.out / "dense", corpus, page, stop)
        if finished.interrupted or (dense is not None and dense.interrupted):
            return None
        page(
            Notice("studying: a trigram model and xz on the same text, and which experts prefer which domain")
        )
        return _study(options.out, finished, corpus, None if dense is None else _dense(dense))


def _train(config: Training, out: Path, corpus: Corpus, page: Page, stop: Stop) -> Finished:
    return train(config, out, resume=True, listeners=(page,), corpus=corpus, stop=stop)


def _settled(config: Training, minutes: float, corpus: Corpus, notice: Callable[[str], None]) -> Training:
    config = with_budget(config, Minutes(minutes), corpus, notice=notice)
    return _with_length(config, config.steps)


def _with_length(config: Training, steps: int) -> Training:
    return dataclasses.replace(
        config, steps=steps, eval_every=max(1, steps // VALIDATIONS), eval_tokens=EVAL_TOKENS
    )


def _dense(finished: Finished) -> Dense:
    summary = write_summary(finished.out, finished)
    return Dense(
        bits_per_byte=summary.trained,
        parameters=sum(p.numel() for p in store.load(finished.checkpoint).parameters()),
        tokens_per_second=summary.tokens_per_second,
    )


def _study(out: Path, finished: Finished, corpus: Corpus, dense: Dense | None) -> Summary:
    model = store.load(finished.checkpoint).eval()
    compared = baselines(corpus)
    summary = write_summary(
        out,
        finished,
        trigram=compared.trigram,
        xz=compared.xz,
        dense=dense,
        sample=_sample(Engine(model, corpus.tokenizer)),
    )
    write_json(out / SPECIALISATION_FILE, observe_specialisation(model, corpus))
    build_report(out)
    return summary


def _sample(engine: Engine) -> Sample:
    pieces = engine.generate([PROMPT], max_tokens=SAMPLE_TOKENS)
    return Sample(prompt=PROMPT, text="".join(piece.text for piece in pieces))
