from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from consilium.data.documents import Document, Text, corpus_sha256, split, stable_fraction

FRACTION = 0.3

units = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=40, unique=True)


def texts(names: list[str], domain: str = "prose") -> list[Text]:
    return [Text(f"text of {name}. " * 5, domain, name, name) for name in names]


def sides(documents: list[Document]) -> dict[str, bool]:
    return {document.name: document.held_out for document in documents}


@given(units)
def test_no_text_is_lost_or_on_both_sides(names: list[str]) -> None:
    documents = split(texts(names), FRACTION)
    whole = "".join(document.text for document in sorted(documents, key=lambda d: (d.name, d.held_out)))
    assert sorted(whole) == sorted("".join(text.text for text in texts(names)))
    assert len({document.name for document in documents}) == len(documents)


@given(units)
def test_every_domain_has_both_sides(names: list[str]) -> None:
    assert set(sides(split(texts(names), FRACTION)).values()) == {False, True}


def test_adding_files_moves_no_other_file() -> None:
    names = [f"file {number}" for number in range(100)]
    before, after = sides(split(texts(names[:60]), FRACTION)), sides(split(texts(names), FRACTION))
    assert before == {name: after[name] for name in before}


def test_about_the_asked_fraction_of_the_files_is_held_out() -> None:
    held_out = sides(split(texts([f"file {number}" for number in range(2000)]), 0.05)).values()
    assert 0.03 < sum(held_out) / len(held_out) < 0.07


def test_texts_of_one_unit_share_a_side() -> None:
    names = [f"module {number}.py" for number in range(100)]
    answers = [Text("answer " * 10, "qa", f"{name} docstrings", name) for name in names]
    found = sides(split([*texts(names, "code"), *answers], FRACTION))
    assert all(found[name] == found[f"{name} docstrings"] for name in names)


def test_a_single_file_gives_its_tail_at_a_paragraph() -> None:
    text = "\n\n".join(f"Paragraph {number}. " + "word " * 20 for number in range(50))
    train, held_out = split([Text(text, "txt", "book.txt", "book.txt")], 0.1)
    assert train.text + held_out.text == text
    assert not train.held_out
    assert train.text.endswith("\n\n")
    assert held_out.held_out
    assert held_out.name == "book.txt (tail)"
    assert 0.05 < len(held_out.text) / len(text) < 0.25


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=2, max_size=2, unique=True))
def test_different_corpora_have_different_hashes(pairs: list[tuple[str, str]]) -> None:
    first, second = ([Document(text, "prose", name, held_out=False)] for text, name in pairs)
    assert corpus_sha256(first) != corpus_sha256(second)


def test_the_hash_knows_the_split() -> None:
    document = Document("text", "prose", "name", held_out=False)
    assert corpus_sha256([document]) != corpus_sha256([Document("text", "prose", "name", held_out=True)])


def test_another_process_splits_alike() -> None:
    call = (
        "from consilium.data.documents import stable_fraction;"
        "print(stable_fraction('json/decoder.py', salt='held out'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", call], env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True, text=True
    )
    assert float(run.stdout) == stable_fraction("json/decoder.py", salt="held out")
