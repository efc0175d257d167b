"""Answers under load: a server with so many clients at once, beside llama.cpp's on the same files.

usage: python bench/serving.py [--model deepseek-v3:1b] [--clients 8] [--shared 0] [--turns 3] [--out FILE]

A closed loop: each client asks for its next answer when it has the last. A request has 512 tokens of prompt,
of which the first ``--shared`` are everybody's, and 128 of answer, greedy and streamed. All servers are
processes of their own with as many threads, one at a time; they take turns. Tokens a second are those of
prompts and answers together. Of a file transformers' continuous batching takes part too; latent attention is
nothing that its cache has pages for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import importlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from decode import Setting, prepare
from kept import keep
from shapes import YARDSTICK, model_of

from consilium.benchmarking.record import record, several
from consilium.checkpoint.convert import convert
from consilium.machine.processors import threads
from consilium.records.bench import Figure

PROMPT, ANSWER = 512, 128
WAVES = 2
"""Answers that each client asks for in a turn."""
FORMATS: Mapping[str, tuple[str, str]] = {"int8": ("int8", "Q8_0"), "int4": ("int4", "Q4_0")}


@dataclass(frozen=True, slots=True)
class Load:
    clients: int
    shared: int
    vocab: int

    def prompts(self, client: int, turn: int) -> Iterator[list[int]]:
        common, own = Random(0), Random(1000 * turn + client)
        begin = [common.randrange(300, self.vocab) for _ in range(self.shared)]
        for _ in range(WAVES):
            yield begin + [own.randrange(300, self.vocab) for _ in range(PROMPT - self.shared)]


@dataclass(slots=True)
class Times:
    """Seconds to the first token of each answer, and between tokens."""

    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)


def answer(port: int, prompt: Sequence[int], times: Times) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1800)
    body = {
        "prompt": prompt,
        "max_tokens": ANSWER,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "logprobs": 0,
    }
    begun = last = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    found = connection.getresponse()
    assert found.status == 200, found.read()
    seen = 0
    for line in found:
        if not line.startswith(b"data: {"):
            continue
        now = time.perf_counter()
        (times.between if seen else times.first).append(now - (last if seen else begun))
        last, seen = now, seen + 1
    connection.close()


def turn(port: int, load: Load, number: int) -> tuple[float, Times]:
    """Tokens a second of all clients, and what each of them saw."""
    times = [Times() for _ in range(load.clients)]

    def work(client: int) -> None:
        for prompt in load.prompts(client, number):
            answer(port, prompt, times[client])

    clients = [threading.Thread(target=work, args=(client,)) for client in range(load.clients)]
    begun = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    seconds = time.perf_counter() - begun
    joined = Times([s for one in times for s in one.first], [s for one in times for s in one.between])
    return load.clients * WAVES * (PROMPT + ANSWER) / seconds, joined


@contextlib.contextmanager
def ours(model: Path, packing: str, shared: int) -> Iterator[int]:
    """What many prompts begin with is shared by whole parts, so these are smaller where there is some."""
    command = [sys.executable, "-m", "consilium", "serve", str(model), "--port", "0", "--weights", packing]
    command += ["--prompt-part", "128"] if shared else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = (re.search(r"http://127\.0\.0\.1:(\d+)/v1", line) for line in process.stderr)
        yield int(next(found[1] for found in told if found))
        process.terminate()


def llama_cpp(file: Path, clients: int) -> contextlib.AbstractContextManager[int]:
    return rival([__file__, "--serve", str(file), "--clients", str(clients)])


def transformers(folder: Path, clients: int) -> contextlib.AbstractContextManager[int]:
    bench = Path(__file__).with_name("batching.py")
    return rival([str(bench), str(folder), "--clients", str(clients), "--tokens", str(PROMPT + ANSWER)])


@contextlib.contextmanager
def rival(arguments: Sequence[str]) -> Iterator[int]:
    """A server that says its port on standard output."""
    command = [sys.executable, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        told = (re.fullmatch(r"port:(\d+)\n", line) for line in process.stdout)
        yield int(next(found[1] for found in told if found))
        process.terminate()


def serve_llama_cpp(file: str, clients: int) -> None:
    library: Any = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel = clients * (PROMPT + ANSWER + 64), clients
    params.n_gpu_layers = params.port = 0
    params.warmup, params.verbosity = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
    server = library.Server(params)
    print(f"port:{server.listening_address.rsplit(':', 1)[-1].strip('/')}", flush=True)
    sys.stdin.read()


Contestant = Callable[[], contextlib.AbstractContextManager[int]]


def measure(contestants: Mapping[str, Contestant], load: Load, turns: int) -> Iterator[Figure]:
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    seen: dict[str, list[Times]] = {name: [] for name in contestants}
    for number in range(turns):
        for name, start in contestants.items():
            with start() as port:
                answer(port, next(load.prompts(load.clients, number)), Times())
                rate, times = turn(port, load, number)
            rates[name].append(rate)
            seen[name].append(times)
            print(f"turn {number + 1} of {turns}: {name} {rate:.1f} tokens/s", flush=True)
    for name, values in rates.items():
        rival = name.replace("consilium", "llama.cpp")
        beside = (rival, rates[rival]) if rival in rates and rival != name else None
        yield several(name, "tokens/s", values, beside)
    for name, several_times in seen.items():
        for what, values in (
            ("to the first token", [s for times in several_times for s in times.first]),
            ("between tokens", [s for times in several_times for s in times.between]),
        ):
            cuts = statistics.quantiles(values, n=100)
            yield several(f"{name}, {what}, median", "s", [statistics.median(values)])
            yield several(f"{name}, {what}, 99 of 100", "s", [cuts[98]])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=YARDSTICK)
    for option, default in (("clients", 8), ("shared", 0), ("turns", 3)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="keep the files of all contestants here; default: nowhere")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_llama_cpp(options.serve, options.clients)
        return 0
    file = Path(options.model) if options.model.endswith(".gguf") else None
    setting = Setting(model_of(options.model, PROMPT + 2048), 1, PROMPT, False, file)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(setting, work)
        contestants: dict[str, Contestant] = {}
        for name, (packing, kind) in FORMATS.items():
            model = file or work / "model"
            contestants[f"consilium {name}"] = lambda m=model, p=packing: ours(m, p, options.shared)
            if (theirs := work / f"{kind}.gguf").exists():
                contestants[f"llama.cpp {name}"] = lambda f=theirs: llama_cpp(f, options.clients)
        if file is not None:
            if not (work / "hf").exists():
                convert(file, work / "hf")
            contestants["transformers bfloat16"] = lambda: transformers(work / "hf", options.clients)
        load = Load(options.clients, options.shared, setting.model.vocab_size)
        found = tuple(measure(contestants, load, options.turns))
    words = [f"--{name} {getattr(options, name)}" for name in ("clients", "shared", "turns")]
    label = YARDSTICK if file is None else file.name
    model = "" if file is None else f"-{file.stem.lower()}"
    name = f"serving-{options.clients}{f'-shared-{options.shared}' if options.shared else ''}{model}"
    keep(record(name, f"python bench/serving.py --model {label} {' '.join(words)}", found), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
