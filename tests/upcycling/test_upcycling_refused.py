"""What cannot be upcycled is said in one sentence, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.data.corpus import measured_corpus, whole_documents
from consilium.data.paths import path_texts
from consilium.data.tokenizer import Tokenizer
from consilium.evaluation.bits import Reading
from consilium.evaluation.walk import passages, walk
from consilium.planner.parameters import parameters
from consilium.records.upcycling import NAME
from consilium.report.plain import sized
from consilium.upcycling.run import upcycle
from upcycling.sources import LLAMA, saved, text


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    saved(LLAMA, folder / "dense")
    moe = MoE(experts=4, width=16, router=Router(select=TopK(k=2)))
    saved(dataclasses.replace(LLAMA, family="mixtral", moe=moe), folder / "sparse")
    saved(dataclasses.replace(LLAMA, mtp=dataclasses.replace(LLAMA.mtp, depth=1)), folder / "ahead")
    text(folder / "a.txt")
    (folder / "short.txt").write_text("a few words")
    (folder / "empty.txt").write_text("")
    (folder / "theirs").mkdir()
    (folder / "theirs" / "notes.txt").write_text("mine")
    return folder


def words(home: Path, out: Path, text_: str) -> list[str]:
    given = text_.split()
    data = [] if "--data" in given else ["--data", str(home / "a.txt")]
    places = [str(home / given[0]), str(out)]
    return ["upcycle", *places, *(str(home / w) if w.endswith(".txt") else w for w in given[1:]), *data]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("dense --method copi --experts 2 --top-k 1", "unknown method 'copi'. Did you mean 'copy'?"),
        ("dense --method copy --experts 2 --top-k 3", "top-3 of 2 experts is impossible"),
        ("dense --method split-random --experts 7 --top-k 2", "not divisible into 7 parts"),
        ("dense --method split-random --experts 4 --top-k 2 --shared 1", "not divisible into 5 parts"),
        ("dense --method split-inter --experts 4 --top-k 2", "give --shared 1 or more"),
        ("dense --method copy --experts 4 --top-k 2 --shared 2", "shared expert is the whole network"),
        ("dense --method virtual-group --experts 4 --top-k 3 --granularity 2", "a multiple of 2"),
        ("dense --method virtual-group --experts 4 --top-k 5 --granularity 5", "not divisible into 5 parts"),
        (
            "dense --method virtual-group --experts 2 --top-k 2 --set method.scaling=cube_root",
            "exact for squared_relu",
        ),
        ("dense --method copy --experts 2 --top-k 1 --granularity 2", "is for virtual-group and qwen"),
        ("dense --method copy --experts 2 --top-k 1 --prompts no.yaml", "--prompts is for btx"),
        ("dense --method copy --experts 2 --top-k 1 --set experts=4", "says other than its option"),
        ("dense --method copy --experts 2 --top-k 1 --set method=drop", "says other than its option"),
        ("dense --method copy --experts 2 --top-k 1 --set method.kind=drop", "says other than its option"),
        ("dense --method copy --experts 2 --top-k 1 --seed 1 --set seed=2", "says other than its option"),
        ("dense --method btx --top-k 2 --set method.directions.of=last", "has no kind; add method."),
        ("ahead --method copy --experts 2 --top-k 1", "modules that predict further tokens"),
        ("ahead --method split-random --experts 4 --top-k 4", "modules that predict further tokens"),
        ("dense --method copy --experts 2 --top-k 1 --set gaet=mlp", "Did you mean 'gate'?"),
        ("dense --method copy --experts 2 --top-k 1 --set method.fresh=0.5", "unknown key"),
        ("dense --method drop --experts 2 --top-k 1 --set method.fresh=1.5", "less than or equal to 1"),
        (
            "dense --method copy --experts 2 --top-k 1 --set scale=ratio",
            "copy splits no network; leave it out",
        ),
        ("dense --method mla --set gate=mlp", "gate is mlp, but mla makes latent attention"),
        ("dense --method mla --set moe_every=2", "moe_every is 2, but mla makes latent attention"),
        ("sparse --method expand --experts 8 --top-k 2 --shared 1", "expand keeps what its model has"),
        (
            "dense --method copy --experts 2 --top-k 1 --set dense_first=2",
            "none of the 2 layers gets experts",
        ),
        ("dense --method copy --experts 2 --top-k 1 --set moe_every=3", "none of the 2 layers gets experts"),
        ("dense --method copy --experts 2 --top-k 1 --set spread=1e-9", "greater than or equal to 0.000001"),
        ("dense --method copy --experts 2 --top-k 1 --set spread=1e3", "less than or equal to 10"),
        ("dense --method copy --experts 2 --top-k 1 --set kv_rank=4", "Did you mean 'method.kv_rank'?"),
        ("dense --method btx --top-k 1", "give --sources MODEL MODEL"),
        ("sparse --method copy --experts 2 --top-k 1", "has experts already"),
        ("dense --method expand --experts 4 --top-k 1", "is dense; choose --method copy"),
        ("sparse --method expand --experts 6 --top-k 2", "multiple of 4"),
        ("dense --method copy --experts 8 --top-k 1 --data short.txt", "give more text"),
        ("dense --method split-inner --experts 4 --top-k 2 --data empty.txt", "empty.txt"),
        ("dense --method split-inner --experts 4 --top-k 2 --data short.txt", "give more text"),
        ("nothere --method copy --experts 2 --top-k 1", "no such folder"),
        ("theirs --method copy --experts 2 --top-k 1", "is not a checkpoint"),
        ("dense --method copy --experts 2 --top-k 1 --data nothere.txt", "nothere.txt"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    home: Path, tmp_path: Path, given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(home, tmp_path / "out", given)) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert not told.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", ["", "echo one\n", "- a\n"])
def test_a_file_that_holds_no_prompts_is_said_to(
    home: Path, tmp_path: Path, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.yaml").write_text(written)
    given = f"dense --method btx --top-k 2 --prompts {tmp_path / 'p.yaml'}"
    assert main(words(home, tmp_path / "out", given)) == 2
    assert "p.yaml: it has keys of its own: experts; set those." in capsys.readouterr().err


COPY = "dense --method copy --experts 2 --top-k 1"


def test_a_folder_of_somebody_else_stays_and_is_told_before_the_work(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.upcycling.run.survey", None)
    assert main(words(home, home / "theirs", COPY)) == 2
    assert "theirs" in capsys.readouterr().err
    assert [path.name for path in (home / "theirs").iterdir()] == ["notes.txt"]
    assert main(words(home, home / "dense" / "inside", COPY)) == 2
    saved_ = {path.name: path.read_bytes() for path in (home / "sparse").iterdir()}
    assert main(words(home, home / "sparse", COPY)) == 2
    assert "no upcycling made" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (home / "sparse").iterdir()} == saved_
    assert main(words(home, home / "dense", COPY)) == 2
    assert not (home / "dense" / "inside").exists()


def test_without_a_tokenizer_there_is_no_text(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "dense", tmp_path / "dense")
    (tmp_path / "dense/tokenizer.json").unlink()
    (tmp_path / "dense/manifest.json").unlink()
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "out"), *COPY.split()[1:]]) == 2
    assert "no text to calibrate on" in capsys.readouterr().err


def test_a_full_disk_is_told_before_the_first_byte(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says how much it takes, does with as much, and not with a byte less."""
    assert main(words(home, tmp_path / "there", COPY)) == 0
    config = store.open_folder(tmp_path / "there").config
    needed = 4 * parameters(config).total
    assert f"the new model takes {sized(needed)} on the disk" in capsys.readouterr().err
    monkeypatch.setattr("consilium.disk.files._free", lambda place: needed)
    assert main(words(home, tmp_path / "out", COPY)) == 0
    capsys.readouterr()
    monkeypatch.setattr("consilium.disk.files._free", lambda place: needed - 1)
    monkeypatch.setattr("consilium.upcycling.run.survey", None)
    assert main(words(home, tmp_path / "none", COPY)) == 2
    assert "the new model" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_run_that_fails_in_the_middle_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr("consilium.upcycling.run.certify", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        main(words(home, tmp_path / "out", COPY))
    assert not list(tmp_path.iterdir())


def test_the_command_prints_a_certificate_and_one_json_object(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(home, tmp_path / "out", COPY)) == 0
    told = capsys.readouterr().out
    assert "equal, as the method promises" in told
    assert "gate: rows levelled" in told
    assert told.rstrip().endswith(f"--data {home / 'a.txt'}")  # what goes on runs as it stands
    assert "bits per byte" in told
    assert main([*words(home, tmp_path / "out", COPY), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] is True
    assert found["certificate"]["relative"] < 1e-5
    stored = json.loads((tmp_path / "out" / NAME).read_text())
    assert stored["certificate"] == found["certificate"]
    assert_says(told, found["certificate"])


def assert_says(told: str, certificate: Mapping[str, Any]) -> None:
    """The printed certificate has the numbers of the record: by layer, end to end, in bits."""
    lines = told.splitlines()
    for layer in certificate["layers"]:
        number, largest, relative, _ = lines[1 + layer["layer"]].split()
        assert int(number) == layer["layer"]
        assert (largest, relative) == (f"{layer['largest']:.2e}", f"{layer['relative']:.2e}")
        assert layer["largest"] > 0 or layer["relative"] == 0
    ends, before, after = (certificate[k] for k in ("largest", "bits_per_byte_before", "bits_per_byte_after"))
    assert f"logits: max difference {ends:.2e}, relative {certificate['relative']:.2e}" in lines
    assert f"bits per byte: {before:.4f} before, {after:.4f} after ({after - before:+.4f}), on" in told


def test_a_certificate_is_what_the_two_models_say(home: Path, tmp_path: Path) -> None:
    """Largest and relative difference of their logits and of what their layers make of the same input."""
    asked = {"method": "split-random", "experts": 4, "top_k": 2, "data": home / "a.txt"}
    found = upcycle(home / "dense", tmp_path / "moe", calibration_tokens=512, **asked)
    corpus = measured_corpus(whole_documents(path_texts(home / "a.txt")), Tokenizer.load(home / "dense"))
    reading = Reading(min(512, store.open_folder(home / "dense").config.max_length), limit_tokens=512)
    text_ = passages(corpus, reading)
    first, second = (store.load(place).eval() for place in (home / "dense", tmp_path / "moe"))
    apart, size, largest = 0.0, 0.0, 0.0
    with torch.no_grad():
        for passage in text_:
            logits = [
                passage.tokens(model(passage.inputs.ids_BS).logits).double() for model in (first, second)
            ]
            apart += float((logits[1] - logits[0]).square().sum())
            size += float(logits[0].square().sum())
            largest = max(largest, float((logits[1] - logits[0]).abs().max()))
    assert found.largest == pytest.approx(largest, rel=1e-4)
    assert found.relative == pytest.approx((apart / size) ** 0.5, rel=1e-4)
    assert found.bits_per_byte_after != found.bits_per_byte_before
    # Before the first experts both models are one, so that these get what the network got.
    visits = [next(walk(store.open_folder(place), text_)) for place in (home / "dense", tmp_path / "moe")]
    expected, made = (
        torch.cat([passage.tokens(y) for passage, y in zip(text_, visit.fed, strict=True)])
        for visit in visits
    )
    assert found.layers[0].relative == pytest.approx(
        float((made - expected).norm() / expected.norm()), rel=1e-4
    )
    assert found.layers[0].largest == pytest.approx(float((made - expected).abs().max()), rel=1e-4)


def test_nothing_is_said_of_gates_that_nobody_levelled(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(home, tmp_path / "out", "sparse --method expand --experts 8 --top-k 2")) == 0
    assert "levelled" not in capsys.readouterr().out


def test_the_built_in_text_has_a_name(home: Path, tmp_path: Path) -> None:
    asked = {"method": "copy", "experts": 2, "top_k": 1, "calibration_tokens": 256}
    by_name = upcycle(home / "dense", tmp_path / "a", data="builtin", **asked)
    assert by_name == upcycle(home / "dense", tmp_path / "b", **asked)


def test_a_promise_that_is_broken_is_said_and_ends_with_1(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.upcycling.run.promise", lambda source, asked: 1e-30)
    assert main(words(home, tmp_path / "out", COPY)) == 1
    assert "NOT equal" in capsys.readouterr().out


def test_plan_says_what_an_upcycling_would_cost(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("method=copy", "experts=8", "top_k=2")
    asked = [word for key in keys for word in ("--upcycle", key)]
    assert main(["plan", "llama:7b", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["parameters"]
    network, gate = 3 * 4096 * 11008, 4096 * 8
    assert found["total"] == 6_738_415_616 + 32 * (7 * network + gate)
    assert found["active"] == 6_738_415_616 + 32 * (network + gate)
    assert main(["plan", "llama:7b", *asked]) == 0
    assert capsys.readouterr().out.startswith("llama:7b, upcycled: method=copy, experts=8, top_k=2\n")
    for key, said in (("method=copy", "experts is missing"), ("metod=copy", "Did you mean 'method'?")):
        assert main(["plan", "llama:7b", "--upcycle", key]) == 2
        assert said in capsys.readouterr().err
