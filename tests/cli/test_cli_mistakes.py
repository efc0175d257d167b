"""Each mistake of a user ends with one sentence and exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import write_config, write_text
from safetensors.torch import load_file, save_file

from consilium.cli.main import main

FIVE_GROUPS = "{count: 5, keep: 2, score: max}"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), text)


@pytest.fixture
def run(tmp_path: Path, config: Path, trained: Path) -> Path:
    """A finished run that a test may damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", str(config), "--out", str(folder)]) == 0
    return folder


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command answers; it must be one line on standard error and exit code 2."""
    capsys.readouterr()
    assert main(list(words)) == 2
    answer = capsys.readouterr().err.strip()
    assert answer.startswith("error: ")
    assert "\n" not in answer
    assert "Traceback" not in answer
    return answer


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        (["train", "deepsek-v3:tiny"], ["unknown recipe 'deepsek-v3'", "Did you mean 'deepseek-v3'?"]),
        (["train", "deepseek-v3:tny"], ["has no size 'tny'", "Did you mean 'tiny'?"]),
        (["train", "deepseek-v3:tiny", "--stepz", "3"], ["unknown option --stepz", "--steps"]),
        (["train", "deepseek-v3:tiny", "--steps", "0"], ["'0' is not a positive count"]),
        (["train", "deepseek-v3:tiny", "--steps", "3", "--minutes", "1"], ["not allowed with"]),
        (["train", "deepseek-v3:tiny", "--minutes", "-1"], ["--minutes -1 is not a positive number"]),
        (["train", "deepseek-v3:tiny", "--batch", "0"], ["batch", "positive count"]),
        (["train", "deepseek-v3:tiny", "--batch", "100000000"], ["67,108,864 tokens", "lower --batch"]),
        (["train", "deepseek-v3:tiny", "--minutes", "nan"], ["--minutes nan is not a positive number"]),
        (["train", "deepseek-v3:tiny", "--steps", "2", "--lr", "inf"], ["learning_rate", "finite"]),
        (["train", "deepseek-v3:tiny", "--steps", "2", "--seed", "9" * 30], ["seed", "less than"]),
        (["train", "deepseek-v3:tiny", "--steps", "2", "--threads", "100000"], ["threads", "1024"]),
        (["train", "deepseek-v3:tiny", "--lr", "-3"], ["learning_rate", "greater than 0"]),
        (["train", "deepseek-v3:tiny", "--balance", "swich"], ["unknown balance 'swich'", "switch"]),
        (["train", "llama:tiny", "--balance", "switch"], ["is dense and has nothing to balance"]),
        (["train", "deepseek-v3:tiny", "--params", "3k"], ["comes no nearer than"]),
        (["train", "deepseek-v3:tiny", "--seq", "99999"], ["exceed model.max_length"]),
        (["train", "deepseek-v3:tiny", "--set", "model.moe.expert=3"], ["unknown key", "'experts'"]),
        (["train", "deepseek-v3:tiny", "--set", "steps"], ["has no '='"]),
        (["train", "deepseek-v3:tiny", "--set", "freeze="], ["--set freeze= has no value"]),
        (["train", "deepseek-v3:tiny", "--tokens", "10"], ["10 is less than one step"]),
        (["train", "deepseek-v3:tiny", "--set", "model.moe.router.select.k=99"], ["top-99 of 32 experts"]),
        (
            [
                "train",
                "deepseek-v3:tiny",
                "--set",
                "model.moe.router.select.groups={count: 5, keep: 2, score: max}",
            ],
            ["32 experts are not divisible into 5 groups"],
        ),
        (["train", "mixtral:tiny", "--set", "model.attention.kv_heads=5"], ["not divisible by 5 kv_heads"]),
        (["train", "missing.yaml"], ["cannot read the configuration missing.yaml"]),
        (["train", "deepseek-v3:tiny", "--data", "no/such/text"], ["no/such/text"]),
    ],
)
def test_wrong_training_options(
    words: list[str], answers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = complaint(capsys, *words, "--out", str(tmp_path / "run"))
    for part in answers:
        assert part in answer
    assert not (tmp_path / "run").exists()


def test_a_model_larger_than_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.machine.memory.memory_limit", lambda: 2**36)
    answer = complaint(capsys, "train", "deepseek-v3", "--out", str(tmp_path / "run"))
    assert "training deepseek-v3 with 671,026,404,352 parameters needs 10,172.1 GiB of memory" in answer
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("empty.txt", b"", "empty"),
        ("spaces.txt", b" \n\n ", "no text"),
        ("binary.txt", b"PK\x03\x04\x00\x00\xff\xfe" * 40, "not UTF-8"),
        ("short.txt", b"S", "nothing can be held out of 1 characters"),
        ("short.txt", b"Short.\n", "its largest domain has 7 tokens and one sequence needs 24"),
        ("keys.jsonl", b'{"text": "fine"}\n{"txt": "wrong"}\n', "line 2"),
        ("picture.png", b"\x89PNG", "png"),
    ],
)
def test_unusable_text(
    name: str, content: bytes, answer: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    said = complaint(
        capsys, "train", str(config), "--data", str(tmp_path / name), "--out", str(tmp_path / "run")
    )
    assert name in said or name == "short.txt"
    assert answer in said
    assert not (tmp_path / "run").exists()


def test_nan_in_weights_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoints/step-3"
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / "manifest.json").unlink()
    said = complaint(capsys, "generate", str(checkpoint), "--prompt", "a")
    assert "model.norm.weight" in said


def test_an_older_checkpoint_is_named_beside_a_damaged_one(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run / "checkpoints/step-3", run / "checkpoints/step-9")
    weights = run / "checkpoints/step-9/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert main(["generate", str(run), "--prompt", "a", "--max-tokens", "1"]) == 0
    assert "step-9" in caplog.text
    assert "step-3" in caplog.text


def test_a_mistyped_path_is_no_name_on_the_hub(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    said = complaint(capsys, "generate", f"{run.parent.name}/rnu", "--prompt", "a")
    assert "no such folder" in said
    assert "hf download" not in said


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_a_truncated_checkpoint_is_named(verb: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run / "checkpoints/step-3/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    words = ["--prompt", "a"] if verb == "generate" else []
    assert "model.safetensors" in complaint(capsys, verb, str(run), *words)


def test_a_truncated_checkpoint_does_not_resume(
    run: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run / "checkpoints/step-3/training_state/state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "state.safetensors" in complaint(capsys, "train", str(config), "--out", str(run), "--resume")


def test_an_unfinished_configuration_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("steps: 3\nmodell: {}\n")
    said = complaint(capsys, "train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"))
    assert "model" in said
    assert "run.yaml" in said


def test_a_run_folder_under_a_file_cannot_be_made(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    said = complaint(capsys, "train", str(config), "--out", str(tmp_path / "file/run"))
    assert "not a directory" in said
    assert "file/run" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "cannot write" in complaint(capsys, "train", str(config), "--out", str(tmp_path / "closed/run"))


def limit_files_to_100_kilobytes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_ends_with_one_sentence_and_no_half_checkpoint(config: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write of the weights fails in its middle."""
    done = subprocess.run(
        [sys.executable, "-m", "consilium", "train", str(config), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit_files_to_100_kilobytes,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "step-3" in done.stderr
    assert not (tmp_path / "run/checkpoints/step-3").exists()


def test_a_run_is_not_overwritten(run: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert "add --resume" in complaint(capsys, "train", str(config), "--out", str(run))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_inside_a_saved_folder_is_refused_before_the_text_is_read(
    run: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.cli.train._run", None)
    inside = next((run / "checkpoints").glob("step-*")) / "run"
    assert "lies inside" in complaint(capsys, "train", str(config), "--out", str(inside))
    assert not inside.exists()


def test_minutes_of_a_finished_run_are_told_to_be_spent(
    run: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--out", str(run), "--resume", "--minutes", "1"]) == 0
    assert "--minutes 1 was counted out as 3 steps when the run began" in capsys.readouterr().out


def test_a_budget_below_one_step_is_refused_before_the_text_is_read(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("consilium.data.corpus.build_corpus", None)
    words = ["train", str(config), "--tokens", "1", "--out", str(tmp_path / "run")]
    assert "less than one step" in complaint(capsys, *words)


def test_a_run_resumes_with_its_own_settings_only(
    run: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(capsys, "train", str(config), "--out", str(run), "--resume", "--seed", "4")
    assert "started with seed = 0, not 4" in said


@pytest.mark.parametrize(
    ("folder", "answer"),
    [
        ("deepseek-v3:tiny", "is a recipe without weights"),
        ("mistralai/Mixtral-8x7B-v0.1", "hf download mistralai/Mixtral-8x7B-v0.1"),
        ("/no/such/folder", "no such folder"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "eval", "chat"])
def test_folders_without_a_model(
    verb: str, folder: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "a"] if verb == "generate" else []
    assert answer in complaint(capsys, verb, folder, *words)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "no prompt"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens 0"),
        (["--prompt", "a", "--max-tokens", "9999"], "exceeds the model's length"),
        (["--prompt", "a", "--temperature", "-1"], "temperature -1.0 is out of range"),
        (["--prompt", "a", "--top-p", "0"], "top_p 0.0 is out of range"),
        (["--prompt", "a", "--top-k", "-2"], "top_k -2 is negative"),
        (["--prompt", "a", "--stop", ""], "a stop text is empty"),
    ],
)
def test_wrong_sampling(
    words: list[str], answer: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer in complaint(capsys, "generate", str(trained), *words)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["bench", "train-tinny"], "Did you mean 'train-tiny'?"),
        (["bench", "decode-tiny", "--against", "transformers"], "has no rival"),
        (["demo", "--minutes", "0"], "--minutes 0 is not a positive number"),
        (["demo", "--compare", "dens"], "invalid choice"),
        (["demo", "--out", ""], "the path is empty"),
        (["bench", "--out", "/dev/null/record.json"], "cannot write /dev/null/record.json"),
        (["bench", "--out", "."], "--out . is a folder"),
        (["plan", __file__], "is no model; give a recipe, a folder"),
        (["plan", "."], f"there is no {Path.cwd()}/config.json"),
        (["generate", "missing.gguf", "--prompt", "a"], "no such file: missing.gguf"),
        (["doctor", "runs", "--routers"], "not allowed with"),
        (["--completion"], "--completion needs the name of a shell"),
        (["bench", "--out", __file__], "is no record of ours"),
        (["chat", "", "--temperature", "0"], "the path is empty"),
    ],
)
def test_other_verbs(words: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer in complaint(capsys, *words)


def test_a_checkpoint_whose_configuration_contradicts_itself(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints/step-3/config.json"
    data = json.loads(path.read_text())
    data["num_hidden_layers"] = 7
    path.write_text(json.dumps(data))
    (path.parent / "manifest.json").unlink()
    assert "num_hidden_layers" in complaint(capsys, "eval", str(path.parent))


def test_the_demo_leaves_a_run_of_train_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "holds a run that is not this demo's" in complaint(capsys, "demo", "--out", str(run))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
