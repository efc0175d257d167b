"""llama.cpp itself answers as we do from an exported file (with ``pip install xllamacpp``)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.gguf_models import BYTES, CASES
from checkpoint.models import trained
from consilium.checkpoint import store
from consilium.checkpoint.gguf.export import export
from consilium.data.tokenizer import Tokenizer
from consilium.model.decoder import Decoder
from support import relative_error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp"),
]
TEXT = "def add(a, b):\n    return a + b  # 专科会诊 🙂\n"
PROMPTS = [[(7 * i * i + 3 * i + 5) % 256 for i in range(length)] for length in (1, 2, 17, 100, 200)]


def asked(file: Path, prompts: list[Any]) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), str(file)]
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    return [
        json.loads(line.removeprefix("answer:"))
        for line in done.stdout.splitlines()
        if line.startswith("answer:")
    ]


@torch.no_grad()
def logprobs(model: Decoder, ids: list[int]) -> torch.Tensor:
    return model.eval()(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_our_probabilities_from_a_float32_file(name: str, tmp_path: Path) -> None:
    model, tokenizer = trained(CASES[name]), Tokenizer.of_bytes()
    store.save(model, tmp_path / "model", tokenizer=tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf")
    answers = asked(tmp_path / "model.gguf", [*PROMPTS, TEXT])
    ids = [*PROMPTS, [tokenizer.eos_id, *tokenizer.encode(TEXT)]]
    assert [answer["tokens"] for answer in answers] == [len(prompt) for prompt in ids]
    for prompt, answer in zip(ids, answers, strict=True):
        assert len(answer["logprobs"]) == BYTES
        theirs = torch.tensor(answer["logprobs"], dtype=torch.float64)
        assert relative_error(theirs, logprobs(model, prompt)) < 1e-5


LOST = {"bfloat16": 0.02, "q8_0": 0.1}


@pytest.mark.parametrize("dtype", LOST)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2-lite", "deepseek_v3-yarn"])
def test_llama_cpp_stays_close_from_a_smaller_file(name: str, dtype: str, tmp_path: Path) -> None:
    model = trained(CASES[name])
    store.save(model, tmp_path / "model", tokenizer=Tokenizer.of_bytes())
    export(tmp_path / "model", tmp_path / "model.gguf", dtype=dtype)
    for prompt, answer in zip(PROMPTS, asked(tmp_path / "model.gguf", list(PROMPTS)), strict=True):
        theirs = torch.tensor(answer["logprobs"], dtype=torch.float64)
        assert relative_error(theirs, logprobs(model, prompt)) < LOST[dtype]
