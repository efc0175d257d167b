"""``consilium train``: a recipe, somebody's weights or a YAML file, a budget, a run folder."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

from consilium.cli.arguments import count, json_flag, path
from consilium.cli.exits import INTERRUPTED, MISTAKE, command_line
from consilium.cli.progress import teller
from consilium.cli.running import running_arguments, settle
from consilium.errors import ConsiliumError
from consilium.recipes import balances
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.config.training import Training
    from consilium.parallel.mesh import Mesh
    from consilium.training.budget import Budget
    from consilium.training.events import Finished

MOST_PROCESSES: Final = 4096


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="recipe such as deepseek-v3:tiny; a run, a checkpoint or a .gguf file to go on from its weights;"
        " or a config.yaml",
    )
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="the run folder")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint, bit for bit; --steps, --lr, --batch, --eval-every and"
        " --save-every may then be others",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="SOURCE",
        help="[NAME=]PATH[:WEIGHT], a file or folder of text, or builtin[:WEIGHT]; may be given several"
        " times; default: built-in text",
    )
    _length_arguments(parser)
    _model_arguments(parser)
    parser.add_argument(
        "--save-every", metavar="N", help="steps between checkpoints, or minutes such as 5m; default: 10m"
    )
    parser.add_argument(
        "--eval-every", type=count, metavar="N", help="steps between validations; default: first and last"
    )
    parser.add_argument("--nproc", type=_processes, metavar="N", help="processes on this machine; default: 1")
    parser.add_argument(
        "--ep", type=_processes, default=1, metavar="N", help="processes that share the experts; default: 1"
    )
    parser.add_argument(
        "--replicas",
        type=_processes,
        default=1,
        metavar="N",
        help="copies of all weights, cut over the other processes each; default: 1",
    )
    running_arguments(parser, dtypes=("auto", "float32", "bfloat16"), dtype="float32; auto measures")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key, such as model.moe.router.select.k=2 or freeze='*,!*.router.*'",
    )
    parser.add_argument(
        "--open", action="store_true", help="show the run in a browser while it trains; needs the extra serve"
    )
    json_flag(parser)


def _processes(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_PROCESSES:
        raise ArgumentTypeError(f"{text!r} is not a number of processes from 1 to {MOST_PROCESSES}")
    return int(text)


def _length_arguments(parser: ArgumentParser) -> None:
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, metavar="N", help="optimizer steps")
    length.add_argument("--minutes", type=float, metavar="M", help="calibrated once into steps; default: 3")
    length.add_argument("--tokens", type=count, metavar="N", help="tokens to train on, such as 2M")


def _model_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--params", type=count, metavar="N", help="scale the recipe to about N parameters, such as 8M"
    )
    parser.add_argument("--batch", type=count, metavar="B", help="sequences a step; default: 16")
    parser.add_argument("--seq", type=count, metavar="S", help="tokens a sequence; default: 128")
    parser.add_argument("--lr", type=float, metavar="X", help="peak learning rate; default: by width")
    parser.add_argument(
        "--balance",
        metavar="NAME",
        help=f"{', '.join(balances.TEXTS)}; default: the model's own",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="default: 0")


def run(options: Namespace) -> int:
    from consilium.cli.endings import ended
    from consilium.parallel.environment import is_launched, launched_rank, restarts
    from consilium.parallel.launch import launch
    from consilium.parallel.topology import Topology

    if (options.nproc or 1) > 1 and not is_launched():
        Topology.of(options.nproc, expert=options.ep, replicas=options.replicas)
        return launch(options.nproc, lambda: ended(lambda: run(options)))
    rank = launched_rank()
    if restarts():
        options.resume = True
    if rank:
        _be_quiet(options)
    try:
        return _joined(options)
    except ConsiliumError as error:
        if rank and not str(error).startswith(_own(rank)):
            return MISTAKE  # which all processes make and the first one tells
        raise


def _own(rank: int) -> str:
    """How an error begins that this process alone knows of."""
    return f"rank {rank}: "


def _be_quiet(options: Namespace) -> None:
    """One process tells of a run and prints its JSON; the others keep standard error for their own."""
    options.json = False
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _joined(options: Namespace) -> int:
    from consilium.parallel.environment import launched_world, local_device
    from consilium.parallel.group import TOLD
    from consilium.parallel.mesh import ALONE
    from consilium.parallel.topology import Topology
    from consilium.parallel.watch import PeerLost

    world = launched_world()
    if options.nproc not in (None, 1, world):
        raise ConsiliumError(f"--nproc {options.nproc}, and a launcher started {world}; leave --nproc out.")
    Topology.of(world, expert=options.ep, replicas=options.replicas)
    options.device = local_device(options.device)
    place = settle(options)
    if world == 1:  # by torchrun too
        return _prepared(options, place.device, ALONE)
    from consilium.parallel.start import joined  # seconds that one process need not wait

    with joined(expert=options.ep, replicas=options.replicas, device=place.device) as mesh:
        try:
            return _prepared(options, place.device, mesh)
        except PeerLost as error:
            raise ConsiliumError(f"{_own(mesh.world.rank)}{error}; go on with --resume.") from error
        except ConsiliumError as error:
            if mesh.world.leads or TOLD in getattr(error, "__notes__", ()):
                raise
            raise ConsiliumError(f"{_own(mesh.world.rank)}{error}") from error


def _prepared(options: Namespace, device: str, mesh: Mesh) -> int:
    """Everything that can be wrong with the options is said before anything is read or computed."""
    from consilium.cli.configure import budget_of, training_config
    from consilium.machine.allocator import keep_memory
    from consilium.training.budget import Minutes, steps_of
    from consilium.training.files import locked_by_one, run_in
    from consilium.training.guard import check_disk, check_memory
    from consilium.training.spread import dealt

    tell = teller(json=options.json)
    keep_memory()
    found: list[tuple[Training, Budget]] = []

    def read() -> None:
        stored = run_in(options.out, resume=options.resume)
        config = dealt(training_config(options, stored), mesh)
        found.append((config, budget_of(options, config, stored)))
        if not isinstance(found[0][1], Minutes):
            steps_of(found[0][1], config)
        check_memory(config, mesh)
        check_disk(config, options.out)
        _tell_resumed(options, config, goes_on=stored is not None)

    mesh.world.agreed(read)
    with locked_by_one(options.out, tell, mesh), _page(options, tell, mesh):
        return _run(*found[0], options, device, mesh)


def _page(options: Namespace, tell: Callable[[str], None], mesh: Mesh) -> AbstractContextManager[None]:
    from consilium.cli.opened import page_of

    return page_of(options.out, tell) if options.open and mesh.world.leads else nullcontext()


def _tell_resumed(options: Namespace, config: Training, *, goes_on: bool) -> None:
    from consilium.records.run import SUMMARY_FILE

    tell = teller(json=options.json)
    if options.minutes and (options.out / SUMMARY_FILE).exists():
        tell(
            say(
                "--minutes {minutes:g} was counted out as {steps} steps when the run began, and all are done;"
                " --steps N trains on",
                minutes=options.minutes,
                steps=config.steps,
            )
        )
    if options.resume and not goes_on:
        tell(say("{folder} holds no run yet: a new one starts there", folder=options.out))


def _run(config: Training, budget: Budget, options: Namespace, device: str, mesh: Mesh) -> int:
    from rich.console import Console

    from consilium.cli.live import Page
    from consilium.data.corpus import build_corpus
    from consilium.training.budget import with_budget
    from consilium.training.interrupt import polite_stop
    from consilium.training.loop import train

    console = Console(stderr=options.json)
    with Page(console) as page:
        corpus = build_corpus(
            config.data, config.model.vocab_size, start=config.tokenizer, progress=page.notice
        )
        config = with_budget(config, budget, corpus, notice=page.notice, mesh=mesh)
    moe = config.model.moe
    # Until the end is told: more Ctrl-C, in impatience, must not cut the answer off.
    with polite_stop(aloud=mesh.world.leads) as asked:
        with Page(console) as page:
            finished = train(
                config,
                options.out,
                resume=options.resume,
                listeners=(page,),
                corpus=corpus,
                stop=asked,
                device=device,
                mesh=mesh,
            )
        mesh.world.agreed(lambda: None)  # what is told is there
        return (
            _stopped(finished, options)
            if finished.interrupted
            else _done(finished, budget, options, generates=moe is None or moe.independent)
        )


def _stopped(finished: Finished, options: Namespace) -> int:
    """The run's own configuration goes on whatever options it began with."""
    from consilium.training.files import CONFIG_FILE

    words = command_line("train", options.out / CONFIG_FILE, "--out", options.out, "--resume")
    tell = teller(json=options.json)
    tell(say("stopped at step {step}; go on with:\n  {command}", step=finished.steps, command=words))
    tell(say("report so far: {path}", path=finished.report))
    return INTERRUPTED


def _done(finished: Finished, budget: Budget, options: Namespace, *, generates: bool) -> int:
    from consilium.records.io import read_json, to_json
    from consilium.records.run import SUMMARY_FILE, Summary
    from consilium.report.plain import columns
    from consilium.training.budget import missed

    summary = read_json(Summary, options.out / SUMMARY_FILE)
    more = (
        command_line("generate", options.out, "--prompt", "def ")
        if generates
        else command_line("eval", options.out)
    )
    tell = teller(json=options.json)
    tell(
        say(
            "done: {steps} steps, {tokens:,} tokens, {speed:,.0f} tok/s, held-out {bits:.3f} bits per byte",
            steps=finished.steps,
            tokens=finished.tokens,
            speed=summary.tokens_per_second,
            bits=summary.trained.macro,
        )
    )
    places = [
        (say("report"), str(finished.report)),
        (say("checkpoint"), str(finished.checkpoint)),
        (say("next"), more),
    ]
    tell(columns(places, indent="  "))
    if (note := missed(budget, summary.seconds)) is not None:
        tell(note)
    if options.json:
        print(to_json(summary, indent=None))
    return 0
