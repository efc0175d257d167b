from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.data import documents as module
from consilium.data.documents import (
    Document,
    Text,
    TextMeasures,
    parts,
    split,
    split_domain,
    stable_fraction,
)
from consilium.data.forms import Completion, Content, Message, Talk
from consilium.data.survey import Digest

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


contents = st.one_of(
    st.text(max_size=5),
    st.builds(Completion, st.text(max_size=2), st.text(max_size=2)),
    st.builds(lambda *said: Talk(tuple(Message("user", text) for text in said)), st.text(max_size=2)),
)
named = st.tuples(contents, st.text(max_size=5), st.text(max_size=2))


@given(st.lists(st.lists(named, max_size=3), min_size=2, max_size=2, unique_by=repr))
def test_different_texts_have_different_hashes(sides: list[list[tuple[Content, str, str]]]) -> None:
    first, second = (Digest(), Digest())
    for digest, side in zip((first, second), sides, strict=True):
        for content, domain, name in side:
            digest.add(Text(content, domain, name, name))
    assert first.hexdigest() != second.hexdigest()


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    fraction=st.floats(0.05, 0.6),
    data=st.data(),
)
def test_what_trains_begins_each_text_and_a_unit_is_never_on_both_sides_but_for_one_tail(
    lengths: list[int], fraction: float, data: st.DataObject
) -> None:
    units = [f"unit {data.draw(st.integers(0, 3))}" for _ in lengths]
    found = [
        Text("x " * n, "d", str(i), unit) for i, (n, unit) in enumerate(zip(lengths, units, strict=True))
    ]
    kept = split_domain(TextMeasures.of(found), fraction).tolist()
    assert all(0 <= n <= len(text.text) for n, text in zip(kept, found, strict=True))
    whole = [n in {0, len(text.text)} for n, text in zip(kept, found, strict=True)]
    assert whole.count(False) <= 1
    if {stable_fraction(unit, salt="held out") < fraction for unit in units} == {False, True}:
        sides = {
            unit: {n == 0 for n, other in zip(kept, units, strict=True) if other == unit} for unit in units
        }
        assert all(len(side) == 1 for side in sides.values())


def test_the_tail_of_a_text_in_many_pieces_is_its_end() -> None:
    pieces = [Text("word " * 200, "d", f"book ({i})", "book") for i in range(10)]
    kept = split_domain(TextMeasures.of(pieces), 0.25).tolist()
    assert kept == [1000] * 7 + [500, 0, 0]


def test_conversations_are_held_out_whole() -> None:
    talks = [Text(Completion("a", "b" * n), "d", str(n), str(n)) for n in range(1, 4)]
    kept = split_domain(TextMeasures.of(talks), 1e-9).tolist()
    assert min(kept) == 0
    assert sum(n > 0 for n in kept) == 2
    assert split_domain(TextMeasures.of(talks[:1]), 1e-9).tolist() == [2]


@given(st.lists(st.text("ab \n", min_size=1, max_size=40), max_size=9), st.integers(1, 30))
def test_long_texts_are_cut_without_losing_a_letter(pieces: list[str], longest: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONGEST", longest)
        found = list(parts(pieces))
    assert "".join(found) == "".join(pieces)
    assert all(0 < len(part) <= longest for part in found)


def test_another_process_splits_alike() -> None:
    call = (
        "from consilium.data.documents import stable_fraction;"
        "print(stable_fraction('json/decoder.py', salt='held out'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", call], env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True, text=True
    )
    assert float(run.stdout) == stable_fraction("json/decoder.py", salt="held out")
