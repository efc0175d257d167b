"""A wrong option is answered before any weight is read, whatever the size of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium.checkpoint import safetensors_io, store
from consilium.cli.main import main
from consilium.data.tokenizer import Tokenizer
from consilium.model.build import build
from small import DEEPSEEK, DENSE


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and places that are taken."""
    parent = tmp_path_factory.mktemp("early")
    store.save(build(DEEPSEEK), parent / "model", tokenizer=Tokenizer.of_bytes())
    store.save(build(DEEPSEEK), parent / "wordless")
    store.save(build(DENSE), parent / "grouped", tokenizer=Tokenizer.of_bytes())
    (parent / "taken").mkdir()
    for name in ("taken/letter.txt", "taken.gguf", "text.txt"):
        (parent / name).write_text("mine")
    return parent


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch, parent: Path) -> None:
    """Run in ``parent``, where whoever reads a weight fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.chdir(parent)
    for name in ("read_into", "pieces"):
        monkeypatch.setattr(safetensors_io, name, refuse)


EVERYWHERE = {
    "--device tpu": "'tpu' is not auto, cpu, cuda or cuda:N",
    "--device cuda:99": "device cuda:99 is not here",
    "--dtype float8": "argument --dtype: invalid choice: 'float8'",
    "--threads 0": "'0' is not a number of threads",
    "--devise cpu": "unknown option --devise. Did you mean '--device'?",
}
SAMPLING = {
    "--stop=": "a stop text is empty",
    "--max-tokens 0": "--max-tokens 0 is less than 1",
    "--temperature -1": "temperature",
    "--top-p 2": "top_p",
    "--top-k -1": "top_k",
}
VERBS = {
    "generate model --prompt a": EVERYWHERE
    | SAMPLING
    | {"--prompt-file nowhere.txt": "cannot read the prompt nowhere.txt"},
    "generate model": {"": "generate: no prompt"},
    "generate wordless --prompt a": {"": "cannot read the tokenizer"},
    "generate grouped --prompt a": {"--cache int8": "is for latent attention", "--cache int4": "int4"},
    "chat model": EVERYWHERE | SAMPLING,
    "eval model": {"": "model is no run, so it holds no text out"},
    "eval model --data text.txt": EVERYWHERE | {"--seq 1000000": "1000000"},
    "eval model --data nowhere.txt": {"": "nowhere.txt"},
    "convert model new": {"--dtype float8": "unknown --dtype 'float8'", "--to gguf": "ends in .gguf"},
    "convert model new.gguf": {"": "add --to gguf", "--to gguf --dtype q9": "q9"},
    "convert model taken": {"": "taken"},
    "convert model taken.gguf": {"--to gguf": "taken.gguf"},
    "convert model model/inside": {"": "lies inside model"},
    "bench model": EVERYWHERE
    | {"--out taken": "--out taken is a folder", "--against transformers": "no rival"},
}
CASES = [(f"{verb} {wrong}", said) for verb, wrongs in VERBS.items() for wrong, said in wrongs.items()]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("words", "said"), CASES)
def test_a_wrong_option_is_told_before_weights_are_read(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    "words",
    [
        "generate model --prompt a",
        "chat model",
        "convert model new",
        "bench model",
        "eval model --data text.txt",
    ],
)
def test_what_is_right_does_read_them(words: str) -> None:
    with pytest.raises(AssertionError, match="weights were read"):
        main(words.split())
