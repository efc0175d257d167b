"""The command: a table of verbs, each imported when it is called, and one sentence for a user's mistake."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from types import FrameType, MappingProxyType
from typing import NamedTuple, Protocol, cast

from consilium.cli.arguments import Parser
from consilium.cli.endings import ended
from consilium.cli.exits import INTERRUPTED
from consilium.errors import ConsiliumError, nearest
from consilium.words.say import check_language, language, say


class Verb(NamedTuple):
    """What is known of a verb before it is imported."""

    help: str
    example: str


class VerbModule(Protocol):
    """``consilium.cli.<verb>``: declares its arguments, then runs with them and returns the exit code."""

    def arguments(self, parser: ArgumentParser) -> None: ...
    def run(self, options: Namespace) -> int: ...


VERBS = MappingProxyType(
    {
        "demo": Verb("train a small DeepSeek-V3 on built-in text and show how", "consilium demo --minutes 3"),
        "systems": Verb("list the published systems and explain one", "consilium systems deepseek-v3"),
        "plan": Verb("parameters, FLOPs and memory of a model", "consilium plan deepseek-v3 --fit 80GiB"),
        "train": Verb("train a model", "consilium train deepseek-v3:tiny --out runs/first --minutes 2"),
        "eval": Verb("bits per byte of a model on text", "consilium eval runs/demo --data notes.txt"),
        "generate": Verb("continue a prompt", 'consilium generate runs/demo --prompt "def add("'),
        "chat": Verb("talk to a model in the terminal", "consilium chat runs/demo"),
        "serve": Verb("answer over HTTP as OpenAI's API does", "consilium serve runs/demo"),
        "upcycle": Verb(
            "make a sparse model out of a dense one",
            "consilium upcycle smollm.gguf moe --method copy --experts 4 --top-k 2",
        ),
        "convert": Verb(
            "weights to another dtype or file format", "consilium convert runs/demo demo.gguf --to gguf"
        ),
        "runs": Verb("list the training runs in a folder", "consilium runs runs"),
        "report": Verb("write and compare the pages of runs", "consilium report runs/demo runs/first"),
        "bench": Verb("measure speed on this machine", "consilium bench --json"),
        "doctor": Verb("check this machine and this installation", "consilium doctor"),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 after a user's mistake, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else list(argv)
    _write_any_character()
    if argv is None:
        _stop_in_order()

    def work() -> int:
        check_language()
        try:
            return _dispatch(words)
        finally:
            if argv is None:
                # The process ends now, which a signal must not change, nor answer with a traceback.
                for number in _stopping("SIGINT", "SIGTERM", "SIGHUP"):
                    signal.signal(number, signal.SIG_IGN)

    return ended(work)


def _write_any_character() -> None:
    """A terminal of another encoding shows ``?`` for what it lacks, and that is no reason to stop.

    Chinese would be nothing else there: who asks for it where the locale is C has a terminal of UTF-8.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for stream in (sys.stdout, sys.stderr):
        if (
            language() == "zh"
            and isinstance(stream, io.TextIOWrapper)
            and not _writes_chinese(stream.encoding)
        ):
            stream.reconfigure(encoding="utf-8")


def _writes_chinese(encoding: str) -> bool:
    try:
        "中".encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _stop_in_order() -> None:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, or half a folder would stay; what is ignored stays so."""
    for number in _stopping("SIGTERM", "SIGHUP"):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)


def _stopping(*names: str) -> list[signal.Signals]:
    """Those of the signals that this system has."""
    return [number for number in signal.Signals if number.name in names]


def _stop(_number: int, _frame: FrameType | None) -> None:
    # A terminal that closes sends both, and the second must not break what the first one lets end in order.
    for number in _stopping("SIGTERM", "SIGHUP"):
        signal.signal(number, signal.SIG_IGN)
    # Not KeyboardInterrupt: in a chat that ends the answer alone.
    raise SystemExit(INTERRUPTED)


def _dispatch(words: Sequence[str]) -> int:
    match words:
        case [] | ["-h" | "--help", *_]:
            print(_help())
            return 0
        case ["--version", *_]:
            from importlib.metadata import version

            print(f"consilium {version('consilium-moe')}")
            return 0
        case ["--completion", shell, *_]:
            from consilium.cli.completion import completion

            helps = {name: say(verb.help) for name, verb in VERBS.items()}
            print(completion(shell, {name: verb_parser(name) for name in VERBS}, helps))
            return 0
        case ["--completion"]:
            raise ConsiliumError("--completion needs the name of a shell, such as bash, zsh or fish.")
        case [name, *rest] if name in VERBS:
            return _run(name, rest)
        case _:
            raise ConsiliumError(_unknown(words[0]))


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"unknown option {name!r}.{nearest(name, ('--help', '--version', '--completion'))}"
    return f"unknown verb {name!r}.{nearest(name, VERBS)}"


def verb_parser(name: str) -> Parser:
    """The parser of a verb, whose module is imported and, being light, nothing else."""
    verb = VERBS[name]
    does = say(verb.help)
    sentence = say("{sentence}.", sentence=f"{does[0].upper()}{does[1:]}")
    parser = Parser(prog=f"consilium {name}", description=sentence, example=verb.example)
    _module(name).arguments(parser)
    parser.show_defaults()
    return parser


def _run(name: str, words: Sequence[str]) -> int:
    # pydantic would search every installed distribution for plugins: a tenth of the time to a plan.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        options = verb_parser(name).read(words)
    except SystemExit as stop:  # argparse leaves this way after --help
        return stop.code if isinstance(stop.code, int) else 0
    return _module(name).run(options)


def _module(name: str) -> VerbModule:
    return cast(VerbModule, importlib.import_module(f"consilium.cli.{name}"))


def _help() -> str:
    wide = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{wide}}  {say(verb.help)}" for name, verb in VERBS.items())
    return "\n".join(
        (
            say("Mixture-of-Experts language models: build, train, study and run them."),
            "",
            say("usage: ") + "consilium VERB ...",
            "",
            verbs,
            "",
            say("options") + ":",
            "  --help              " + say("this text; consilium VERB --help explains a verb"),
            "  --version           " + say("the version"),
            "  --completion SHELL  " + say("what bash or another shell needs to complete verbs and options"),
            "",
            say("CONSILIUM_LANG=zh or en chooses the language; without it the locale does."),
        )
    )
