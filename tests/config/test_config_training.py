"""Training as data: unions switch by their kind, older files load, slips are told."""

from __future__ import annotations

import dataclasses

import pytest

from consilium.config import io
from consilium.config.data import TextPath
from consilium.config.moe import Capacity
from consilium.config.optimizer import Cosine, StepDecay
from consilium.config.training import Bytes, Folder, Train, Training
from consilium.errors import ConsiliumError
from small import DEEPSEEK

CONFIG = Training(model=DEEPSEEK, steps=5)


def replaced(*pairs: str) -> Training:
    return io.replace(CONFIG, dict(pair.split("=", 1) for pair in pairs))


def test_a_kind_switches_a_union_whatever_the_order() -> None:
    assert replaced("schedule.kind=cosine").schedule == Cosine()
    assert replaced("schedule.final=0.5", "schedule.kind=cosine").schedule == Cosine(final=0.5)
    assert replaced("schedule.kind=steps", "schedule.at=[0.5]").schedule == StepDecay(at=(0.5,))
    assert replaced("schedule.kind=wsd") == CONFIG
    assert replaced("tokenizer.kind=bytes").tokenizer == Bytes()
    assert replaced("tokenizer.path=x", "tokenizer.kind=folder").tokenizer == Folder(path="x")
    assert replaced("data.sources.0.kind=path", "data.sources.0.path=x").data.sources == (TextPath(path="x"),)
    found = replaced("model.moe.admission.kind=capacity", "model.moe.admission.factor=1.5").model.moe
    assert found is not None
    assert found.admission == Capacity(factor=1.5)


@pytest.mark.parametrize(
    ("pairs", "answer"),
    [
        (["schedule.kind=cosin"], "unknown kind 'cosin' for schedule"),
        (["schedule.kind=cosine", "schedule.decay=0.5"], "unknown key schedule.*decay"),
        (["schedule.kind=cosine", "schedle.final=1"], "unknown key 'schedle.final'.*schedule"),
        (["tokenizer.kind=folder"], "tokenizer.*path is missing"),
        (["model.moe.balance.losses.7.kind=z"], "unknown key 'model.moe.balance.losses.7.kind'"),
        (["schedule=cosine"], r"^--set: schedule has keys of its own: .*kind, .*; set those\.$"),
        (["batch=9999999"], "^--set: train: 9999999 sequences"),
        (["save_every=0"], r"^--set: save_every = '0'"),
        (["save_every=0m"], "neither steps such as 100 nor minutes such as 10m"),
        (["save_every=soon"], "neither steps such as 100 nor minutes such as 10m"),
    ],
)
def test_a_slip_is_one_sentence(pairs: list[str], answer: str) -> None:
    with pytest.raises(ConsiliumError, match=answer):
        replaced(*pairs)


def test_runs_save_every_ten_minutes_or_as_asked() -> None:
    assert CONFIG.save_every == "10m"
    for written, read in (("100", 100), ("0.5m", "0.5m"), ('"7"', 7)):
        config = replaced(f"save_every={written}")
        assert config.save_every == read
        assert io.from_yaml(Training, io.to_yaml(config)) == config


def test_patterns_are_a_list_or_one_line() -> None:
    for written in ("*,!*.router.*", '["*", "!*.router.*"]'):
        assert replaced(f"freeze={written}").freeze == ("*", "!*.router.*")


@pytest.mark.parametrize("save_every", [None, 7])
def test_a_file_of_the_first_version_loads(save_every: int | None) -> None:
    now = io.to_data(CONFIG)
    for key in ("init", "tokenizer", "freeze"):
        del now[key]
    data = now["data"] | {"source": {"kind": "path", "path": "notes"}, "tokenizer": "bytes"}
    del data["sources"]
    old = now | {"schema_version": 1, "data": data, "save_every": save_every}
    found = io.from_data(Training, old)
    text = dataclasses.replace(CONFIG.data, sources=(TextPath(path="notes"),))
    expected = dataclasses.replace(CONFIG, tokenizer=Bytes(), data=text, save_every=save_every or "10m")
    assert found == expected
    data["tokenizer"] = "bpe"
    assert io.from_data(Training, old).tokenizer == Train()


def test_a_file_of_a_later_version_is_refused_by_name() -> None:
    with pytest.raises(ConsiliumError, match="schema_version = '3'"):
        io.from_data(Training, io.to_data(CONFIG) | {"schema_version": 3})
