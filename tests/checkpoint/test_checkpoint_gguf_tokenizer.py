"""The tokenizer in a GGUF file is that of the folder, or is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from checkpoint.gguf_models import llama
from checkpoint.models import trained
from consilium.checkpoint import store
from consilium.checkpoint.gguf.export import export
from consilium.data.documents import Document
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError


def tokenizer_keys(folder: Path, tokenizer: Tokenizer, **config: object) -> dict[str, Any]:
    size = tokenizer.vocab_size + 5
    store.save(trained(dataclasses.replace(llama(), vocab_size=size)), folder / "model", tokenizer=tokenizer)
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (folder / "model" / "manifest.json").unlink()
    export(folder / "model", folder / "model.gguf")
    return {name: field.contents() for name, field in GGUFReader(folder / "model.gguf").fields.items()}


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    text = "the cat sat on the mat and the dog sat on the log; " * 20
    return Tokenizer.train([Document(name="a", domain="prose", text=text, held_out=False)], 300)


def test_the_tokenizer_is_that_of_the_folder(learned: Tokenizer, tmp_path: Path) -> None:
    found = tokenizer_keys(tmp_path, learned, chat_template="{{ messages }}")
    described = json.loads(learned.files()["tokenizer.json"])
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert {token: tokens.index(token) for token in described["model"]["vocab"]} == described["model"][
        "vocab"
    ]
    assert tokens[-5:] == [f"[PAD{learned.vocab_size + i}]" for i in range(5)]
    assert (kinds[:4], kinds[-6:]) == ([3, 3, 3, 1], [1, 5, 5, 5, 5, 5])
    assert [merge.split(" ") for merge in found["tokenizer.ggml.merges"]] == described["model"]["merges"]
    ends = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    assert ends == {"bos": 0, "eos": 0, "padding": 0}
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_a_tokenizer_says_itself_whether_prompts_are_opened(learned: Tokenizer, tmp_path: Path) -> None:
    found = tokenizer_keys(tmp_path, learned, add_bos_token=False, bos_token=None)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in found


def test_a_tokenizer_of_bytes_has_a_merge_that_no_text_needs(tmp_path: Path) -> None:
    (merge,) = tokenizer_keys(tmp_path, Tokenizer.of_bytes())["tokenizer.ggml.merges"]
    assert merge.encode("latin-1") == b"\xff \xff"


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "NFC"}},
    ],
)
def test_a_tokenizer_that_would_be_read_differently_is_refused(
    change: dict[str, object], learned: Tokenizer, tmp_path: Path
) -> None:
    size = learned.vocab_size
    config = dataclasses.replace(llama(), vocab_size=size)
    store.save(trained(config), tmp_path / "model", tokenizer=learned)
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConsiliumError, match=r"tokenizer\.json cuts text in a way that is neither"):
        export(tmp_path / "model", tmp_path / "model.gguf")


def test_a_tokenizer_larger_than_the_model_is_refused(learned: Tokenizer, tmp_path: Path) -> None:
    store.save(trained(llama()), tmp_path / "model", tokenizer=learned)
    with pytest.raises(ConsiliumError, match=r"has \d+ tokens and the model 259"):
        export(tmp_path / "model", tmp_path / "model.gguf")
