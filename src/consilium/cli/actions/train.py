"""``consilium train``: settle the budget, train, report."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from consilium.cli.actions.configure import chosen_budget, training_config
from consilium.cli.actions.live import Page
from consilium.config.training import Training
from consilium.data.corpus import Corpus, build_corpus
from consilium.ops.allocator import keep_memory
from consilium.report.build import build_report
from consilium.training.budget import Budget, Minutes, Steps, with_budget
from consilium.training.events import Finished, Notice
from consilium.training.files import stored_config
from consilium.training.loop import train
from consilium.training.summary import write_summary


def run(options: Namespace) -> int:
    keep_memory()
    config = training_config(options.model, options)
    with Page(Console(stderr=False)) as page:
        corpus = build_corpus(config.data, config.model.vocab_size, progress=lambda text: page(Notice(text)))
        config = settle_steps(
            config, chosen_budget(options, _default(options, config)), corpus, options, page
        )
        finished = train(config, options.out, resume=options.resume, listeners=(page,), corpus=corpus)
    write_summary(options.out, finished)
    report = build_report(options.out)
    _say_end(finished, report, options)
    return 0


def settle_steps(
    config: Training, budget: Budget, corpus: Corpus, options: Namespace, page: Page
) -> Training:
    """Steps of a run that goes on were settled when it began; a new run settles them now."""
    stored = stored_config(options.out) if options.resume else None
    if stored is not None and isinstance(budget, Minutes):
        return dataclasses.replace(config, steps=stored.steps)
    return with_budget(config, budget, corpus, notice=lambda text: page(Notice(text)))


def _default(options: Namespace, config: Training) -> Budget:
    """A YAML file is a complete configuration and carries its own steps."""
    return Steps(config.steps) if Path(options.model).suffix in (".yaml", ".yml") else Minutes(3.0)


def _say_end(finished: Finished, report: Path, options: Namespace) -> None:
    if finished.interrupted:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        print(f"stopped at step {finished.steps}; go on with:\n  consilium {shlex.join(words)} --resume")
        return
    print(
        f"done: {finished.steps} steps, {finished.tokens:,} tokens, {finished.tokens_per_second:,.0f} tok/s,"
        f" held-out {finished.last.bits_per_byte:.3f} bits per byte\n"
        f"  report      {report}\n"
        f"  checkpoint  {finished.checkpoint}\n"
        f'  next        consilium generate {options.out} --prompt "def "'
    )
