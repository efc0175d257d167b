"""lm-evaluation-harness against a server, offline: its scores are sums of log-probabilities by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium.checkpoint import store
from consilium.data.tokenizer import Tokenizer
from small import DEEPSEEK, lively
from tasks import DOCUMENTS, TASK

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("lm-eval") / "small"
    store.save(lively(DEEPSEEK), folder, tokenizer=Tokenizer.of_bytes())
    command = [sys.executable, "-m", "consilium", "serve", str(folder), "--port", "0", "--dtype", "float32"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = (re.search(r"http://\S+(?=/v1)", line) for line in process.stderr)
        yield folder, next(found[0] for found in told if found)
        process.terminate()


def test_its_scores_are_sums_of_log_probabilities(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval: Any = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tasks: Any = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, url = served
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=data))
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": f"{url}/v1/completions",
            "model": folder.name,
            "tokenizer": str(folder),
            "tokenizer_backend": "huggingface",
            "tokenized_requests": True,
        },
        tasks=["local_choice"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    model, tokenizer = store.load(folder).eval(), Tokenizer.load(folder)
    right = 0
    for sample in found["samples"]["local_choice"]:
        document = DOCUMENTS[sample["doc_id"]]
        sums = [float(one[0][0]) for one in sample["resps"]]
        for choice, total in zip(document["choices"], sums, strict=True):
            context, answer = tokenizer.encode(str(document["question"])), tokenizer.encode(str(choice))
            with torch.inference_mode():
                logits_SV = model(torch.tensor([context + answer])).logits[0]
            logprobs_SV = torch.log_softmax(logits_SV, -1)[len(context) - 1 : -1]
            wanted = logprobs_SV.gather(1, torch.tensor(answer)[:, None]).sum()
            assert total == pytest.approx(float(wanted), rel=1e-3, abs=1e-3)
        right += sums.index(max(sums)) == document["label"]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))
