from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_corpora import CODE, PROSE

from consilium.config.data import Data, TextPath
from consilium.config.training import Bytes
from consilium.data import library, store
from consilium.data.corpus import Corpus, build_corpus, held_out_corpus, whole_corpus
from consilium.data.documents import Text, split
from consilium.data.paths import path_texts
from consilium.data.tokenizer import Tokenizer
from consilium.disk.files import cache_folder
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
    assert first.owners == second.owners
    for sides in ((first.train, second.train), (first.held_out, second.held_out)):
        assert list(sides[0]) == list(sides[1])
        for ours, theirs in zip(sides[0].values(), sides[1].values(), strict=True):
            assert ours.byte_count == theirs.byte_count
            for name in ("ids_T", "starts_N", "syntax_T", "sizes_T", "learned_T"):
                a, b = getattr(ours, name)[:], getattr(theirs, name)[:]
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


def no_work(*_: object, **__: object) -> Iterator[Text]:
    raise AssertionError("read, trained or encoded again")


def make_old(folder: Path) -> None:
    """Files that have just been written are not trusted: they may change within the clock's tick."""
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))


def path_of(data: Data) -> str:
    (source,) = data.sources
    assert isinstance(source, TextPath)
    return source.path


def entries(cache: Path, room: str) -> list[Path]:
    return sorted(path for path in (cache / room).iterdir() if path.is_dir())


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


