"""Ways to break the weight files of a folder.

Each changes a folder in place and returns what the error must name, a file or a tensor: one of several where
it depends on what was hit.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilium.checkpoint import safetensors_io

Named = str | tuple[str, ...]
SINGLE = "model.safetensors"
FP8 = torch.float8_e4m3fn


def rewrite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    file.unlink()
    safetensors_io.write(file, tensors)


def parse(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assemble(file: Path, header: str, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)


def shard(folder: Path, choose: random.Random) -> Path:
    return choose.choice(sorted(folder.glob("*.safetensors")))


def tensor_in(header: Mapping[str, Any], choose: random.Random) -> str:
    return choose.choice([name for name in header if name != "__metadata__"])


def flip_in_header(folder: Path, choose: random.Random) -> Named:
    file = shard(folder, choose)
    data = bytearray(file.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    data[choose.randrange(end)] ^= 1 << choose.randrange(8)
    file.write_bytes(data)
    return file.name, "config.json"


def flip_anywhere(folder: Path, choose: random.Random) -> Named:
    file = choose.choice(sorted(path for path in folder.iterdir() if path.name != "generation_config.json"))
    data = bytearray(file.read_bytes())
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    file.write_bytes(data)
    return file.name, "manifest.json", *(("config.json", SINGLE) if file.name == "manifest.json" else ())


def truncate(folder: Path, choose: random.Random) -> str:
    files = [path for path in folder.iterdir() if path.name != "generation_config.json"]
    file = choose.choice(sorted(files))
    data = file.read_bytes()
    file.write_bytes(data[: choose.randrange(len(data) - 2)])
    return file.name


def lengthen(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    file.write_bytes(file.read_bytes() + bytes(choose.randrange(1, 4096)))
    return file.name


def remove_file(folder: Path, choose: random.Random) -> str:
    """Without its manifest a folder is one from elsewhere, and whole."""
    file = folder / choose.choice(["config.json", SINGLE])
    file.unlink()
    return file.name


def exchange_files(folder: Path, choose: random.Random) -> Named:
    one, two = choose.sample(sorted(folder.glob("*.safetensors")), 2)
    one.rename(folder / "kept")
    two.rename(one)
    (folder / "kept").rename(two)
    return one.name, two.name


def exchange_tensors(folder: Path, choose: random.Random) -> str:
    """Two of unlike shapes trade their names."""
    file = shard(folder, choose)
    tensors = safetensors_io.read(file)
    one = choose.choice(sorted(tensors))
    two = choose.choice([name for name in sorted(tensors) if tensors[name].shape != tensors[one].shape])
    tensors[one], tensors[two] = tensors[two], tensors[one]
    rewrite(file, tensors)
    return one


def drop_tensor(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    tensors = safetensors_io.read(file)
    name = choose.choice(sorted(tensors))
    del tensors[name]
    rewrite(file, tensors)
    return name


def add_tensor(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    tensors = safetensors_io.read(file)
    name = f"{choose.choice(sorted(tensors))}.more"
    rewrite(file, {**tensors, name: torch.zeros(choose.randrange(1, 9))})
    return name


def rename_tensor(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    tensors = safetensors_io.read(file)
    name = choose.choice(sorted(tensors))
    place = choose.randrange(len(name))
    other = f"{name[:place]}{choose.choice('abxyz019._é')}{name[place + 1 :]}"
    if other not in tensors:
        tensors[other] = tensors.pop(name)
    rewrite(file, tensors)
    return other


def other_dtype(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    header, data = parse(file)
    name = tensor_in(header, choose)
    header[name]["dtype"] = choose.choice(
        ["I32", "U8", "F64", "I64", "F8_E4M3", "F8_E5M2", "F4", "", 7, None]
    )
    assemble(file, json.dumps(header), data)
    return name


def other_shape(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    header, data = parse(file)
    name = tensor_in({n: e for n, e in header.items() if len(set(e.get("shape", ()))) > 1}, choose)
    shape = header[name]["shape"]
    header[name]["shape"] = choose.choice(
        [
            shape[::-1],
            [*shape, 1],
            [math.prod(shape)],
            [-n for n in shape],
            [2**60, *shape],
            [0],
            [1.5],
            "all",
        ]
    )
    assemble(file, json.dumps(header), data)
    return name


def other_offsets(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    header, data = parse(file)
    entry = header[tensor_in(header, choose)]
    start, end = entry["data_offsets"]
    entry["data_offsets"] = choose.choice(
        [
            [start, end + 4],
            [start + 4, end + 4],
            [end, start],
            [0, 2**70],
            [True, False],
            [start],
            None,
            [-4, end],
        ]
    )
    assemble(file, json.dumps(header), data)
    return file.name


def name_twice(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    header, data = parse(file)
    name = tensor_in(header, choose)
    text = json.dumps(header)
    assemble(file, f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}", data)
    return name


def huge_header(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    data = bytearray(file.read_bytes())
    length = choose.choice([2**63, 2**64 - 1, len(data), len(data) - 7, 2**27, 0, 1])
    if choose.random() < 0.2:
        data += bytes(2**22)
        length = 2**22
    data[:8] = struct.pack("<Q", length)
    file.write_bytes(data)
    return file.name


def factors(folder: Path, choose: random.Random) -> str:
    """A weight in 8 bits or its factors missing, misshapen, of another dtype or name."""
    tensors = safetensors_io.read(folder / SINGLE)
    name = choose.choice(sorted(name for name in tensors if tensors[name].dtype == FP8))
    scale = f"{name}_scale_inv"
    match choose.randrange(6):
        case 0:
            del tensors[scale]
        case 1:
            del tensors[name]
        case 2:
            tensors[name] = tensors[name].float()
        case 3:
            tensors[scale] = torch.ones(3, 2)
        case 4:
            tensors[scale] = tensors[scale].double()
        case _:
            tensors[f"{name}_scale"] = tensors.pop(scale)
    rewrite(folder / SINGLE, tensors)
    return name
