"""Ways to break what lies around the weights: index, configuration, manifest, links.

As in ``damage_weights``, each returns what the error must name.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from checkpoint.damage_weights import SINGLE, Named, assemble, shard

INDEX = "model.safetensors.index.json"


def not_an_object(folder: Path, choose: random.Random) -> str:
    file = choose.choice([folder / "config.json", folder / INDEX, shard(folder, choose)])
    text = choose.choice(["", "[]", "3", "null", "{", '"a"', "[" * 50_000, '{"a":' * 50_000, "\x00", "{}"])
    if file.suffix == ".safetensors":
        assemble(file, text, b"")
    else:
        file.write_text(text)
    return file.name


def hostile_path(folder: Path, choose: random.Random) -> str:
    index = json.loads((folder / INDEX).read_text())
    name = choose.choice(sorted(index["weight_map"]))
    file = index["weight_map"][name]
    outside = [
        f"../{file}",
        f"/etc/{file}",
        f"./{file}",
        f"sub/{file}",
        f"..\\{file}",
        "/etc/passwd",
        "..",
        ".",
    ]
    odd = [
        f"{file}\x00",
        f".{file}",
        "model.bin",
        "",
        "~/x.safetensors",
        "a\n.safetensors",
        3,
        None,
        [file],
        {},
    ]
    index["weight_map"][name] = choose.choice([*outside, *odd])
    (folder / INDEX).write_text(json.dumps(index))
    return name


def wrong_shard(folder: Path, choose: random.Random) -> Named:
    index = json.loads((folder / INDEX).read_text())
    name = choose.choice(sorted(index["weight_map"]))
    files = {*index["weight_map"].values(), "model-00009-of-00009.safetensors"}
    index["weight_map"][name] = choose.choice(sorted(files - {index["weight_map"][name]}))
    (folder / INDEX).write_text(json.dumps(index))
    return name, "model-00009-of-00009.safetensors"


def index_lacks_or_adds(folder: Path, choose: random.Random) -> str:
    index = json.loads((folder / INDEX).read_text())
    name = choose.choice(sorted(index["weight_map"]))
    file = index["weight_map"].pop(name)
    if choose.random() < 0.5:
        index["weight_map"] |= {name: file, f"{name}_": file}
    (folder / INDEX).write_text(json.dumps(index))
    return name


def link_outside(folder: Path, choose: random.Random) -> str:
    file = shard(folder, choose)
    file.rename(folder.parent / f"outside-{folder.name}")
    file.symlink_to(folder.parent / f"outside-{folder.name}")
    return file.name


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "first_k_dense_replace",
)


def other_size(folder: Path, choose: random.Random) -> str:
    """A size in config.json that the tensors do not have, or no size at all; with and without our own key."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = choose.choice(SIZES)
    if choose.random() < 0.5:
        del config["consilium"]
    values = [0, -1, 2**31, 10**12, 10**40, "8", [8], {}, None, 1.5, config[key] + 2, config[key] * 4, True]
    config[key] = choose.choice(values)
    path.write_text(json.dumps(config))
    return "config.json"


def drop_size(folder: Path, choose: random.Random) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["consilium"]
    del config[choose.choice(["model_type", *SIZES[:7]])]
    path.write_text(json.dumps(config))
    return "config.json"


def own_key(folder: Path, choose: random.Random) -> str:
    """Our own configuration with a wrong kind of value somewhere in it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    node = config["consilium"]
    while True:
        key = choose.choice(sorted(node))
        if not isinstance(node[key], dict) or choose.random() < 0.2:
            break
        node = node[key]
    node[key] = choose.choice(["?", [[]], {"kind": "?"}, -(10**30), {"a": {"b": 1}}])
    path.write_text(json.dumps(config))
    return "config.json"


def manifest_entry(folder: Path, choose: random.Random) -> Named:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    name = choose.choice(["config.json", SINGLE])
    entry = manifest["files"][name]
    match choose.randrange(7):
        case 0:
            del manifest["files"][name]
        case 1:
            entry["bytes"] += choose.choice([-1, 1])
        case 2:
            entry["sha256"] = entry["sha256"][::-1]
        case 3:
            entry["bytes"] = "many"
        case 4:
            manifest["files"][choose.choice(["../x", "/etc/passwd", "a/../../b", "a\\b"])] = dict(entry)
        case 5:
            manifest["format"] = choose.choice([0, 2, None, "1"])
        case _:
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    path.write_text(json.dumps(manifest))
    return "manifest.json", name, INDEX


def quantization(folder: Path, choose: random.Random) -> str:
    path = folder / "config.json"
    good = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    kinds: list[Any] = [
        {"quant_method": choose.choice(["gptq", "awq", "bitsandbytes", "compressed-tensors", 3, None])},
        good | {"weight_block_size": choose.choice([None, [], [128], [0, 128], [-1, 1], "128", [1.5, 2]])},
        good | {"fmt": "e5m2"},
        good | {"activation_scheme": "static"},
        choose.choice(["fp8", 8, [], True]),
    ]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": choose.choice(kinds)}))
    return "config.json"
