"""A process that asks llama.cpp: ``python llama_cpp.py FILE.gguf``, requests as JSON lines on standard input.

A request is ``{"prompt": [ids] or text, "probs": n, "letter": id}``, the answer ``{"tokens": n, "logprobs":
{id: logprob}}`` with the ``probs`` most likely tokens after the prompt. ``letter`` is a token of one ASCII
letter: sampled whatever its probability, since half a character has no answer. ``{"prompt": text, "greedy":
n}`` is answered by ``{"tokens": n, "ids": [...]}``, the likeliest n tokens one after
the other, up to the end of the text.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp  # pyright: ignore[reportMissingImports]


def serve(path: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_batch, params.n_gpu_layers = 256, 64, 0
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        print("answer:", json.dumps(answer(server, json.loads(line))), flush=True)


def answer(server: Any, asked: dict[str, Any]) -> dict[str, Any]:
    if "greedy" in asked:
        return greedy(server, asked)
    request = {"prompt": asked["prompt"], "n_predict": 1, "temperature": 0.0, "n_probs": asked["probs"]}
    request |= {"post_sampling_probs": False, "cache_prompt": False}
    request |= {"logit_bias": [[asked["letter"], 1000.0]]}
    reply = server.handle_completions(request)
    top = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {
        "tokens": reply["usage"]["prompt_tokens"],
        "logprobs": {entry["id"]: entry["logprob"] for entry in top},
    }


def greedy(server: Any, asked: dict[str, Any]) -> dict[str, Any]:
    request = {"prompt": asked["prompt"], "n_predict": asked["greedy"], "temperature": 0.0, "n_probs": 1}
    reply = server.handle_completions(request | {"cache_prompt": False})
    content = reply["choices"][0]["logprobs"]["content"]
    return {"tokens": reply["usage"]["prompt_tokens"], "ids": [entry["id"] for entry in content]}


if __name__ == "__main__":
    serve(sys.argv[1])
