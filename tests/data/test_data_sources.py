"""Several sources of text: nothing is read twice, and names say which source they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium.config.data import BuiltIn, Data, TextPath
from consilium.data.documents import Document
from consilium.data.library import Library
from consilium.errors import ConsiliumError


def documents_of(data: Data) -> list[Document]:
    return Library.open(data).all_documents()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        for number in range(6):
            file = tmp_path / name / "notes" / f"{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{name} says {number}.\n" * (number + 1))
    return Path()


def of(*paths: Path | str) -> Data:
    return Data(sources=tuple(TextPath(path=str(path)) for path in paths), held_out=0.3)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("one", "one"),
        ("one", "one/notes"),
        ("one/notes/3.txt", "one"),
        ("one", "two/../one"),
        ("one", "link"),
    ],
)
def test_text_that_would_be_read_twice_is_refused_by_both_names(one: str, two: str, folder: Path) -> None:
    (folder / "link").symlink_to("one", target_is_directory=True)
    with pytest.raises(ConsiliumError, match="are or hold the same files") as refused:
        documents_of(of(folder / one, folder / two))
    assert str(folder / one) in str(refused.value)
    assert str(folder / two) in str(refused.value)


def test_a_name_that_only_begins_alike_is_another_source(folder: Path) -> None:
    (folder / "one").rename(folder / "two-more")
    assert len(documents_of(of(folder / "two", folder / "two-more"))) == 12


def test_names_begin_with_their_source_where_there_are_several(folder: Path) -> None:
    alone = documents_of(of(folder / "one"))
    both = documents_of(of(folder / "one", folder / "two"))
    assert len({document.name for document in both}) == len(both) == 12
    assert all(sum(document.name.startswith(f"{name}:") for name in ("one", "two")) == 1 for document in both)
    assert not any(document.name.startswith("one:") for document in alone)
    assert {document.domain for document in both} == {document.domain for document in alone}


def test_sources_of_the_same_name_are_told_apart_by_more_of_their_paths(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / name / "notes").rename(folder / f"{name}" / "texts")
    found = documents_of(of(folder / "one/texts", folder / "two/texts"))
    assert {document.name.partition(":")[0] for document in found} == {"one/texts", "two/texts"}


@pytest.mark.parametrize("spelling", ["{here}/{name}", "./{name}", "{name}/../{name}", "link-{name}"])
def test_text_and_split_do_not_depend_on_how_a_path_is_written(spelling: str, folder: Path) -> None:
    for name in ("one", "two"):
        (folder / f"link-{name}").symlink_to(name, target_is_directory=True)
    written = [spelling.format(here=folder.absolute(), name=name) for name in ("one", "two")]
    assert documents_of(of(*written)) == documents_of(of("one", "two"))


def test_another_source_moves_no_text_to_the_other_side(folder: Path) -> None:
    alone = {document.text: document.held_out for document in documents_of(of("one"))}
    both = {document.text: document.held_out for document in documents_of(of("one", "two"))}
    assert both.items() >= alone.items()
    assert set(alone.values()) == {False, True}


def test_a_named_domain_holds_all_text_of_its_source(folder: Path) -> None:
    data = Data(sources=(TextPath(path="one", domain="first"), TextPath(path="two")))
    assert {(d.name.partition(":")[0], d.domain) for d in documents_of(data)} == {
        ("one", "first"),
        ("two", "notes"),
    }


@pytest.mark.parametrize("turned", [False, True])
def test_text_and_split_do_not_depend_on_the_order_of_sources(turned: bool, folder: Path) -> None:
    paths = [folder / "one", folder / "two"]
    found = documents_of(of(*(reversed(paths) if turned else paths)))
    assert found == documents_of(of(*paths))
    texts = {document.text for document in found if document.held_out}
    assert any(text.startswith("one") for text in texts)
    assert any(text.startswith("two") for text in texts)


def test_the_built_in_text_stands_beside_a_path(folder: Path) -> None:
    built_in = documents_of(Data(held_out=0.3))
    found = documents_of(Data(sources=(BuiltIn(), TextPath(path=str(folder / "one"))), held_out=0.3))
    own = documents_of(of(folder / "one"))
    assert len(found) == len(built_in) + len(own)
    assert {document.text for document in found} == {document.text for document in [*built_in, *own]}
