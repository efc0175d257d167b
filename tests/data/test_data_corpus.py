from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_corpora import CODE, PROSE

from consilium.config.data import Data, TextPath
from consilium.config.training import Bytes
from consilium.data import corpus as module
from consilium.data import store
from consilium.data.corpus import Corpus, build_corpus, held_out_corpus, whole_corpus
from consilium.data.documents import Document, split
from consilium.data.paths import path_texts
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError

VOCABULARY = 300


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Data:
    folder = tmp_path / "text"
    for number in range(12):
        (folder / "odd: name").mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.py").write_text(CODE + f"x{number} = 1\n", encoding="utf-8")
        (folder / "odd: name" / f"{number}.md").write_text(PROSE * number + "end", encoding="utf-8")
    return Data(sources=(TextPath(path=str(folder)),), held_out=0.3)


def assert_same(first: Corpus, second: Corpus) -> None:
    assert first.sha256 == second.sha256
    assert first.tokenizer.files() == second.tokenizer.files()
    for sides in ((first.train, second.train), (first.held_out, second.held_out)):
        assert list(sides[0]) == list(sides[1])
        for ours, theirs in zip(sides[0].values(), sides[1].values(), strict=True):
            assert ours.byte_count == theirs.byte_count
            for name in ("ids_T", "starts_N", "syntax_T"):
                a, b = getattr(ours, name), getattr(theirs, name)
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


def no_work(*_: object) -> Tokenizer:
    raise AssertionError("trained again")


def path_of(data: Data) -> str:
    (source,) = data.sources
    assert isinstance(source, TextPath)
    return source.path


def entry(cache: Path) -> Path:
    (folder,) = (cache / "corpus").iterdir()
    return folder


def test_the_tokens_of_a_document_decode_to_its_text(data: Data) -> None:
    corpus = build_corpus(data, VOCABULARY)
    documents = split(path_texts(Path(path_of(data))), data.held_out)
    for domain in corpus.domains:
        for held_out, text in ((False, corpus.train[domain]), (True, corpus.held_out[domain])):
            expected = [d.text for d in documents if d.domain == domain and d.held_out == held_out]
            spans = zip(text.starts_N.tolist(), text.ends_N.tolist(), strict=True)
            pieces = [text.ids_T[start:end].tolist() for start, end in spans]
            assert [corpus.tokenizer.decode(piece) for piece in pieces] == expected
            assert all(piece.index(corpus.tokenizer.eos_id) == 0 for piece in pieces)
            assert text.byte_count == sum(len(found.encode()) for found in expected)


def test_a_second_run_reads_the_cache(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_corpus(data, VOCABULARY)
    monkeypatch.setattr(module, "_tokenize", no_work)
    notices: list[str] = []
    assert_same(build_corpus(data, VOCABULARY, progress=notices.append), first)
    assert "from the cache" in notices[0]


def test_other_settings_are_other_entries(data: Data, cache: Path) -> None:
    build_corpus(data, VOCABULARY)
    build_corpus(data, VOCABULARY + 1)
    build_corpus(data, VOCABULARY, start=Bytes())
    build_corpus(dataclasses.replace(data, held_out=0.5), VOCABULARY)
    build_corpus(dataclasses.replace(data, sequence_length=8, temperature=0.1), VOCABULARY)
    assert len(list((cache / "corpus").iterdir())) == 4


def test_changed_text_is_another_corpus(data: Data) -> None:
    first = build_corpus(data, VOCABULARY)
    Path(path_of(data), "0.py").write_text("y = 2\n")
    assert build_corpus(data, VOCABULARY).sha256 != first.sha256


FILES = ("tokenizer.json", "index.json", "train-0-ids.npy", "held_out-1-syntax.npy", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_built_again(data: Data, cache: Path, name: str, damage: str) -> None:
    first = build_corpus(data, VOCABULARY)
    path = entry(cache) / name
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-1])
        case "changed":
            path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        case _:
            path.unlink()
    assert not store.entry_is_whole(entry(cache))
    assert_same(build_corpus(data, VOCABULARY), first)
    assert store.entry_is_whole(entry(cache))


def test_a_cache_that_cannot_be_written_stops_nothing(
    data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build_corpus(data, VOCABULARY)
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    notices: list[str] = []
    assert_same(build_corpus(data, VOCABULARY, progress=notices.append), expected)
    assert "cannot be written" in notices[-1]


def test_a_full_disk_leaves_nothing_behind(data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    notices: list[str] = []
    build_corpus(data, VOCABULARY, progress=notices.append)
    assert "no space left" in notices[-1]
    assert not (cache / "corpus").exists() or list((cache / "corpus").iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_write(data: Data, cache: Path) -> None:
    leftover = cache / "corpus" / f".{'a' * 64}.tmp-{'0' * 16}"
    leftover.mkdir(parents=True)
    (leftover / "train-0-ids.npy").write_bytes(b"half")
    build_corpus(data, VOCABULARY)
    assert entry(cache).name != leftover.name


def test_arrays_from_the_cache_are_mapped_and_read_only(data: Data) -> None:
    build_corpus(data, VOCABULARY)
    ids = build_corpus(data, VOCABULARY).train["py"].ids_T
    assert isinstance(ids, np.memmap)
    assert not ids.flags.writeable
    assert ids.dtype == np.uint16


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("CONSILIUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "consilium"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert store.cache_folder() == tmp_path / "home" / ".cache" / "consilium"


def test_a_vocabulary_without_room_for_bytes_is_refused(data: Data) -> None:
    with pytest.raises(ConsiliumError, match="vocab_size to 259 or more"):
        build_corpus(data, 258)


def test_text_to_be_measured_is_held_out_whole(data: Data) -> None:
    tokenizer = Tokenizer.of_bytes()
    corpus = whole_corpus(Path(path_of(data)), tokenizer)
    total = sum(len(text.text.encode()) for text in path_texts(Path(path_of(data))))
    assert corpus.domains == ("odd: name", "py")
    assert sum(text.byte_count for text in corpus.held_out.values()) == total


def test_the_built_in_text_is_measured_on_its_held_out_side(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document("seen", "code", "a", held_out=False), Document("kept", "code", "b", held_out=True)]
    monkeypatch.setattr(module, "builtin_documents", lambda _: documents)
    corpus = held_out_corpus(Data(), Tokenizer.of_bytes())
    assert corpus.tokenizer.decode(corpus.held_out["code"].ids_T.tolist()) == "kept"
