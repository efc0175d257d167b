"""``consilium chat``: a conversation in the terminal, by the model's own chat template where it has one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from consilium.cli.exits import INTERRUPTED
from consilium.cli.generation import Clock, generation_arguments, guesses_told, open_model, sampling_of
from consilium.cli.progress import note
from consilium.errors import ConsiliumError, nearest
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.engine.chat import Conversation, Format
    from consilium.engine.engine import Engine
    from consilium.engine.request import Sampling

BLOCK: Final = '"""'
ROOM: Final = 1024
"""Tokens that an answer without a limit finds free, or a quarter of a smaller context."""
COMMANDS: Final = ("/help", "/reset", "/system", "/save", "/load", "/stats", "/exit")


def arguments(parser: ArgumentParser) -> None:
    generation_arguments(
        parser, tokens="until the end of the turn", temperature="what the model's files say, or 0"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message; default: the template's own")
    parser.epilog = f"{parser.epilog}\n\n{_help()}"


def run(options: Namespace) -> int:
    opened = open_model(options)
    form = opened.form()
    session = Session(opened.engine(), form, options)
    note(say("format: {name}", name=session.form.name))
    if _terminal():
        with contextlib.suppress(ImportError):  # lines can be edited where Python has it
            import_module("readline")
        note(
            say(
                "/help lists the commands. Ctrl-C ends an answer; an empty line or Ctrl-D ends the"
                " conversation."
            )
        )
    try:
        return _converse(session)
    except SystemExit:  # SIGTERM, or the terminal is gone
        session.keep()
        raise


def _converse(session: Session) -> int:
    """Take messages and commands until the end. Returns the exit code."""
    interrupted = False
    while True:
        try:
            text = read_message(_line)
            if not text or text.split()[0] == "/exit":
                return 0
            interrupted = False
            session.take(text)
        except EOFError:
            return 0
        except ConsiliumError as error:
            note(say("error: {sentence}", sentence=error))
        except KeyboardInterrupt:
            if interrupted or not _terminal():
                return INTERRUPTED
            interrupted = True
            note(say("\nonce more, or Ctrl-D, ends the conversation"))


def _terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _line(prompt: str) -> str:
    if sys.stdin is None:  # closed
        raise EOFError
    return input(prompt if _terminal() else "")


def read_message(line: Callable[[str], str]) -> str:
    """Read one message: a line, lines of which all but the last end in a backslash, or a block in quotes.

    A line that begins with a blank is text even where a slash follows. Raises EOFError at the end of input.
    """
    text = line("> ")
    if text.strip().startswith(BLOCK):
        return _block(text.strip().removeprefix(BLOCK), line)
    while text.endswith("\\"):
        try:
            text = f"{text[:-1]}\n{line('. ')}"
        except EOFError:
            return text[:-1]
    return text.strip() if text.lstrip() == text else text[1:].rstrip()


def _block(text: str, line: Callable[[str], str]) -> str:
    """What stands before the closing quotes, or before the end of input."""
    while BLOCK not in text:
        try:
            text = f"{text}\n{line('. ')}"
        except EOFError:
            break
    return text.partition(BLOCK)[0].strip("\n")


def _help() -> str:
    does = (
        say("show this"),
        say("forget the conversation, but not the system message"),
        say("TEXT: tell the model who it is; without TEXT, what its template says"),
        say("FILE: write the conversation"),
        say("FILE: go on with one that was saved"),
        say("tokens, speed, sampling and the load of the experts so far"),
        say("end; so do an empty line and Ctrl-D"),
    )
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in zip(COMMANDS, does, strict=True)]
    many = say(
        "Several lines are one message where all but the last end in a backslash, or between {quotes}.",
        quotes=BLOCK,
    )
    return "\n".join([say("commands of the conversation:"), *lines, many])


