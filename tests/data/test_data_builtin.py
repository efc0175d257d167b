from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from consilium.data.builtin import domains as builtin
from consilium.data.builtin.arithmetic import mathematics_texts
from consilium.data.builtin.bilingual import bilingual_texts
from consilium.data.builtin.code import Module, question_texts, read_modules
from consilium.data.builtin.domains import DOMAINS, available_domains, builtin_texts
from consilium.data.documents import Document, Text, split
from consilium.errors import ConsiliumError

RESULT = re.compile(r"(\d+) ([-+*/]) (\d+) = (-?\d+)")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return split(builtin_texts(), 0.05)


def test_the_five_domains_are_there_and_large_enough_to_train_on(documents: list[Document]) -> None:
    sizes = Counter[str]()
    for document in documents:
        sizes[document.domain] += len(document.text.encode())
    assert set(sizes) == set(DOMAINS)
    assert all(size > 300_000 for size in sizes.values())


def test_every_domain_has_text_on_both_sides(documents: list[Document]) -> None:
    assert {(d.domain, d.held_out) for d in documents} == {
        (d, side) for d in DOMAINS for side in (False, True)
    }


def test_code_and_docstrings_of_a_module_share_a_side(documents: list[Document]) -> None:
    code = {d.name: d.held_out for d in documents if d.domain == "code"}
    answers = {d.name.removesuffix(" docstrings"): d.held_out for d in documents if d.domain == "qa"}
    assert answers.keys() <= code.keys()
    assert all(code[name] == side for name, side in answers.items())


def test_no_name_occurs_twice_in_a_domain(documents: list[Document]) -> None:
    assert len({(d.domain, d.name) for d in documents}) == len(documents)


def test_tests_and_the_text_of_other_domains_are_no_code(documents: list[Document]) -> None:
    folders = {part for d in documents if d.domain == "code" for part in Path(d.name).parts[:-1]}
    assert not folders & {"test", "tests", "site-packages", "pydoc_data"}


def test_a_second_reading_is_the_same(documents: list[Document]) -> None:
    assert split(builtin_texts(), 0.05) == documents


def test_a_python_without_sources_is_refused_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin, "standard_library", lambda: tmp_path)
    with pytest.raises(ConsiliumError, match=r"no.*sources|has none.*--data PATH"):
        available_domains()


def test_domains_can_be_asked_for_without_reading_all() -> None:
    assert available_domains() == DOMAINS


def test_a_file_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("name = 'größe'".encode("latin-1"))
    (tmp_path / "good.py").write_text("name = 1")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "more.py").write_text("name = 2")
    assert read_modules(tmp_path) == [Module("good.py", "name = 1")]


def test_questions_name_what_their_answers_describe() -> None:
    long = "Answers at some length what the thing is there for."
    source = (
        f'"""{long}"""\nclass A:\n    """{long}"""\n'
        f'    def b(self):\n        """{long}"""\n        def c(): "{long}"\n'
    )
    (text,) = question_texts([Module("pack/part.py", source)])
    assert re.findall(r"Q: (.*)", text.text) == [
        "What is the module pack.part for?",
        "What is the class pack.part.A?",
        "What does pack.part.A.b do?",
    ]
    assert text.text.count(f"A: {long}\n\n") == 3
    assert text.unit == "pack/part.py"


def test_source_that_does_not_parse_has_no_questions() -> None:
    assert question_texts([Module("bad.py", "def (:")]) == []


def test_every_sum_of_the_mathematics_domain_is_right() -> None:
    lines = [line for text in mathematics_texts(20) for line in text.text.splitlines()]
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    checked = 0
    for left, sign, right, result in RESULT.findall("\n".join(lines)):
        assert operations[sign](int(left), int(right)) == int(result)
        checked += 1
    assert checked > 100
    for line in lines:
        if line.startswith("sort"):
            given, ordered = (ast.literal_eval(part) for part in line.removeprefix("sort ").split(" = "))
            assert sorted(given) == ordered
        elif compared := re.fullmatch(r"(\d+) ([<>=]) (\d+)", line):
            left, right = int(compared[1]), int(compared[3])
            assert {"<": left < right, ">": left > right, "=": left == right}[compared[2]]


def test_bilingual_lines_pair_chinese_with_english() -> None:
    for line in "".join(text.text for text in bilingual_texts(20)).splitlines():
        first, second = line.split(" | ")
        assert first.isascii() != second.isascii()


@pytest.mark.parametrize("generate", [mathematics_texts, bilingual_texts])
def test_more_shards_do_not_change_the_first(generate: Callable[[int], list[Text]]) -> None:
    assert generate(8)[:5] == generate(5)
