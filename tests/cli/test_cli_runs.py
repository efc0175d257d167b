from __future__ import annotations

import dataclasses
import io as streams
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from runs import write_config, write_text

import consilium as cs
from consilium.benchmarking import benchmarks
from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.config import io
from consilium.config.data import Data, TextPath
from consilium.config.model import MTP
from consilium.config.training import Bytes, Training
from consilium.data.library import Library
from consilium.records.bench import BenchRecord
from consilium.records.io import from_json, read_json
from consilium.records.run import SUMMARY_FILE, Summary
from consilium.records.specialisation import SPECIALISATION_FILE, Specialisation
from small import DEEPSEEK


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", str(write_config(folder, text)), "--out", str(folder / "run")]) == 0
    return folder / "run"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_training_leaves_a_complete_run_folder(run: Path) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "meta.json",
        "summary.json",
        "report.html",
        "routing/loads.bin",
    ):
        assert (run / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert {"train/loss", "train/tok_per_sec", "moe/max_over_mean", "moe/layer_1/max_over_mean"} <= lines[
        1
    ].keys()
    assert {"moe/dead_experts", "moe/router_entropy", "moe/dropped_frac"} <= lines[1].keys()
    assert "val/bits_per_byte" in lines[0]


def test_a_run_repeats_from_its_own_configuration(run: Path, tmp_path: Path) -> None:
    assert main(["train", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, again = (
        store.load(folder / "checkpoints/step-3").state_dict() for folder in (run, tmp_path / "again")
    )
    assert all(bool((first[name] == again[name]).all()) for name in first)


def test_an_option_overrides_the_configuration(run: Path, tmp_path: Path, text: Path) -> None:
    words = ["--steps", "1", "--batch", "3", "--lr", "0.01", "--balance", "none", "--seed", "5"]
    words += ["--set", "optimizer.decay=0.0", "--threads", "1", "--dtype", "float32", "--data", str(text)]
    words += ["--save-every", "1", "--eval-every", "1", "--seq", "16"]
    assert main(["train", str(run / "config.yaml"), "--out", str(tmp_path / "o"), *words]) == 0
    config = io.read_yaml(Training, tmp_path / "o/config.yaml")
    assert (config.steps, config.batch, config.seed, config.threads) == (1, 3, 5, 1)
    assert (config.optimizer.learning_rate, config.optimizer.decay) == (0.01, 0.0)
    assert (config.save_every, config.eval_every, config.data.sequence_length) == (1, 1, 16)
    assert config.model.moe is not None
    assert config.model.moe.balance.losses == ()


def test_another_optimizer_keeps_the_rate_that_was_given_or_that_suits_the_model(
    run: Path, tmp_path: Path, text: Path
) -> None:
    words = ["train", str(run / "config.yaml"), "--steps", "1", "--set", "optimizer.kind=muon"]
    assert main([*words, "--out", str(tmp_path / "given"), "--lr", "0.02"]) == 0
    assert main([*words, "--out", str(tmp_path / "kept")]) == 0
    assert main([*words, "--out", str(tmp_path / "set"), "--set", "optimizer.learning_rate=0.5"]) == 0
    rates = {
        name: io.read_yaml(Training, tmp_path / name / "config.yaml").optimizer.learning_rate
        for name in ("given", "kept", "set")
    }
    before = io.read_yaml(Training, run / "config.yaml").optimizer.learning_rate
    assert rates == {"given": 0.02, "kept": before, "set": 0.5}


def test_a_resume_of_nothing_says_that_it_starts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(run / "config.yaml"), "--out", str(tmp_path / "o"), "--resume"]
    assert "holds no run yet: a new one starts there" in said(capsys, *words)
    assert "holds no run yet" not in said(capsys, *words)


def test_tokens_are_turned_into_steps(run: Path, tmp_path: Path) -> None:
    assert main(["train", str(run / "config.yaml"), "--out", str(tmp_path / "o"), "--tokens", "96"]) == 0
    assert io.read_yaml(Training, tmp_path / "o/config.yaml").steps == 2


def test_minutes_are_measured_once_and_stored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(run / "config.yaml"), "--out", str(tmp_path / "o"), "--minutes", "0.005"]
    assert "calibrated" in said(capsys, *words)
    steps = io.read_yaml(Training, tmp_path / "o/config.yaml").steps
    assert steps >= 1
    assert "calibrated" not in said(capsys, *words, "--resume")
    assert io.read_yaml(Training, tmp_path / "o/config.yaml").steps == steps


def test_generate_streams_the_prompt_and_its_continuation(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, "generate", str(run), "--prompt", "notes line", "--max-tokens", "5")
    assert out.startswith("notes line")
    assert said(capsys, "generate", str(run), "--prompt", "notes line", "--max-tokens", "5") == out


def test_generate_prints_one_json_object(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "a", "--prompt", "code line", "--max-tokens", "4", "--json", "--stop", "z"]
    words += ["--temperature", "1", "--top-k", "5", "--top-p", "0.9", "--seed", "3"]
    found = json.loads(said(capsys, "generate", str(run), *words))["completions"]
    assert [one["prompt"] for one in found] == ["a", "code line"]
    assert all(len(one["tokens"]) == len(one["logprobs"]) <= 4 for one in found)
    assert json.loads(said(capsys, "generate", str(run), *words))["completions"] == found


def test_several_prompts_are_shown_one_after_another(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "generate", str(run), "--prompt", "a", "--prompt", "b", "--max-tokens", "2")
    assert out.index("--- a") < out.index("--- b")


def test_chat_answers_until_an_empty_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", streams.StringIO("hello\nand then?\n\nnever read\n"))
    assert said(capsys, "chat", str(run), "--max-tokens", "3").count("\n") >= 2


def test_chat_goes_on_after_a_line_it_cannot_answer(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", streams.StringIO(f"hello\n{'long ' * 200}\nand then?\n\n"))
    assert main(["chat", str(run), "--max-tokens", "3"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("exceeds the model's length") == 1
    assert shown.out.count("\n") >= 2


FIELDS = {
    *("bits_per_byte", "domains", "tokens", "bytes", "documents", "context", "stride", "causal", "loads"),
    *("nats_per_token", "data"),
}


def test_eval_agrees_with_the_last_validation_of_the_run(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(said(capsys, "eval", str(run), "--data", str(text), "--seq", "24", "--json"))
    assert found.keys() == FIELDS
    assert (found["data"], found["context"], found["stride"], found["causal"]) == (str(text), 24, 24, True)
    assert found["bytes"] == sum(len(path.read_bytes()) for path in text.rglob("*") if path.is_file())
    assert found["nats_per_token"].keys() == found["domains"].keys()
    for domain, nats in found["nats_per_token"].items():  # of bytes, so that the two are one figure
        assert nats == pytest.approx(found["domains"][domain] * math.log(2))
    for load in found["loads"].values():
        assert sum(load["load"]) == sum(load["wanted"]) > 0
        assert load["entropy"] > 0
        assert load["dropped_frac"] == 0
    assert found["domains"].keys() == {"notes", "code"}
    assert found["bits_per_byte"] == pytest.approx(sum(found["domains"].values()) / 2)
    summary = read_json(Summary, run / SUMMARY_FILE)
    assert found["bits_per_byte"] == pytest.approx(summary.trained.macro, rel=0.1)
    assert "mean" in said(capsys, "eval", str(run), "--data", str(text), "--limit", "30")


def test_eval_without_data_reads_what_the_run_held_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "eval", str(run), "--json"))
    summary = read_json(Summary, run / SUMMARY_FILE)
    assert found["domains"] == pytest.approx(dict(summary.trained.domains), rel=0.2)
    inside = next((run / "checkpoints").iterdir())
    assert json.loads(said(capsys, "eval", str(inside), "--json")) == found
    data = io.read_yaml(Training, run / "config.yaml").data
    texts: dict[str, list[str]] = {}
    for document in Library.open(data).all_documents(held_out=True):
        texts.setdefault(document.domain, []).append(document.text)
    again = cs.evaluate(cs.load(run), cs.Tokenizer.load(run), texts=texts, context=data.sequence_length)
    assert found["domains"] == pytest.approx(dict(again.domains), rel=1e-6)
    assert found["bytes"] == again.bytes == sum(len(t.encode()) for held in texts.values() for t in held)


def test_eval_of_a_folder_that_is_no_run_asks_for_text(run: Path, tmp_path: Path) -> None:
    shutil.copytree(next((run / "checkpoints").iterdir()), tmp_path / "model")
    assert main(["eval", str(tmp_path / "model")]) == 2


def test_doctor_says_ready(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "doctor")
    assert "torch" in out
    assert "ready" in out


def test_bench_writes_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = benchmarks.Shape(dataclasses.replace(DEEPSEEK, mtp=MTP()), 2, 16, 2)
    monkeypatch.setattr(benchmarks, "shapes", lambda: {"train-tiny": small, "train-1b": small})
    for name in ("train-tiny", "decode-tiny", "dense-against-moe"):
        record = from_json(BenchRecord, said(capsys, "bench", name, "--json"), where=name)
        assert record.name == name
        assert all(figure.median > 0 for figure in record.figures)
    said(capsys, "bench", "train-1b", "--out", str(tmp_path / "record.json"))
    assert read_json(BenchRecord, tmp_path / "record.json").figures[0].n == 2


def test_the_demo_ends_with_figures_and_trains_nothing_twice(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24)
    config = Training(model=DEEPSEEK, tokenizer=Bytes(), data=data, steps=1, batch=2, eval_tokens=64)
    monkeypatch.setattr("consilium.cli.configure.demo_config", lambda: config)
    words = ["demo", "--minutes", "0.005", "--out", str(tmp_path / "demo")]
    out = said(capsys, *words)
    for promised in (
        "bits per byte",
        "untrained",
        "trigram",
        "max/mean",
        "dead experts",
        "report.html",
        "try next",
    ):
        assert promised in out, promised
    assert read_json(Specialisation, tmp_path / "demo" / SPECIALISATION_FILE).tokens > 0
    metrics = (tmp_path / "demo/metrics.jsonl").read_bytes()
    checkpoint = next((tmp_path / "demo/checkpoints").iterdir())
    saved = checkpoint.stat().st_mtime_ns
    speed = read_json(Summary, tmp_path / "demo" / SUMMARY_FILE).tokens_per_second
    assert speed > 0
    again = said(capsys, *words)
    assert "calibrated" not in again
    assert "is finished and only shown again" in again
    compared = said(capsys, *words, "--compare", "dense")
    assert "steps and keeps them" in compared
    assert "dense twin" in compared
    assert read_json(Summary, tmp_path / "demo" / SUMMARY_FILE).tokens_per_second == speed
    assert (tmp_path / "demo/metrics.jsonl").read_bytes() == metrics
    assert checkpoint.stat().st_mtime_ns == saved
