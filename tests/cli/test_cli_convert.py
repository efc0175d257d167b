"""``consilium convert``: what it writes opens, what it cannot write is one sentence and leaves nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from checkpoint.gguf_models import qwen3
from checkpoint.models import switch, trained
from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.data.tokenizer import Tokenizer
from consilium.disk.manifest import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    store.save(trained(qwen3()), folder, tokenizer=Tokenizer.of_bytes())
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["convert", *map(str, words)]) == 0
    output = capsys.readouterr()
    # Nothing but lines of progress, which a conversion of over two seconds shows.
    assert re.fullmatch(r"(converting: +\d+% of [\d.,e-]+ GB\n)*", output.err)
    return output.out


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["convert", *map(str, words)]) == 2
    answer = capsys.readouterr().err.strip()
    assert answer.startswith("error: ")
    assert "\n" not in answer
    return answer


def test_a_folder_of_another_dtype_opens_with_its_tokenizer(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = said(capsys, source, tmp_path / "out", "--dtype", "bfloat16")
    assert str(tmp_path / "out") in answer
    model = store.load(tmp_path / "out")
    assert model.embed.weight.dtype == torch.bfloat16
    assert torch.equal(model.embed.weight, store.load(source).embed.weight.bfloat16())
    assert Tokenizer.load(tmp_path / "out").files() == Tokenizer.of_bytes().files()


def test_a_run_stands_for_its_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        store.save(trained(qwen3(), seed=step), tmp_path / "run" / "checkpoints" / f"step-{step}")
    said(capsys, tmp_path / "run", tmp_path / "out")
    assert torch.equal(store.load(tmp_path / "out").norm.weight, trained(qwen3(), seed=2).norm.weight)
    assert not (tmp_path / "out" / "training_state").exists()


def test_a_folder_inside_the_source_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "lies inside" in complaint(capsys, source, source / "sub")
    assert not (source / "sub").exists()


def test_a_place_inside_a_run_or_another_checkpoint_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "run/checkpoints/step-1")
    shutil.copytree(source, tmp_path / "other")
    (tmp_path / "link").symlink_to("run")
    places = ["run/inner", "link/a/b", "run/checkpoints/step-2", "run/checkpoints/step-1/a/b", "other/inner"]
    for place in places:
        assert "lies inside" in complaint(capsys, tmp_path / "run", tmp_path / place)
    for place in ("run/m.gguf", "other/m.gguf"):
        assert "lies inside" in complaint(capsys, tmp_path / "run", tmp_path / place, "--to", "gguf")
    verify(tmp_path / "run/checkpoints/step-1")
    verify(tmp_path / "other")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("dtype", [None, "bfloat16", "q8_0", "q4_0", "q4_1"])
def test_a_gguf_file_has_the_type_that_was_asked_for(
    dtype: str | None, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [] if dtype is None else ["--dtype", dtype]
    answer = said(capsys, source, tmp_path / "model.gguf", "--to", "gguf", *words)
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "model.gguf").tensors}
    expected = {None: "F32", "bfloat16": "BF16"}.get(dtype, str(dtype).upper())
    assert kinds["blk.0.ffn_up_exps.weight"] == expected
    assert ("100.0%" if dtype is None else "99.2%") in answer


def test_a_hub_id_answers_how_to_download_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = complaint(capsys, "deepseek-ai/DeepSeek-V2-Lite", tmp_path / "out")
    assert "hf download deepseek-ai/DeepSeek-V2-Lite --local-dir DeepSeek-V2-Lite" in answer


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{out}", "--dtype", "bf16"), "unknown --dtype 'bf16'. Did you mean 'bfloat16'?"),
        (("{out}", "--dtype", "q8_0"), "Types such as q8_0 are for --to gguf"),
        (("{out}.gguf",), "add --to gguf"),
        (("{out}", "--to", "gguf"), "give one that ends in .gguf"),
        (("{out}.gguf", "--to", "gguf", "--dtype", "q8"), "no type 'q8'. Did you mean 'q8_0'?"),
        (("{out}", "--to", "onnx"), "invalid choice: 'onnx'"),
        (("{source}",), "is the folder to convert"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    words: tuple[str, ...], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert message in complaint(capsys, source, *(word.format(out=out, source=source) for word in words))
    assert not out.parent.exists()


def test_a_destination_with_other_files_is_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "thesis.txt" in complaint(capsys, source, tmp_path / "out")
    (tmp_path / "out.gguf").write_text("mine")
    assert "is already there" in complaint(capsys, source, tmp_path / "out.gguf", "--to", "gguf")
    assert (tmp_path / "out" / "thesis.txt").read_text() == (tmp_path / "out.gguf").read_text() == "mine"


def test_an_architecture_without_gguf_says_which_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.save(trained(switch()), tmp_path / "model")
    answer = complaint(capsys, tmp_path / "model", tmp_path / "out.gguf", "--to", "gguf")
    assert (
        "llama, mistral, mixtral, qwen2, qwen3, qwen2_moe, qwen3_moe, olmoe, deepseek, deepseek_v2,"
        " deepseek_v3" in answer
    )


def test_what_was_written_is_told_in_json(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads(said(capsys, source, tmp_path / "out", "--json"))
    assert told["written"] == str(tmp_path / "out")
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))


def test_the_configuration_names_the_new_dtype(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, source, tmp_path / "out", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_a_run_that_has_saved_nothing_is_called_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    assert "run that has saved no checkpoint yet" in complaint(capsys, tmp_path / "run", tmp_path / "out")


def test_a_packed_folder_generates_and_is_measured(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, source, tmp_path / "packed", "--weights", "int8")
    text = tmp_path / "text.txt"
    text.write_text("Words of a text, some more of them. " * 20)
    assert main(["eval", str(tmp_path / "packed"), "--data", str(text)]) == 0
    answers = []
    for folder, how in ((source, ["--weights", "int8"]), (tmp_path / "packed", [])):
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", "a", "--json", *how]) == 0
        answers.append(json.loads(capsys.readouterr().out)["completions"])
    assert answers[0] == answers[1]


def test_bits_are_for_folders(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = complaint(capsys, source, tmp_path / "x.gguf", "--to", "gguf", "--weights", "int8")
    assert answer.endswith("for a GGUF file give --dtype q8_0 or q4_0.")
    assert not (tmp_path / "x.gguf").exists()
