"""``consilium chat``: question and answer in the terminal, as the built-in text writes them."""

from __future__ import annotations

import sys
from argparse import Namespace

from consilium.cli.actions.engines import load_engine, sampling_of
from consilium.engine.engine import Engine
from consilium.engine.request import Sampling
from consilium.errors import ConsiliumError

QUESTION = "Q: {text}\nA:"
STOPS = ("\nQ:",)


def run(options: Namespace) -> int:
    engine = load_engine(options.folder)
    if sys.stdin.isatty():
        print("An empty line or Ctrl-D ends the conversation.")
    sampling, history = sampling_of(options), ""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if not text:
            return 0
        asked = _fit(engine, history + QUESTION.format(text=text), options.max_tokens)
        try:
            history = asked + _answer(engine, asked, sampling, options) + "\n"
        except ConsiliumError as error:
            print(f"error: {error}", file=sys.stderr)


def _answer(engine: Engine, prompt: str, sampling: Sampling, options: Namespace) -> str:
    answer = ""
    stops = (*STOPS, *options.stop)
    for piece in engine.generate([prompt], max_tokens=options.max_tokens, sampling=sampling, stop=stops):
        answer += piece.text
        print(piece.text, end="", flush=True)
    print()
    return answer


def _fit(engine: Engine, text: str, new: int) -> str:
    """Forget the oldest exchanges that no longer fit beside ``new`` tokens."""
    assert engine.tokenizer is not None, "engines of folders have a tokenizer"
    while len(engine.tokenizer.encode(text)) + new + 1 > engine.model.config.max_length and "\nQ:" in text:
        text = text[text.index("\nQ:") + 1 :]
    return text
