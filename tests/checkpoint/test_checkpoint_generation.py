"""Token ids and sampling of a folder: read as transformers reads them, and kept through every copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.models import llama, saved, trained
from consilium.checkpoint import store
from consilium.checkpoint.convert import convert
from consilium.checkpoint.hf.generation import generation_config, read_generation
from consilium.config.generation import GenerationDefaults
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError

KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
ID = st.none() | st.integers(0, 50)
ENDS = ID | st.lists(st.integers(0, 50), min_size=1, max_size=3)
TOKENS = st.fixed_dictionaries({}, optional={"bos_token_id": ID, "eos_token_id": ENDS, "pad_token_id": ID})


def written(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(dict.fromkeys(ids)) if isinstance(ids, list) else [ids]


@given(config=TOKENS, generation=st.none() | TOKENS)
def test_ids_are_those_of_transformers(
    config: dict[str, Any], generation: dict[str, Any] | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Where generation_config.json leaves one out, transformers has none and we that of config.json."""
    folder = written(tmp_path_factory.getbasetemp() / "ids", config, generation)
    name = "config.json" if generation is None else "generation_config.json"
    theirs = transformers.GenerationConfig.from_pretrained(folder, config_file_name=name)
    ours = read_generation(folder)
    for key, found in zip(KEYS, ([ours.begin], list(ours.ends), [ours.padding]), strict=True):
        said = getattr(theirs, key)
        assert [one for one in found if one is not None] == as_list(config.get(key) if said is None else said)


@pytest.mark.parametrize("tokenizer", [None, Tokenizer.of_bytes()], ids=["alone", "with a tokenizer"])
@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}, None),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 5], "bos_token_id": 1, "temperature": 0.6}),
        ({"eos_token_id": [7]}, {"eos_token_id": 7, "do_sample": True, "top_k": 20, "chat_format": "chatml"}),
        ({}, {"eos_token_id": [0, 3], "pad_token_id": 3}),
        ({"pad_token_id": -1, "eos_token_id": 4}, None),
    ],
)
@pytest.mark.parametrize("copy", ["save", "convert"])
def test_what_both_files_say_survives_a_copy(
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    copy: str,
    tokenizer: Tokenizer | None,
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path / "a", llama(), manifest=False)
    keys = json.loads((folder / "config.json").read_text())
    written(folder, keys | dict.fromkeys(KEYS) | config, generation)
    copies: dict[str, Callable[[], None]] = {
        "save": lambda: store.save(store.load(folder), tmp_path / "b", tokenizer=tokenizer),
        "convert": lambda: convert(folder, tmp_path / "b"),
    }
    copies[copy]()
    after = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {key: after[key] for key in KEYS} == dict.fromkeys(KEYS) | config
    found, before = read_generation(tmp_path / "b"), read_generation(folder)
    assert (found.begin, found.ends, found.padding) == (before.begin, before.ends, before.padding)
    if generation is not None:
        assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == generation


def test_a_new_model_takes_the_ids_of_its_tokenizer(tmp_path: Path) -> None:
    store.save(trained(llama()), tmp_path / "m", tokenizer=Tokenizer.of_bytes())
    assert read_generation(tmp_path / "m").ends == (Tokenizer.of_bytes().eos_id,)
    assert store.load(tmp_path / "m").generation.ends == (Tokenizer.of_bytes().eos_id,)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, None),
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({"temperature": 0.6}, 0.6),
    ],
)
def test_the_temperature_is_what_the_authors_sample_with(
    generation: dict[str, Any], expected: float | None, tmp_path: Path
) -> None:
    assert read_generation(written(tmp_path, {}, generation)).temperature == expected


def test_sampling_that_no_file_gave_is_written_and_read_again(tmp_path: Path) -> None:
    said = GenerationDefaults(begin=1, ends=(2, 3), temperature=0.5, top_k=20, top_p=0.9, min_p=0.1)
    found = read_generation(written(tmp_path, {}, generation_config(said)))
    for name in ("begin", "ends", "padding", "temperature", "top_k", "top_p", "min_p"):
        assert getattr(found, name) == getattr(said, name)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(-2, 9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@given(key=st.sampled_from(KEYS + SAMPLING), value=VALUES)
def test_any_value_is_read_or_refused_by_the_name_of_its_key(
    key: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = written(tmp_path_factory.getbasetemp() / "any", {}, {key: value})
    said, found = "", GenerationDefaults()
    try:
        found = read_generation(folder)
    except ConsiliumError as error:
        said = str(error)
    assert said.startswith(f"{folder / 'generation_config.json'}: {key} is ") or not said
    assert "\n" not in said
    assert all(type(one) is int for one in (*found.ends, found.begin or 0, found.padding or 0))
