"""``consilium chat``: a conversation in the terminal. A base model without a chat format continues the text."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from consilium.cli.generate import load_engine, sampling_arguments, sampling_of
from consilium.engine.engine import Engine

QUESTION = "Q: {text}\nA:"
STOPS = ("\nQ:", "<|endoftext|>")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run or a checkpoint")
    sampling_arguments(parser)


def run(options: Namespace) -> int:
    engine = load_engine(options.folder)
    history = ""
    if sys.stdin.isatty():
        print("An empty line or Ctrl-D ends the conversation.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return 0
        if not text:
            return 0
        history = _fit(engine, history + QUESTION.format(text=text), options.max_tokens)
        history += _answer(engine, history, options) + "\n"


def _answer(engine: Engine, prompt: str, options: Namespace) -> str:
    answer = ""
    stops = [*STOPS, *options.stop]
    for piece in engine.generate(
        [prompt], max_tokens=options.max_tokens, sampling=sampling_of(options), stop=stops
    ):
        answer += piece.text
        print(piece.text, end="", flush=True)
    print()
    return answer


def _fit(engine: Engine, text: str, new: int) -> str:
    """Forget the oldest exchanges that no longer fit beside ``new`` tokens."""
    assert engine.tokenizer is not None
    while len(engine.tokenizer.encode(text)) + new + 1 > engine.model.config.max_length and "\nQ:" in text:
        text = text[text.index("\nQ:") + 1 :]
    return text
