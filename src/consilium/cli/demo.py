"""``consilium demo``: a small DeepSeek-V3 from nothing to a report, on text that is already here.

Nothing is done twice: a demo that was stopped goes on, one that ended is shown again.
"""

from __future__ import annotations

import dataclasses
import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from consilium.cli.arguments import json_flag, path
from consilium.cli.exits import INTERRUPTED, command_line
from consilium.cli.progress import teller
from consilium.cli.running import running_arguments, settle
from consilium.errors import ConsiliumError
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.cli.live import Page
    from consilium.config.training import Training
    from consilium.data.corpus import Corpus
    from consilium.engine.engine import Engine
    from consilium.records.run import BitsPerByte, Dense, Sample, Summary
    from consilium.training.events import Finished

PROMPT = "def add(self, other):\n"
SAMPLE_TOKENS = 80
MOST_LINES = 10
"""Of a sample that are shown."""
VALIDATIONS = 5
EVAL_TOKENS = 8192
"""Held-out tokens a domain: a validation takes seconds, not a tenth of the run."""


class Job(NamedTuple):
    """What both runs of a demo share."""

    corpus: Corpus
    page: Page
    stop: Callable[[], bool]
    device: str


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=3.0, metavar="M", help="training time; default: 3")
    parser.add_argument(
        "--out", type=path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo"
    )
    parser.add_argument(
        "--compare",
        choices=("dense",),
        help="also train a dense model of the same active parameters on the same tokens",
    )
    running_arguments(parser, dtypes=("float32", "bfloat16"), dtype="float32")
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.cli.configure import positive_minutes
    from consilium.machine.allocator import keep_memory
    from consilium.training.files import locked

    positive_minutes("demo", options.minutes)
    keep_memory()
    device = settle(options).device
    summary = _finished_before(options)
    if summary is not None:
        return _conclude(options, summary)
    with locked(options.out, teller(json=options.json)):
        return _run(options, device)


def _run(options: Namespace, device: str) -> int:
    from rich.console import Console

    from consilium.cli.live import Page
    from consilium.training.budget import Minutes, missed
    from consilium.training.files import stored_config
    from consilium.training.interrupt import polite_stop

    fresh, tell = stored_config(options.out) is None, teller(json=options.json)
    console = Console(stderr=options.json)
    with Page(console) as page:
        config, corpus = _prepare(options, page)
    # Until the end is told: more Ctrl-C, in impatience, must not cut the answer off.
    with polite_stop() as asked:
        with Page(console) as page:
            summary = _train_and_study(options, config, Job(corpus, page, asked, device))
        if summary is None:
            compare = ["--compare", options.compare] if options.compare else []
            words = ["demo", "--minutes", f"{options.minutes:g}", "--out", options.out, *compare]
            tell(say("stopped; go on with:\n  {command}", command=command_line(*words)))
            return INTERRUPTED
        _conclude(options, summary)
        if fresh and (note := missed(Minutes(options.minutes), summary.seconds)) is not None:
            tell(note)
        return 0


def _conclude(options: Namespace, summary: Summary) -> int:
    from consilium.records.io import to_json

    teller(json=options.json)(conclusion(options, summary))
    if options.json:
        print(to_json(summary, indent=None))
    return 0


def _finished_before(options: Namespace) -> Summary | None:
    """Nothing is trained twice: a run that ended with what is asked for now is only shown again."""
    from consilium.records.io import read_json_if_present
    from consilium.records.run import SUMMARY_FILE, Summary

    _refuse_another_run(options.out)
    summary = read_json_if_present(Summary, options.out / SUMMARY_FILE)
    if summary is None or summary.sample is None or (options.compare == "dense" and summary.dense is None):
        return None
    tell, out = teller(json=options.json), options.out
    tell(say("{folder} is finished and only shown again; choose another --out to train anew", folder=out))
    return summary


def _refuse_another_run(out: Path) -> None:
    """Raise ConsiliumError where ``out`` holds a run of ``train`` or of another version's demo."""
    from consilium.cli.configure import demo_config
    from consilium.training.files import run_in

    stored = run_in(out, resume=True)
    if stored is None:
        return
    expected = dataclasses.replace(
        _with_length(demo_config(), stored.steps), dtype=stored.dtype, threads=stored.threads
    )
    if stored != expected:
        raise ConsiliumError(f"demo: {out} holds a run that is not this demo's; choose another --out.")


