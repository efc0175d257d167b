from __future__ import annotations

import lzma
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.data.documents import Document
from consilium.evaluation.baselines import (
    DocumentBytes,
    TrigramModel,
    baselines,
    document_bytes,
    xz_bits_per_byte,
)

START = b"\0\0"

documents = st.lists(st.text("abcé ", min_size=1, max_size=30), min_size=1, max_size=5)


def documents_of(train: dict[str, list[str]], held_out: dict[str, list[str]]) -> list[Document]:
    return [
        Document(text, domain, f"{domain} {number}", held_out=side)
        for side, domains in ((False, train), (True, held_out))
        for domain, texts in domains.items()
        for number, text in enumerate(texts)
    ]


def naive_bits(train: list[str], held_out: list[str]) -> float:
    """Witten-Bell interpolation with dictionaries, one byte at a time."""
    after: dict[bytes, Counter[int]] = {}
    for text in train:
        data = START + text.encode()
        for place in range(2, len(data)):
            for order in range(3):
                after.setdefault(data[place - order : place], Counter())[data[place]] += 1

    def probability(context: bytes, byte: int) -> float:
        lower = probability(context[1:], byte) if context else 1 / 256
        seen = after.get(context)
        if seen is None:
            return lower
        return (seen[byte] + len(seen) * lower) / (seen.total() + len(seen))

    bits = size = 0.0
    for text in held_out:
        data = START + text.encode()
        for place in range(2, len(data)):
            bits -= math.log2(probability(data[place - 2 : place], data[place]))
            size += 1
    return bits / size


# The counts take 128 MB, so few examples.
@settings(max_examples=8)
@given(train=documents, held_out=documents)
def test_the_trigram_model_equals_a_naive_one(train: list[str], held_out: list[str]) -> None:
    model = TrigramModel.fit([document_bytes(train)])
    found = model.bits_per_byte(document_bytes(held_out))
    assert found == pytest.approx(naive_bits(train, held_out), rel=1e-12)


def test_probabilities_of_all_bytes_sum_to_one() -> None:
    model = TrigramModel.fit([document_bytes(["abcab"])])
    for context in (b"ab", b"ba", b"zz", b"a", b""):
        endings = [context + bytes([byte]) for byte in range(256)]
        text = DocumentBytes(b"".join(endings), np.tile(np.arange(len(context) + 1), 256))
        last_X = model.probability(text)[len(context) :: len(context) + 1]
        assert last_X.shape == (256,)
        assert float(last_X.sum()) == pytest.approx(1)
        assert float(last_X.min()) > 0


def test_training_text_of_all_domains_is_pooled_and_domains_are_measured_apart() -> None:
    train = {"a": ["abab" * 9, "baba"], "b": ["cdcd" * 9]}
    held_out = {"a": ["abab"], "b": ["cdab", "dc"]}
    found = baselines(documents_of(train, held_out))
    pooled = [text for texts in train.values() for text in texts]
    for domain, texts in held_out.items():
        assert found.trigram.domains[domain] == pytest.approx(naive_bits(pooled, texts), rel=1e-12)
        data = "".join(texts).encode()
        assert found.xz.domains[domain] == 8 * len(lzma.compress(data, preset=9)) / len(data)
    assert found.trigram.macro == pytest.approx(sum(found.trigram.domains.values()) / 2)


def test_xz_of_text_that_repeats_is_small_and_of_noise_is_not() -> None:
    assert xz_bits_per_byte(b"again and " * 10_000) < 0.05
    assert xz_bits_per_byte(random.Random(0).randbytes(10_000)) > 8
