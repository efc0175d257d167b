"""Several sources of text: nothing is read twice, and names say which source they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium.config.training import BuiltIn, Data, TextPath
from consilium.data.corpus import read_documents
from consilium.errors import ConsiliumError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Here, since what is held out is drawn by the name that was given."""
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
        read_documents(of(folder / one, folder / two))
    assert str(folder / one) in str(refused.value)
    assert str(folder / two) in str(refused.value)


def test_a_name_that_only_begins_alike_is_another_source(folder: Path) -> None:
    (folder / "one").rename(folder / "two-more")
    assert len(read_documents(of(folder / "two", folder / "two-more"))) == 12


def test_names_begin_with_their_source_where_there_are_several(folder: Path) -> None:
    alone = read_documents(of(folder / "one"))
    both = read_documents(of(folder / "one", folder / "two"))
    assert len({document.name for document in both}) == len(both) == 12
    places = [f"{folder / name}:" for name in ("one", "two")]
    assert all(sum(document.name.startswith(place) for place in places) == 1 for document in both)
    assert not any(document.name.startswith(places[0]) for document in alone)
    assert {document.domain for document in both} == {document.domain for document in alone}


@pytest.mark.parametrize("turned", [False, True])
def test_text_and_split_do_not_depend_on_the_order_of_sources(turned: bool, folder: Path) -> None:
    paths = [folder / "one", folder / "two"]
    found = read_documents(of(*(reversed(paths) if turned else paths)))
    assert found == read_documents(of(*paths))
    texts = {document.text for document in found if document.held_out}
    assert any(text.startswith("one") for text in texts)
    assert any(text.startswith("two") for text in texts)


def test_the_built_in_text_stands_beside_a_path(folder: Path) -> None:
    built_in = read_documents(Data())
    found = read_documents(Data(sources=(BuiltIn(), TextPath(path=str(folder / "one")))))
    assert len(found) == len(built_in) + 6
