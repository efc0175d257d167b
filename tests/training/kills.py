"""Kill training runs with SIGKILL at random moments until they end, and print how they ended as JSON.

usage: kills.py FOLDER TEXT KILLS. One process imports torch once and forks every run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from consilium.checkpoint import store
from consilium.config.data import Data, TextPath
from consilium.config.model import MTP
from consilium.config.training import Bytes, Training
from consilium.disk import atomic
from consilium.records.run import CHECKPOINTS
from consilium.training.loop import train
from small import DEEPSEEK

LONGEST_RUN = 60.0


def configuration(text: Path) -> Training:
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24)
    model = dataclasses.replace(DEEPSEEK, layers=2, mtp=MTP(depth=1))
    return Training(
        model=model,
        tokenizer=Bytes(),
        data=data,
        steps=16,
        batch=4,
        save_every=2,
        eval_every=7,
        eval_tokens=64,
    )


def run_in_child(config: Training, out: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(config, out, resume=True)
            code = 0
        except BaseException:  # noqa: BLE001 - the parent judges by the exit code
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def outcome(child: int, seconds: float) -> int | None:
    """Exit code of a child that ended within ``seconds``, else None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def fingerprint(out: Path) -> str:
    """Hash of the last checkpoint's weights and training state, the metrics' steps and the load matrices."""
    folder = atomic.latest(out / CHECKPOINTS)
    assert folder is not None
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    state = store.load_training_state(folder)
    for name, tensor in sorted(state.tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    digest.update(json.dumps(dict(state.scalars), sort_keys=True).encode())
    digest.update((out / "routing/loads.bin").read_bytes())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("train/tok_per_sec", None)
    digest.update(json.dumps(lines, sort_keys=True).encode())
    return digest.hexdigest()


def main() -> None:
    folder, text, wanted = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    config = configuration(text)
    begun = time.monotonic()
    assert outcome(run_in_child(config, folder / "whole"), LONGEST_RUN) == 0
    typical = time.monotonic() - begun
    expected = fingerprint(folder / "whole")
    chance, kills, chains, wrong = random.Random(0), 0, 0, 0
    while kills < wanted:
        out = folder / f"chain-{chains}"
        code: int | None = None
        while code is None:
            child = run_in_child(config, out)
            moment = chance.uniform(0, typical * 0.6) if kills < wanted else LONGEST_RUN
            code = outcome(child, moment)
            if code is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
        chains += 1
        wrong += code != 0 or fingerprint(out) != expected
    # The output of this script is its result.
    print(json.dumps({"kills": kills, "chains": chains, "wrong": wrong, "seconds_a_run": round(typical, 2)}))


if __name__ == "__main__":
    main()
