"""Byte-level BPE trained on a sample of the text.

Time grows with the text, whatever it is: a run without a blank, such as a genome, is cut into pieces first.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from consilium.words.say import say
from consilium.words.seldom import Seldom

SAMPLE_CHARACTERS = 3_500_000
"""Text that BPE is trained on; more changes little and costs a second a megabyte."""
_PIECE: Final = 64
"""Most characters of one piece; the longest words of languages are shorter, and longer merges rare."""
_UNBROKEN: Final = re.compile(rf"\S{{{_PIECE + 1},}}|\s{{{_PIECE + 1},}}")
_TICK: Final = 2.0


def train_bpe(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str], report: Callable[[str], None]
) -> str:
    """Return the tokenizer.json of BPE (GPT-2's split) trained on ``texts``.

    The same texts give the same content. Ctrl-C ends the wait, and ``report`` hears of it meanwhile.
    """
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = [piece for text in texts for piece in bounded(text)]
    _wait(lambda: tokenizer.train_from_iterator(pieces, trainer), report)
    return tokenizer.to_str()


def _wait(work: Callable[[], None], report: Callable[[str], None]) -> None:
    """Do ``work`` beside this thread: compiled code hears no signal before its end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            failed.append(error)

    thread = threading.Thread(target=run, name="tokenizer", daemon=True)
    thread.start()
    seconds, far = 0.0, Seldom(report)
    while thread.is_alive():
        thread.join(_TICK)
        seconds += _TICK
        if thread.is_alive():
            far(say("training the tokenizer: {seconds:.0f} s", seconds=seconds))
    if failed:
        raise failed[0]


def bounded(text: str) -> Iterator[str]:
    """Cut runs without a blank, and runs of blanks, so that no piece to be merged is longer than a word."""
    done = 0
    for run in _UNBROKEN.finditer(text):
        for cut in range(run.start() + _PIECE, run.end(), _PIECE):
            yield text[done:cut]
            done = cut
    yield text[done:]


def _untrained() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sample(
    domains: Mapping[str, NDArray[np.int64]], order: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.int64]]:
    """Return how many characters of each text of each domain are drawn, given how many it has.

    Each domain gives the same number as far as it has them; one that has less leaves its share to the larger
    ones. Texts are taken in the order of the hash of their names, so that the sample does not depend on the
    order in which they are read.
    """
    drawn: dict[str, NDArray[np.int64]] = {}
    left = SAMPLE_CHARACTERS
    sizes = {domain: int(counts_N.sum()) for domain, counts_N in domains.items()}
    for index, domain in enumerate(sorted(domains, key=lambda domain: (sizes[domain], domain))):
        drawn[domain] = _take(domains[domain], order[domain], left // (len(domains) - index))
        left -= int(drawn[domain].sum())
    return drawn


def _take(characters_N: NDArray[np.int64], order_N: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
    by_hash = np.argsort(order_N, kind="stable")
    before = np.cumsum(characters_N[by_hash]) - characters_N[by_hash]
    drawn_N = np.zeros_like(characters_N)
    drawn_N[by_hash] = np.clip(budget - before, 0, characters_N[by_hash])
    return drawn_N
