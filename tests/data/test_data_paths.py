from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from consilium.data.documents import split
from consilium.data.paths import path_texts
from consilium.errors import ConsiliumError


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def test_the_domain_is_the_first_folder_or_the_suffix(tmp_path: Path) -> None:
    write(tmp_path, a_txt="one", b_md="two", law__deep__c_txt="three", law__d_md="four", e_py="x = 1")
    assert {(t.domain, t.name, t.text) for t in path_texts(tmp_path)} == {
        ("txt", "a.txt", "one"),
        ("md", "b.md", "two"),
        ("law", "law/deep/c.txt", "three"),
        ("law", "law/d.md", "four"),
        ("py", "e.py", "x = 1"),
    }


def test_other_files_hidden_files_and_empty_files_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, a_txt="one", image_png="no", empty_txt=" \n", _git__b_txt="no", _hidden_txt="no")
    assert [text.name for text in path_texts(tmp_path)] == ["a.txt"]


def test_a_single_file_is_read(tmp_path: Path) -> None:
    (text,) = path_texts(write(tmp_path, a_md="# Title") / "a.md")
    assert (text.domain, text.name, text.text) == ("md", "a.md", "# Title")


def test_records_are_texts_with_a_domain_of_their_own(tmp_path: Path) -> None:
    lines = [{"text": "one"}, {"text": "zwei\u2028drei", "domain": "de"}]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    found = path_texts(write(tmp_path, a_jsonl=content) / "a.jsonl")
    assert [(t.domain, t.name, t.text) for t in found] == [
        ("jsonl", "a.jsonl:1", "one"),
        ("de", "a.jsonl:3", "zwei\u2028drei"),
    ]


def test_a_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert path_texts(tmp_path)[0].text == "one\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"has no text"),
        ("a.txt", b"a\0b", r"NUL bytes"),
        ("a.txt", b"\xff\xfe\x00", r"not UTF-8 text \(byte 0\)"),
        ("a.pdf", b"text", r"'\.pdf'.*\.txt, .*\.jsonl\.zst or \.parquet"),
        ("a", b"text", r"a has no ending"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', r"line 2 has no key 'text'.*Did you mean 'txt'"),
        ("a.jsonl", b'\n{"text": 3}', r"line 2: key 'text' is int"),
        ("a.jsonl", b'{"text": "a", "domain": 1}', r"line 1: key 'domain' is int"),
        ("a.jsonl", b'{"text": "a", "domain": "\\ud800"}', r"line 1: key 'domain' has half of a surrogate"),
        ("a.jsonl", b'["text"]', r"line 1 is list, not an object"),
        ("a.jsonl", b'{"text": ', r"line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"half of a surrogate pair"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_file(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConsiliumError, match=message) as raised:
        path_texts(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_binary_file_inside_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path, a_txt="one", b_txt="a\0b")
    with pytest.raises(ConsiliumError, match=r"b\.txt has NUL bytes"):
        path_texts(tmp_path)


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="does not exist"):
        path_texts(tmp_path / "nowhere")
    with pytest.raises(ConsiliumError, match=r"has no \.txt"):
        path_texts(tmp_path)


def test_a_run_and_a_model_inside_are_left_out_and_said(tmp_path: Path) -> None:
    write(tmp_path, a_txt="one", runs__first__config_yaml="x", runs__first__metrics_jsonl="{}")
    write(tmp_path, model__config_json="{}", model__merges_txt="a b", model__model_safetensors="")
    said: list[str] = []
    assert [text.name for text in path_texts(tmp_path, said.append)] == ["a.txt"]
    assert any("runs/first" in line and "a training run" in line for line in said)
    assert any("model" in line and "a model" in line for line in said)


def test_links_are_read_once_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path, data__a_txt="one", data__b__c_txt="two", elsewhere__d_txt="three")
    data = tmp_path / "data"
    (data / "a_link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "b" / "loop").symlink_to(data, target_is_directory=True)
    (data / "again").symlink_to(data / "b", target_is_directory=True)
    (data / "z.txt").symlink_to(data / "a.txt")
    assert sorted(t.name for t in path_texts(data)) == ["a.txt", "a_link/d.txt", "b/c.txt"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(ConsiliumError, match=r"cannot read .*a\.txt"):
        path_texts(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names in Unicode")
def test_a_name_in_any_bytes_is_a_name(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (text,) = path_texts(tmp_path)
    assert (text.domain, text.name) == ("caf\\xe9", "caf\\xe9/a.txt")
    assert split([text], 0.5)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has pipes by name")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ConsiliumError, match="neither a file nor a folder"):
        path_texts(tmp_path)