def test_a_hit_reads_no_text(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    make_old(Path(path_of(data)))
    first = build_corpus(data, VOCABULARY)
    monkeypatch.setattr(library, "read_texts", no_work)
    monkeypatch.setattr("consilium.data.bpe.train_bpe", no_work)
    notices: list[str] = []
    assert_same(build_corpus(data, VOCABULARY, progress=notices.append), first)
    assert "from the cache" in notices[-1]


def test_files_that_have_just_changed_are_read_again(data: Data) -> None:
    """Within the tick of a clock size and time may stay as they are while the text changes."""
    first = build_corpus(data, VOCABULARY)
    path = Path(path_of(data), "3.py")
    before = path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("x3", "y3"), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert build_corpus(data, VOCABULARY).sha256 != first.sha256


def test_files_replaced_by_others_of_the_same_size_and_time_are_read_again(data: Data) -> None:
    """Archives that are made reproducible give all their files one time."""
    folder = Path(path_of(data))
    make_old(folder)
    first = build_corpus(data, VOCABULARY)
    path = folder / "3.py"
    path.write_text(path.read_text(encoding="utf-8").replace("x3", "y3"), encoding="utf-8")
    make_old(folder)
    assert build_corpus(data, VOCABULARY).sha256 != first.sha256


def test_one_changed_file_has_only_its_shelf_encoded_again(
    data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_LARGE", 400)
    build_corpus(data, VOCABULARY, start=Bytes())
    before = entries(cache, "shards")
    assert len(before) > 4
    path = Path(path_of(data), "0.py")
    path.write_text(path.read_text(encoding="utf-8") + "# more\n", encoding="utf-8")
    build_corpus(data, VOCABULARY, start=Bytes())
    assert len(set(entries(cache, "shards")) - set(before)) == 1


@pytest.mark.parametrize("large", [1, 300, 10**9])
def test_shelves_change_nothing_but_the_order(
    large: int, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents by domain and side against those of a plain reading, whatever is joined of how many files."""
    monkeypatch.setattr(library, "_LARGE", large)
    corpus = build_corpus(data, VOCABULARY, start=Bytes())
    expected = split(path_texts(Path(path_of(data))), data.held_out)
    for held_out, texts in ((False, corpus.train), (True, corpus.held_out)):
        for domain, text in texts.items():
            spans = zip(text.starts_N.tolist(), text.ends_N.tolist(), strict=True)
            found = [corpus.tokenizer.decode(text.ids_T[start:end].tolist()) for start, end in spans]
            wanted = [d.text for d in expected if d.domain == domain and d.held_out == held_out]
            assert sorted(found) == sorted(wanted)
            assert len(text.sizes_T) == len(text.syntax_T) == (text.token_count if held_out else 0)
            assert int(text.sizes_T[:].sum()) == (text.byte_count if held_out else 0)


def test_other_settings_are_other_entries(data: Data, cache: Path) -> None:
    build_corpus(data, VOCABULARY)
    build_corpus(data, VOCABULARY + 1)
    build_corpus(data, VOCABULARY, start=Bytes())
    build_corpus(dataclasses.replace(data, held_out=0.5), VOCABULARY)
    build_corpus(dataclasses.replace(data, sequence_length=8, temperature=0.1), VOCABULARY)
    assert len(entries(cache, "shards")) == 4


def test_changed_text_is_another_corpus(data: Data) -> None:
    first = build_corpus(data, VOCABULARY)
    Path(path_of(data), "0.py").write_text("y = 2\n")
    assert build_corpus(data, VOCABULARY).sha256 != first.sha256


FILES = (
    ("tokenizers", "tokenizer.json"),
    ("shards", "index.json"),
    ("shards", "train-0-ids.bin"),
    ("shards", "held_out-1-syntax.bin"),
    ("surveys", "unit.npy"),
    ("surveys", "manifest.json"),
)


@pytest.mark.parametrize(("room", "name"), FILES)
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_built_again(data: Data, cache: Path, room: str, name: str, damage: str) -> None:
    make_old(Path(path_of(data)))
    first = build_corpus(data, VOCABULARY)
    (entry,) = entries(cache, room)
    content = (entry / name).read_bytes()
    (entry / name).unlink()  # not in place: the first corpus has it mapped
    match damage:
        case "cut":
            (entry / name).write_bytes(content[:-1])
        case "changed":
            (entry / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        case _:
            pass
    assert not store.entry_is_whole(entry)
    assert_same(build_corpus(data, VOCABULARY), first)
    assert store.entry_is_whole(entry)


def test_a_cache_that_cannot_be_written_stops_nothing(
    data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build_corpus(data, VOCABULARY)
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    notices: list[str] = []
    assert_same(build_corpus(data, VOCABULARY, progress=notices.append), expected)
    assert any("cannot be written" in notice for notice in notices)


def test_a_full_disk_leaves_nothing_behind(data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    notices: list[str] = []
    build_corpus(data, VOCABULARY, progress=notices.append)
    assert any("no space left" in notice for notice in notices)
    assert not (cache / "shards").exists() or entries(cache, "shards") == []


def test_what_a_killed_process_left_goes_with_the_next_write(data: Data, cache: Path) -> None:
    leftover = cache / "shards" / f".{'a' * 64}.tmp-{'0' * 16}"
    leftover.mkdir(parents=True)
    (leftover / "train-0-ids.bin").write_bytes(b"half")
    build_corpus(data, VOCABULARY)
    assert not leftover.exists()


def test_a_text_that_changes_while_it_is_read_is_told(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.Library.open(data)
    Path(path_of(data), "0.py").write_text("y = 2\n")
    with pytest.raises(ConsiliumError, match="changed while it was read"):
        list(found.documents(0))


def test_arrays_from_the_cache_are_mapped_and_read_only(data: Data) -> None:
    build_corpus(data, VOCABULARY)
    ids = build_corpus(data, VOCABULARY).train["py"].ids_T
    assert isinstance(ids, np.memmap)
    assert not ids.flags.writeable
    assert ids.dtype == np.uint16


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("CONSILIUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "consilium"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "consilium"


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whom the system does not know, as in a container that gives out numbers; what is temporary."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("CONSILIUM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path / f"consilium-{os.getuid()}"


def test_who_has_no_home_has_a_cache_that_nobody_else_writes(homeless: Path) -> None:
    for _ in range(2):
        assert cache_folder() == homeless
        assert homeless.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["open", "link", "file"])
def test_a_cache_that_somebody_planted_is_not_used(homeless: Path, planted: str) -> None:
    match planted:
        case "open":
            homeless.mkdir()
            homeless.chmod(0o777)
        case "link":
            (homeless.parent / "elsewhere").mkdir(mode=0o700)
            homeless.symlink_to(homeless.parent / "elsewhere")
        case _:
            homeless.touch()
    with pytest.raises(ConsiliumError, match=r"has no home and .* belongs to others; set CONSILIUM_CACHE"):
        cache_folder()


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
    texts = [Text(f"text {i}", "code", f"a {i}", f"a {i}") for i in range(30)]
    monkeypatch.setattr(library, "builtin_texts", lambda: texts)
    corpus = held_out_corpus(Data(), Tokenizer.of_bytes())
    expected = "".join(d.text for d in split(texts, Data().held_out) if d.held_out)
    assert corpus.tokenizer.decode(corpus.held_out["code"].ids_T.tolist()) == expected


def test_held_out_text_teaches_the_tokenizer_nothing(tmp_path: Path) -> None:
    """Also where it is the tail of a text: secret words come at the end alone."""
    common = "".join(f"the {word} of a house.\n" for word in ("door", "roof", "wall") * 400)
    for name, secret in (("one", "zyzzyva\n"), ("two", "jackpot\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(common + secret * 200)
    corpora = [
        build_corpus(Data(sources=(TextPath(path=str(tmp_path / name)),), held_out=0.2), 320)
        for name in ("one", "two")
    ]
    assert corpora[0].tokenizer.files() == corpora[1].tokenizer.files()
