"""Folders broken in many ways, and what loading makes of each.

A kind of damage changes a copy of a folder in place and returns what the error must name: a file, or a
tensor. What cannot be known is not asked: a changed value in a file without a manifest, two tensors of one
shape exchanged there, or a number in a foreign config.json that another model could have.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import damage_folder, damage_text, damage_weights
from checkpoint.damage_weights import FP8, SINGLE, Named, rewrite
from checkpoint.models import deepseek_v3, saved, trained
from consilium.checkpoint import safetensors_io, store
from consilium.checkpoint.verify import verify_folder
from consilium.config import io
from consilium.config.training import Training
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError

SECONDS = 2.0
"""Of the processor, for this process and what it started: a busy machine's clock says nothing."""
TEXT = "def f(a):\n    return 'für' <|im_start|> 你好 \0"

Damage = Callable[[Path, random.Random], Named]


@dataclass(frozen=True)
class Templates:
    """Whole folders: as we save it, as a hub has it in three shards, as DeepSeek publishes 8 bits.

    The last has all that is said of a model in text, and a run, beside its shards.
    """

    folders: Mapping[str, Path]
    states: Mapping[str, dict[str, Tensor]]


def make_templates(parent: Path) -> Templates:
    config = deepseek_v3(depth=1)
    sealed = saved(parent / "sealed", config)
    sharded, eight_bits = (saved(parent / name, config, manifest=False) for name in ("sharded", "eight_bits"))
    tensors = safetensors_io.read(sealed / SINGLE)
    rewrite(eight_bits / SINGLE, in_eight_bits(tensors))
    (sharded / SINGLE).unlink()
    size = sum(tensor.nbytes for tensor in tensors.values())
    safetensors_io.write_sharded(sharded, tensors, shard_bytes=size // 2)
    folders = {"sealed": sealed, "sharded": sharded, "eight_bits": eight_bits}
    folders["described"] = described(parent / "described")
    return Templates(folders, {name: store.load(path).state_dict() for name, path in folders.items()})


def described(folder: Path) -> Path:
    tokenizer = Tokenizer.of_bytes()
    config = dataclasses.replace(deepseek_v3(), vocab_size=tokenizer.vocab_size)
    store.save(trained(config), folder, tokenizer=tokenizer)
    (folder / "manifest.json").unlink()
    tensors = safetensors_io.read(folder / SINGLE)
    (folder / SINGLE).unlink()
    safetensors_io.write_sharded(folder, tensors, shard_bytes=sum(t.nbytes for t in tensors.values()) // 2)
    (folder / damage_text.YAML).write_text(io.to_yaml(Training(model=config, steps=3)))
    return folder


def in_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    changed = dict(tensors)
    for name in [name for name in tensors if "_proj" in name]:
        grid = [math.ceil(side / 128) for side in tensors[name].shape]
        changed[name], changed[f"{name}_scale_inv"] = tensors[name].to(FP8), torch.rand(grid) + 0.5
    return changed


KINDS: Mapping[str, tuple[str, Damage]] = {
    damage.__name__: (template, damage)
    for template, damages in {
        "sealed": (
            damage_weights.flip_anywhere,
            damage_weights.truncate,
            damage_weights.lengthen,
            damage_weights.remove_file,
            damage_folder.manifest_entry,
        ),
        "sharded": (
            damage_weights.flip_in_header,
            damage_weights.exchange_files,
            damage_weights.exchange_tensors,
            damage_weights.drop_tensor,
            damage_weights.add_tensor,
            damage_weights.rename_tensor,
            damage_weights.other_dtype,
            damage_weights.other_shape,
            damage_weights.other_offsets,
            damage_weights.name_twice,
            damage_weights.huge_header,
            damage_folder.not_an_object,
            damage_folder.hostile_path,
            damage_folder.wrong_shard,
            damage_folder.index_lacks_or_adds,
            damage_folder.link_outside,
            damage_folder.other_size,
            damage_folder.drop_size,
            damage_folder.own_key,
        ),
        "eight_bits": (damage_weights.factors, damage_folder.quantization),
        "described": (
            damage_text.any_config,
            damage_text.any_generation,
            damage_text.any_tokenizer,
            damage_text.any_tokenizer_config,
            damage_text.any_index,
            damage_text.any_yaml,
        ),
    }.items()
    for damage in damages
}


@dataclass
class Counts:
    """Of every kind: folders refused in one sentence, folders that load as before, and failures."""

    refused: Counter[str] = field(default_factory=Counter)
    harmless: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0

    @property
    def trials(self) -> int:
        return self.refused.total() + self.harmless.total() + len(self.failures)


def mutate(templates: Templates, scratch: Path, trials: int) -> Counts:
    """Break ``trials`` folders, every kind in turn, and load each."""
    counts = Counts()
    kinds = list(KINDS.items())
    for trial in range(trials):
        kind, (template, damage) = kinds[trial % len(kinds)]
        folder = Path(shutil.copytree(templates.folders[template], scratch / f"{trial}"))
        named = damage(folder, random.Random(f"{kind} {trial}"))
        start = sum(os.times()[:4])
        outcome = attempt(folder, named, templates.states[template])
        seconds = sum(os.times()[:4]) - start
        counts.slowest = max(counts.slowest, seconds)
        if outcome not in {"refused", "harmless"} or seconds > SECONDS:
            counts.failures.append(f"{kind} {trial}: {outcome}, {seconds:.2f} s")
        else:
            (counts.refused if outcome == "refused" else counts.harmless)[kind] += 1
        shutil.rmtree(folder)
    return counts


def attempt(folder: Path, named: Named, expected: dict[str, Tensor]) -> str:
    """``refused`` in one sentence that says where, ``harmless``, or what went wrong."""
    try:
        if faults := verify_folder(folder).faults:
            raise ConsiliumError(faults[0])  # noqa: TRY301 - counted as what loading raises
        state = store.load(folder).state_dict()
        read_texts(folder)
    except ConsiliumError as error:
        text = str(error)
        rest = text.replace(str(folder), "")
        said = any(name in rest for name in ((named,) if isinstance(named, str) else named))
        clear = said and "\n" not in text and len(text) < 2000 and str(folder) in text
        return "refused" if clear else f"unclear: {text[:300]!r} should name {named!r}"
    except Exception as error:  # noqa: BLE001 - any other type is the failure that is looked for
        return f"{type(error).__name__}: {error}"
    same = state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in expected)
    return "harmless" if same else "loaded as another model"


def read_texts(folder: Path) -> None:
    """What a run folder and a tokenizer say, as the verbs read it."""
    if (folder / damage_text.YAML).exists():
        io.read_yaml(Training, folder / damage_text.YAML)
        tokenizer = Tokenizer.load(folder)
        ids = tokenizer.encode_template(TEXT)
        tokenizer.decode(ids)
        tokenizer.source_sizes(TEXT, tokenizer.encode(TEXT))
