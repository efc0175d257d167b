"""Ways to break what describes a model in text: any value may be another one, be gone, or stand twice.

As in ``damage_weights``, each changes a folder in place and returns what the error must name.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from checkpoint.damage_folder import INDEX
from checkpoint.damage_weights import Named

YAML = "config.yaml"
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        1.5,
        7,
        2**31,
        10**12,
        10**40,
        -(10**400),
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "?", "8", "\0", "\ud800", "a\nb", "x" * 5000, "(a+)+$", "<s>", "../x", "!!python/name:os.system"),
    *([], {}, [[]], [None], [0] * 5000, {"": {}}, {"kind": "?"}, {"type": "?"}, {"a": {"b": 1}}),
)
TEXTS = (
    *("", "[]", "3", "null", "{", "}", '"a"', "{}", "9" * 5000, "&a [*a]"),
    *("[" * 60_000, '{"a":' * 60_000, "\0" * 64),
)
BYTES = (b"\0", b"\xff", b"\n", b'"', b",", b"*", b"&x ")


def change(node: Any, choose: random.Random) -> Any:
    """Return ``node`` with something of it changed, all depths alike."""
    if not isinstance(node, dict | list) or not node or choose.random() < 0.1:
        return choose.choice(VALUES)
    found = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = choose.choice(found)
    match choose.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[f"{key}_"] = node.pop(key)
        case 1 | 2 if isinstance(node, list):
            node.insert(key, node[choose.choice(found)])
        case 2:
            node[key] = node[choose.choice(found)]
        case _:
            node[key] = change(node[key], choose)
    return node


def scratch(data: bytes, choose: random.Random) -> bytes:
    """Return ``data`` with bytes of it changed."""
    place = choose.randrange(len(data))
    match choose.randrange(5):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + bytes([data[place] ^ 1 << choose.randrange(8)]) + data[place + 1 :]
        case 2:
            end = min(place + choose.randrange(1, 200), len(data))
            return data[:end] + data[place:end] + data[end:]
        case 3:
            return data[:place] + choose.choice(BYTES) + data[place:]
        case _:
            return choose.choice(TEXTS).encode()


def spoil(path: Path, choose: random.Random) -> None:
    if choose.random() < 0.3:
        path.write_bytes(scratch(path.read_bytes(), choose))
    elif path.name == YAML:
        data = change(yaml.safe_load(path.read_text()), choose)
        path.write_text(yaml.safe_dump(data, sort_keys=False), errors="surrogatepass")
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()), choose)))


def any_config(folder: Path, choose: random.Random) -> Named:
    spoil(folder / "config.json", choose)
    return "config.json"


def any_generation(folder: Path, choose: random.Random) -> Named:
    spoil(folder / "generation_config.json", choose)
    return "generation_config.json"


def any_tokenizer(folder: Path, choose: random.Random) -> Named:
    spoil(folder / "tokenizer.json", choose)
    return "tokenizer.json"


def any_tokenizer_config(folder: Path, choose: random.Random) -> Named:
    spoil(folder / "tokenizer_config.json", choose)
    return "tokenizer_config.json"


def any_index(folder: Path, choose: random.Random) -> Named:
    """It may name a file that is not there."""
    spoil(folder / INDEX, choose)
    return INDEX, ".safetensors"


def any_yaml(folder: Path, choose: random.Random) -> Named:
    spoil(folder / YAML, choose)
    return YAML
