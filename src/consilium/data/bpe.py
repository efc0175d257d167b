"""Byte-level BPE trained on a sample of the text.

Time grows with the text, whatever it is: a run without a blank, such as a genome, is cut into pieces first.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from consilium.data.documents import Document, stable_fraction

SAMPLE_CHARACTERS = 3_500_000
"""Text that BPE is trained on; more changes little and costs a second a megabyte."""
_PIECE: Final = 64
"""Most characters of one piece; the longest words of languages are shorter, and longer merges rare."""
_UNBROKEN: Final = re.compile(rf"\S{{{_PIECE + 1},}}|\s{{{_PIECE + 1},}}")
_TICK: Final = 2.0


def train_bpe(
    documents: Iterable[Document], vocab_size: int, specials: Sequence[str], report: Callable[[str], None]
) -> str:
    """Return the tokenizer.json of BPE (GPT-2's split) trained on the documents that are not held out.

    The same documents give the same content. Ctrl-C ends the wait, and ``report`` hears of it meanwhile.
    """
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = [piece for text in _sample(documents) for piece in bounded(text)]
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
    seconds = 0.0
    while thread.is_alive():
        thread.join(_TICK)
        seconds += _TICK
        if thread.is_alive():
            report(f"training the tokenizer: {seconds:.0f} s")
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


def _sample(documents: Iterable[Document]) -> list[str]:
    """Draw training documents, the same number of characters from each domain as far as it has them.

    A domain that has less leaves its share to the larger ones. Documents are taken in the order of the hash
    of their names, so that the sample does not depend on the order in which they were read.
    """
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        if not document.held_out:
            by_domain.setdefault(document.domain, []).append(document)
    sizes = {domain: sum(len(document.text) for document in members) for domain, members in by_domain.items()}
    sample: list[str] = []
    left = SAMPLE_CHARACTERS
    for index, domain in enumerate(sorted(by_domain, key=lambda domain: (sizes[domain], domain))):
        chosen = _take(by_domain[domain], left // (len(by_domain) - index))
        left -= sum(map(len, chosen))
        sample.extend(chosen)
    return sample


def _take(documents: Sequence[Document], budget: int) -> list[str]:
    taken: list[str] = []
    for document in sorted(documents, key=lambda document: stable_fraction(document.name, salt="sample")):
        piece = document.text[:budget]
        taken.append(piece)
        budget -= len(piece)
        if budget <= 0:
            break
    return taken
