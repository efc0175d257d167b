"""``consilium train``: settle the budget, train, report."""

from __future__ import annotations

from argparse import Namespace

from rich.console import Console

from consilium.cli.actions.configure import chosen_budget, is_file, sets_steps, training_config
from consilium.cli.actions.live import Page
from consilium.cli.exits import INTERRUPTED, command_line
from consilium.config.training import Training
from consilium.data.corpus import build_corpus
from consilium.machine.allocator import keep_memory
from consilium.report.build import build_report
from consilium.training.budget import Budget, Minutes, Steps, missed, with_budget
from consilium.training.events import Finished, Notice
from consilium.training.files import CONFIG_FILE, locked, run_in
from consilium.training.guard import check_memory
from consilium.training.interrupt import polite_stop
from consilium.training.loop import train
from consilium.training.summary import write_summary


def run(options: Namespace) -> int:
    keep_memory()
    stored = run_in(options.out, resume=options.resume)
    config = training_config(options.model, options, stored)
    budget = _budget(options, config, stored)
    check_memory(config.model)
    if options.resume and stored is None:
        print(f"{options.out} holds no run yet: a new one starts there")
    with locked(options.out, print):
        return _run(config, budget, options)


def _run(config: Training, budget: Budget, options: Namespace) -> int:
    with Page(Console()) as page:

        def notice(text: str) -> None:
            page(Notice(text))

        corpus = build_corpus(config.data, config.model.vocab_size, start=config.tokenizer, progress=notice)
        config = with_budget(config, budget, corpus, notice=notice)
    # Until the end is told: more Ctrl-C, in impatience, must not cut the answer off.
    with polite_stop() as asked:
        with Page(Console()) as page:
            finished = train(
                config, options.out, resume=options.resume, listeners=(page,), corpus=corpus, stop=asked
            )
        return _stopped(finished, options) if finished.interrupted else _done(finished, budget, options)


def _budget(options: Namespace, config: Training, stored: Training | None) -> Budget:
    """Minutes of a run that goes on were turned into steps when it began."""
    said = stored is not None or is_file(options.model) or sets_steps(options)
    budget = chosen_budget(options, Steps(config.steps) if said else Minutes(3.0))
    return Steps(config.steps) if stored is not None and isinstance(budget, Minutes) else budget


def _stopped(finished: Finished, options: Namespace) -> int:
    """The run's own configuration goes on whatever options it began with."""
    words = command_line("train", options.out / CONFIG_FILE, "--out", options.out, "--resume")
    print(f"stopped at step {finished.steps}; go on with:\n  consilium {words}")
    print(f"report so far: {build_report(options.out)}")
    return INTERRUPTED


def _done(finished: Finished, budget: Budget, options: Namespace) -> int:
    summary = write_summary(options.out, finished)
    report = build_report(options.out)
    print(
        f"done: {finished.steps} steps, {finished.tokens:,} tokens, {summary.tokens_per_second:,.0f} tok/s,"
        f" held-out {summary.trained.macro:.3f} bits per byte\n"
        f"  report      {report}\n"
        f"  checkpoint  {finished.checkpoint}\n"
        f'  next        consilium generate {options.out} --prompt "def "'
    )
    if (note := missed(budget, summary.seconds)) is not None:
        print(note)
    return 0
