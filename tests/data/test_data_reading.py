"""Files of every kind are read as one stream of texts, in bounded memory, and hostile ones are refused."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from consilium.data import reading as module
from consilium.data.documents import Text
from consilium.data.forms import Completion, Message, Talk
from consilium.data.paths import path_texts
from consilium.data.reading import read_texts, suffix_of
from consilium.errors import ConsiliumError

RECORDS = [
    {"text": "one\nof lines"},
    {"text": "zwei\u2028drei 你好", "domain": "de"},
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
]
CONTENTS = [
    "one\nof lines",
    "zwei\u2028drei 你好",
    Completion("2 + 2 = ", "4"),
    Talk((Message("user", "hi"), Message("assistant", "hello"))),
]


def jsonl(records: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def parquet(records: list[dict[str, object]]) -> bytes:
    """Columns that a record has not are null, as in any table."""
    names = sorted({name for record in records for name in record})
    table = pa.table({name: [record.get(name) for record in records] for name in names})
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=2)
    return stream.getvalue()


PACK: dict[str, Callable[[list[dict[str, object]]], bytes]] = {
    ".jsonl": jsonl,
    ".jsonl.gz": lambda records: gzip.compress(jsonl(records)),
    ".jsonl.zst": lambda records: zstandard.compress(jsonl(records)),
    ".parquet": parquet,
}
every = pytest.mark.parametrize("suffix", PACK)


def read(path: Path) -> list[Text]:
    return list(read_texts(path, path.name, "d"))


def written(folder: Path, suffix: str, content: bytes) -> Path:
    path = folder / f"a{suffix}"
    path.write_bytes(content)
    return path


def test_a_null_is_an_absent_key_in_lines_as_in_tables(tmp_path: Path) -> None:
    """What a table of several forms becomes when it is written as lines."""
    names = sorted({name for record in RECORDS for name in record})
    filled: list[dict[str, object]] = [{name: record.get(name) for name in names} for record in RECORDS]
    lines, table = (
        read(written(tmp_path, suffix, PACK[suffix](filled))) for suffix in (".jsonl", ".parquet")
    )
    assert [text.content for text in lines] == [text.content for text in table] == CONTENTS
    assert [text.domain for text in lines] == [text.domain for text in table]


@every
def test_records_of_every_file_are_the_same_contents(suffix: str, tmp_path: Path) -> None:
    found = read(written(tmp_path, suffix, PACK[suffix](RECORDS)))
    assert [text.content for text in found] == CONTENTS
    assert [text.domain for text in found] == ["d", "de", "d", "d"]
    assert [text.name for text in found] == [f"a{suffix}:{number}" for number in (1, 2, 3, 4)]


@every
def test_damaged_files_are_told_in_a_sentence(suffix: str, tmp_path: Path) -> None:
    content = PACK[suffix]([{"text": f"text {number} " * 20} for number in range(200)])
    cuts = [content[:size] for size in range(1, len(content), max(1, len(content) // 40))]
    for damaged in (*(cuts if suffix != ".jsonl" else cuts[:2]), b"\x00\x01\x02", b"\xff" * 99):
        with pytest.raises(ConsiliumError) as refused:
            read(written(tmp_path, suffix, damaged))
        assert str(refused.value).startswith("data: ")


def test_compressed_frames_behind_each_other_are_all_read(tmp_path: Path) -> None:
    halves = [jsonl([{"text": "one"}]), jsonl([{"text": "two"}])]
    skipped = b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab"
    checked = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress
    assert read(written(tmp_path, ".jsonl.zst", skipped + checked(halves[0])))[0].content == "one"
    for suffix, pack in ((".jsonl.gz", gzip.compress), (".jsonl.zst", zstandard.compress)):
        found = read(written(tmp_path, suffix, b"".join(map(pack, halves))))
        assert [text.content for text in found] == ["one", "two"]


def test_a_folder_holds_files_of_every_kind(tmp_path: Path) -> None:
    for suffix, pack in PACK.items():
        written(tmp_path, suffix, pack([{"text": suffix}]))
    (tmp_path / "b.md").write_text("# plain")
    found = {(text.domain, text.text) for text in path_texts(tmp_path)}
    assert found == {("md", "# plain"), *((s.lstrip(".").partition(".")[0], s) for s in PACK)}
    assert suffix_of(Path("A.JSONL.GZ")) == ".jsonl.gz"


@pytest.mark.parametrize("name", ["zstandard", "pyarrow.parquet"])
def test_a_missing_library_is_told_with_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    suffix = ".jsonl.zst" if name == "zstandard" else ".parquet"
    with pytest.raises(ConsiliumError, match=r"pip install 'consilium-moe\[data\]'"):
        read(written(tmp_path, suffix, PACK[suffix](RECORDS)))


def peak(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_giant_line_is_refused_in_bounded_memory(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_LINE", 2**16)
    content = b'{"text": "' + b"a" * 2**26
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path = written(tmp_path, suffix, pack(content))

    def refused() -> None:
        with pytest.raises(ConsiliumError, match="line 1 is longer than"):
            read(path)

    assert peak(refused) < 2**23


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FREE", 2**12)
    monkeypatch.setattr(module, "_DENSEST", 10)
    content = jsonl([{"text": "a" * 100}] * 5000)
    pack = gzip.compress if suffix == ".jsonl.gz" else zstandard.compress
    with pytest.raises(ConsiliumError, match="unpacks to more than 10 times its size"):
        read(written(tmp_path, suffix, pack(content)))


def test_a_column_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP", 100)
    with pytest.raises(ConsiliumError, match=r"row group 1 of .* smaller row groups"):
        read(written(tmp_path, ".parquet", parquet([{"text": "a" * 1000}])))


def test_only_columns_that_are_known_are_read(tmp_path: Path) -> None:
    found = read(written(tmp_path, ".parquet", parquet([{"text": "a", "url": "b", "score": 1.0}])))
    assert [text.content for text in found] == ["a"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"txt": "a"}, r"line 1 has no key 'text'.*Did you mean 'txt'"),
        ({"text": None, "domain": "a"}, r"line 1: key 'text' is null; write text in it"),
        ({"prompt": "a", "completion": None}, r"line 1: key 'completion' is null"),
        ({"messages": [{"role": "user", "content": None}]}, r"key 'content' is null, not a string"),
        ({"prompt": "a"}, r"line 1 has no key 'completion'"),
        ({"text": "a", "messages": []}, r"has 'text' and 'messages'; .*keep one"),
        ({"messages": "hi"}, r"'messages' is no list of messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, r"no message of the assistant"),
        ({"messages": [{"role": "user", "contents": "hi"}]}, r"message 1 has no key 'content'.*Did you mean"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
            r"'tool_calls', which is not read",
        ),
        ({"prompt": 1, "completion": "a"}, r"key 'prompt' is int"),
        ({"text": "a\ud800"}, r"half of a surrogate"),
    ],
)
def test_a_record_of_no_form_is_refused_by_its_line(
    record: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConsiliumError, match=message):
        read(written(tmp_path, ".jsonl", json.dumps(record).encode()))


@given(
    text=st.text(st.sampled_from("aé你😀\r\n \ufeff"), max_size=60),
    block=st.integers(1, 9),
    longest=st.integers(2, 20),
)
def test_a_text_read_in_blocks_is_the_text(
    text: str, block: int, longest: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode("utf-8-sig"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr("consilium.data.documents.LONGEST", longest)
        found = read(path)
    assert "".join(part.text for part in found) == text.replace("\r\n", "\n")
    assert all(part.unit == "a.txt" for part in found)
    assert len({part.name for part in found}) == len(found)


@given(data=st.binary(min_size=1, max_size=40), block=st.integers(1, 9))
def test_the_byte_that_is_no_utf8_is_named(
    data: bytes, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "a.txt"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        try:
            expected = data.removeprefix(b"\xef\xbb\xbf").decode()
        except UnicodeDecodeError as error:
            at = error.start + (len(data) - len(data.removeprefix(b"\xef\xbb\xbf")))
            with pytest.raises(ConsiliumError, match=rf"not UTF-8 text \(byte {at}\)|NUL bytes"):
                read(path)
            return
        if "\0" in expected:
            with pytest.raises(ConsiliumError, match="NUL bytes"):
                read(path)
        else:
            assert "".join(part.text for part in read(path)) == expected.replace("\r\n", "\n")
