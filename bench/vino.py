"""OpenVINO's side of bench/decode.py, run by the interpreter of an environment that has it.

usage: PYTHON bench/vino.py export FOLDER OUT bfloat16|int8|int4
       PYTHON bench/vino.py serve OUT THREADS [--prompts]

The environment has openvino and optimum-intel (``pip install openvino "optimum[openvino]"``), and nothing
of ours. FOLDER is in Hugging Face's layout; its weights are exported as they are, or as groups of 32 with a
scale each. ``serve`` reads lines ``{"prompts": [[1, 2]], "new": 16}`` and answers each with tokens a
second: of so many steps behind the prompts, which are read once, or with --prompts of reading them.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

GROUP = 32


def export(folder: str, out: str, kind: str) -> None:
    import torch  # noqa: PLC0415 - seconds
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig  # noqa: PLC0415 - the same

    bits = {"bfloat16": None, "int8": 8, "int4": 4}[kind]
    packing = None
    if bits is not None:
        packing = OVWeightQuantizationConfig(bits=bits, sym=True, group_size=GROUP if bits == 4 else -1)
    made = OVModelForCausalLM.from_pretrained(
        folder,
        export=True,
        compile=False,
        load_in_8bit=False,
        quantization_config=packing,
        torch_dtype=torch.bfloat16,
    )
    made.save_pretrained(out)


class Sequences:
    """Sequences that are read and added to greedily."""

    def __init__(self, folder: str, threads: int) -> None:
        import openvino  # noqa: PLC0415 - not of every environment

        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(f"{folder}/openvino_model.xml", "CPU", options)
        self._request = compiled.create_infer_request()
        self._wanted = {name for port in compiled.inputs for name in port.get_names()}
        self._length = 0
        self._newest: Any = None

    def read(self, ids: Any) -> None:
        self._request.reset_state()
        self._length = 0
        self._add(np.asarray(ids, dtype=np.int64))

    def step(self) -> None:
        self._add(self._newest)

    def _add(self, ids: Any) -> None:
        batch, count = ids.shape
        places = np.arange(self._length, self._length + count)
        self._length += count
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, self._length), dtype=np.int64),
            "position_ids": np.broadcast_to(places, (batch, count)).astype(np.int64),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        found = self._request.infer({name: given[name] for name in self._wanted})
        self._newest = found["logits"][:, -1:].argmax(-1)


def serve(folder: str, threads: int, *, reading: bool) -> None:
    sequences, begun = Sequences(folder, threads), False
    for line in sys.stdin:
        asked = json.loads(line)
        prompts, new = asked["prompts"], asked["new"]
        if reading or not begun:
            start = time.perf_counter()
            sequences.read(prompts)
            rate, begun = len(prompts) * len(prompts[0]) / (time.perf_counter() - start), True
        if not reading:
            start = time.perf_counter()
            for _ in range(new):
                sequences.step()
            rate = new * len(prompts) / (time.perf_counter() - start)
        print(f"answer:{rate}", flush=True)


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    if verb == "export":
        export(*words)
    else:
        serve(words[0], int(words[1]), reading="--prompts" in words)