@final
class Session:
    """One conversation with one model."""

    def __init__(self, engine: Engine, form: Format, options: Namespace) -> None:
        from consilium.engine.chat import Conversation

        self._engine = engine
        self._options = options
        self._sampling: Sampling = sampling_of(options, engine.model.generation)
        self._conversation: Conversation = Conversation().with_system(options.system or "")
        self._kept: Conversation | None = None
        self._left_out = 0
        self._turns = 0
        self._tokens = 0
        self._last: Clock | None = None
        self.form: Format = form

    def take(self, text: str) -> None:
        """Answer a message or do what a command says. Raises ConsiliumError in one sentence."""
        if text.startswith("/"):
            self._command(*text.partition(" ")[::2])
        else:
            self._answer(text.strip() if text.startswith(" /") else text)

    def _answer(self, text: str) -> None:
        from consilium.engine.chat import fitted

        length = self._engine.model.config.max_length
        room = self._options.max_tokens or max(min(ROOM, length // 4), 1)
        asked = self._conversation.with_message("user", text)
        _, ids, gone = fitted(asked, self.form, length - room)
        if gone > self._left_out:
            note(
                say(
                    "the context of {length:,} tokens is full: the oldest {gone} exchanges are left out",
                    length=length,
                    gone=gone,
                )
            )
        self._left_out = gone
        heard: list[str] = []
        ended = None
        try:
            ended = self._stream(ids, heard)
        finally:
            if heard or ended:
                self._conversation = asked.with_message("assistant", "".join(heard))
        if ended == "length" and self._options.max_tokens is None:
            note(say("the answer ends here, because the context of {length:,} tokens is full", length=length))

    def keep(self) -> None:
        """Write what was said since the last /save to a new file of the current folder."""
        from consilium.engine.chat import write_conversation

        if not self._conversation.messages or self._conversation == self._kept:
            return
        file = Path(f"conversation-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json")
        try:
            write_conversation(self._conversation, file.resolve())
            note(say("saved {n} messages to {file}", n=len(self._conversation.messages), file=file))
        except ConsiliumError as error:
            note(say("error: {sentence}", sentence=error))

    def _stream(self, ids: list[int], heard: list[str]) -> str | None:
        """Print an answer and append its text to ``heard``. Returns how it ended, None by Ctrl-C."""
        ended, clock = None, Clock()
        sampling = dataclasses.replace(self._sampling, seed=self._sampling.seed + self._turns)
        pieces = self._engine.generate(
            [ids],
            max_tokens=self._options.max_tokens,
            sampling=sampling,
            stop=(*self.form.stops, *self._options.stop),
            stop_ids=(*self._engine.stop_ids, *self.form.stop_ids),
        )
        try:
            for piece in clock.timed(pieces):
                heard.append(piece.text)
                ended = piece.finished
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            ended = None
        print(flush=True)
        note(f"{clock}{guesses_told(self._engine)}{'' if ended else say('; interrupted')}")
        self._turns += 1
        self._tokens += clock.tokens
        self._last = clock
        return ended

    def _command(self, name: str, rest: str) -> None:
        from consilium.engine.chat import Conversation, read_conversation, write_conversation

        rest = rest.strip()
        match name:
            case "/help":
                note(_help())
            case "/reset":
                self._conversation = Conversation().with_system(self._conversation.system or "")
                note(say("the conversation begins anew"))
            case "/system":
                self._conversation = self._conversation.with_system(rest)
                note(
                    say("the system message is set")
                    if rest
                    else say("the system message is the template's own again")
                )
            case "/save":
                write_conversation(self._conversation, _file(name, rest))
                self._kept = self._conversation
                note(say("saved {n} messages to {file}", n=len(self._conversation.messages), file=rest))
            case "/load":
                self._conversation = self._kept = read_conversation(_file(name, rest))
                note(say("loaded {n} messages from {file}", n=len(self._conversation.messages), file=rest))
            case "/stats":
                note("\n".join(self._stats()))
            case _:
                raise ConsiliumError(
                    f"unknown command {name!r}.{nearest(name, COMMANDS)} After a blank a slash is text."
                )
        self._left_out = 0

    def _stats(self) -> list[str]:
        sampling, length = self._sampling, self._engine.model.config.max_length
        used = len(self.form.ids(self._conversation.messages)) if self._conversation.messages else 0
        drawn = say(
            "temperature {temperature:g}, top-k {top_k}, top-p {top_p:g}, seed {seed}",
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        context = {"used": used, "length": length, "messages": len(self._conversation.messages)}
        return [
            say("format: {name}", name=self.form.name),
            say("sampling: {how}", how=drawn if sampling.temperature else say("greedy")),
            say("context: {used:,} of {length:,} tokens in {messages} messages", **context),
            say("generated: {n:,} tokens in {answers} answers", n=self._tokens, answers=self._turns),
            *(() if self._last is None else (say("last answer: {clock}", clock=self._last),)),
            *(_load_line(layer, load_E) for layer, load_E in self._engine.loads.items()),
        ]


def _load_line(layer: int, load_E: Sequence[int]) -> str:
    from consilium.records.loads import max_over_mean

    return say(
        "layer {layer}: busiest expert {ratio:.2f} times its share, {idle} of {experts} idle",
        layer=layer,
        ratio=max_over_mean(load_E),
        idle=sum(load == 0 for load in load_E),
        experts=len(load_E),
    )


def _file(command: str, name: str) -> Path:
    if not name:
        raise ConsiliumError(f"{command} needs the name of a file: {command} conversation.json.")
    try:
        return Path(name).expanduser().resolve()
    except (RuntimeError, ValueError):  # nobody's home, a NUL
        raise ConsiliumError(f"{name!r} cannot be the name of a file; choose another name.") from None