def _prepare(options: Namespace, page: Page) -> tuple[Training, Corpus]:
    """The run's configuration, of an earlier start or settled now, and its text."""
    from consilium.cli.configure import demo_config
    from consilium.data.corpus import build_corpus
    from consilium.training.budget import Minutes, with_budget
    from consilium.training.files import stored_config

    config = demo_config()
    corpus = build_corpus(config.data, config.model.vocab_size, start=config.tokenizer, progress=page.notice)
    stored = stored_config(options.out)
    if stored is not None:
        page.notice(
            say(
                "{folder} was begun with {steps:,} steps and keeps them; other --minutes need another --out",
                folder=options.out,
                steps=stored.steps,
            )
        )
        return stored, corpus
    given = {"dtype": options.dtype or config.dtype, "threads": options.threads}
    config = with_budget(
        dataclasses.replace(config, **given), Minutes(options.minutes), corpus, notice=page.notice
    )
    return _with_length(config, config.steps), corpus


def _with_length(config: Training, steps: int) -> Training:
    return dataclasses.replace(
        config, steps=steps, eval_every=max(1, steps // VALIDATIONS), eval_tokens=EVAL_TOKENS
    )


def _train_and_study(options: Namespace, config: Training, job: Job) -> Summary | None:
    """None after a stop that was asked for."""
    from consilium.recipes.variants import dense_twin

    finished = _train(config, options.out, job)
    dense = None
    if options.compare == "dense" and not finished.interrupted:
        name, model = f"dense twin of {config.name}", dense_twin(config.model)
        twin = _train(dataclasses.replace(config, name=name, model=model), options.out / "dense", job)
        finished = twin if twin.interrupted else finished
        dense = None if twin.interrupted else _dense(twin)
    if finished.interrupted:
        return None
    job.page.notice(
        say("studying: a trigram model and xz on the same text, and which experts prefer which domain")
    )
    return _study(options.out, finished, job.corpus, dense)


def _train(config: Training, out: Path, job: Job) -> Finished:
    from consilium.training.loop import train

    return train(
        config,
        out,
        resume=True,
        listeners=(job.page,),
        corpus=job.corpus,
        stop=job.stop,
        device=job.device,
    )


def _dense(finished: Finished) -> Dense:
    from consilium.checkpoint import store
    from consilium.records.io import read_json
    from consilium.records.run import SUMMARY_FILE, Dense, Summary

    summary = read_json(Summary, finished.out / SUMMARY_FILE)
    return Dense(
        bits_per_byte=summary.trained,
        parameters=sum(p.numel() for p in store.load(finished.checkpoint).parameters()),
        tokens_per_second=summary.tokens_per_second,
    )


def _study(out: Path, finished: Finished, corpus: Corpus, dense: Dense | None) -> Summary:
    from consilium.analysis.passes import observe_specialisation
    from consilium.checkpoint import store
    from consilium.cli.configure import demo_config
    from consilium.data.library import Library
    from consilium.engine.engine import Engine
    from consilium.evaluation.baselines import baselines
    from consilium.records.io import write_json
    from consilium.records.specialisation import SPECIALISATION_FILE
    from consilium.report.build import build_report
    from consilium.training.summary import write_summary

    model = store.load(finished.checkpoint).eval()
    compared = baselines(Library.open(demo_config().data).all_documents())
    write_json(out / SPECIALISATION_FILE, observe_specialisation(model, corpus))
    summary = write_summary(
        out,
        finished,
        trigram=compared.trigram,
        xz=compared.xz,
        dense=dense,
        sample=_sample(Engine(model, corpus.tokenizer)),
    )
    build_report(out)
    return summary


def _sample(engine: Engine) -> Sample:
    from consilium.records.run import Sample

    pieces = engine.generate([PROMPT], max_tokens=SAMPLE_TOKENS)
    return Sample(prompt=PROMPT, text="".join(piece.text for piece in pieces))


def conclusion(options: Namespace, summary: Summary) -> str:
    """The end of the demo: figures, balance, a sample and what to try next."""
    from consilium.cli.configure import DEMO_MODEL
    from consilium.records.run import checkpoint_at
    from consilium.report.build import REPORT_FILE
    from consilium.report.plain import columns

    out = options.out
    parts = [
        say(
            "\n{model}: {steps} steps, {tokens:,} tokens in {seconds:.0f} s ({speed:,.0f} tok/s)",
            model=DEMO_MODEL,
            steps=summary.steps,
            tokens=summary.tokens,
            seconds=summary.seconds,
            speed=summary.tokens_per_second,
        ),
        _figures(summary),
        _balance(out),
    ]
    if summary.sample is not None:
        parts.append(f"{say('sample')}\n{readable(summary.sample.prompt + summary.sample.text)}")
    checkpoint = checkpoint_at(out, summary.steps)
    places = [
        (say("report"), str(out / REPORT_FILE)),
        (say("checkpoint"), say("{folder}   (Hugging Face layout)", folder=checkpoint)),
    ]
    parts.append(f"{columns(places)}\n{say('try next')}\n{_suggestions(out, summary)}")
    return "\n\n".join(parts)


def _suggestions(out: Path, summary: Summary) -> str:
    """Commands that run as they stand, and none that has just been run."""
    lines = [
        ("generate", out, "--prompt", "def ", "--temperature", "0.8"),
        ("chat", out),
        ("eval", out),
        *([("demo", "--compare", "dense", "--out", out)] if summary.dense is None else []),
        ("plan", "deepseek-v3"),
    ]
    return "\n".join(f"  {command_line(*words)}" for words in lines)


def _figures(summary: Summary) -> str:
    from consilium.report.plain import columns

    rows: list[tuple[str, BitsPerByte | None]] = [
        (say("untrained"), summary.untrained),
        (say("trained"), summary.trained),
        (say("dense twin"), summary.dense and summary.dense.bits_per_byte),
        (say("trigram"), summary.trigram),
        ("xz", summary.xz),
    ]
    domains = list(summary.trained.domains)
    table: list[tuple[str, ...]] = [(say("bits per byte"), say("mean"), *domains)]
    for name, figure in rows:
        if figure is not None:
            found = (figure.macro, *(figure.domains.get(domain, float("nan")) for domain in domains))
            table.append((name, *map("{:.3f}".format, found)))
    lines = [columns(table, right=range(1, len(domains) + 2))]
    if summary.untrained is not None:
        share = summary.trained.macro / summary.untrained.macro
        lines.append(say("the trained model needs {share:.1%} of the untrained one's bits", share=share))
    if summary.dense is not None:
        lines.append(
            say(
                "dense twin: {parameters:,} parameters, {speed:,.0f} tok/s against {ours:,.0f}",
                parameters=summary.dense.parameters,
                speed=summary.dense.tokens_per_second,
                ours=summary.tokens_per_second,
            )
        )
    return "\n".join(lines)


def _balance(out: Path) -> str:
    from consilium.records.loads import LOADS_FILE, WINDOW, LoadFile

    if not (out / LOADS_FILE).exists():
        return say("no experts, nothing to balance")
    loads = LoadFile.open(out)
    steps = min(len(loads), WINDOW)
    lines = [say("expert load over the last {steps} steps (1.00 is fair)", steps=steps)]
    for layer, load in loads.final().items():
        dead = len(load.dead)
        lines.append(
            say(
                "  layer {layer}: max/mean {ratio:.2f}, {dead} dead experts",
                layer=layer,
                ratio=load.ratio,
                dead=dead,
            )
        )
    return "\n".join(lines)


def readable(text: str) -> str:
    """A sample as the terminal shows it: empty lines in a row become one that counts them, the end is cut."""
    lines: list[str] = []
    for empty, group in itertools.groupby(text.split("\n"), key=lambda line: not line.strip()):
        found = list(group)
        lines += [say("({n} empty lines)", n=len(found))] if empty and len(found) > 1 else found
    more = ["..."] if len(lines) > MOST_LINES else []
    return "\n".join(f"  | {line}" for line in [*lines[:MOST_LINES], *more])
