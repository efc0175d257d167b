"""The weight files of a folder as one table of tensors, checked against a model before anything is read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from consilium.checkpoint.safetensors_io import SINGLE, Entry, read_header
from consilium.errors import ConsiliumError

INDEX: Final = f"{SINGLE}.index.json"
_SHARD: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
_LARGEST_INDEX: Final = 256 * 2**20


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: ``model.safetensors``, or the shards of its index."""
    weight_map = _weight_map(folder)
    return (
        [folder / SINGLE]
        if weight_map is None
        else [folder / file for file in sorted(set(weight_map.values()))]
    )


def find(folder: Path, *, tensors: int | None = None) -> dict[str, Entry]:
    """Return every tensor of ``folder``, or raise ConsiliumError naming the file or tensor at fault."""
    weight_map = _weight_map(folder)
    if weight_map is None:
        return read_header(folder / SINGLE, tensors=tensors)
    found: dict[str, Entry] = {}
    for path in (folder / file for file in sorted(set(weight_map.values()))):
        for name, entry in read_header(path, tensors=tensors).items():
            if weight_map.get(name) != path.name:
                raise ConsiliumError(
                    f"{path} holds tensor {name[:80]}, which {INDEX} does not place there;"
                    " the shards are of different saves, so download or save them again."
                )
            found[name] = entry
    absent = [name for name in weight_map if name not in found]
    if absent:
        raise ConsiliumError(
            f"{folder / weight_map[absent[0]]} lacks tensor {absent[0][:80]} that {INDEX} places there;"
            " download or save the shards again."
        )
    return found


def match(
    found: Mapping[str, Shaped],
    expected: Mapping[str, Tensor],
    folder: Path,
    *,
    ignored: Iterable[re.Pattern[str]] = (),
) -> None:
    """Raise ConsiliumError unless names and shapes are exactly the expected; ``ignored`` may be extra."""
    patterns = tuple(ignored)
    extra = [
        name
        for name, stored in found.items()
        # A tensor without values is nothing, such as the shared experts of a model that has none.
        if name not in expected
        and math.prod(stored.shape)
        and not any(pattern.fullmatch(name) for pattern in patterns)
    ]
    faults = _list("missing", [n for n in expected if n not in found]) + _list("unknown", extra)
    shapes = [
        f"{name} is {list(found[name].shape)} and must be {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    faults += _list("of another shape", shapes)
    if faults:
        folder_of_two = ("its config.json", "use the two files of one save")
        described, remedy = folder_of_two if folder.is_dir() else ("its own keys", "download the file again")
        raise ConsiliumError(
            f"the weights in {folder} do not fit {described}: {'; '.join(faults)}; {remedy}."
        )


def _list(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{len(names)} {kind} ({', '.join(name[:120] for name in names[:3])}{more})"]


def _weight_map(folder: Path) -> dict[str, str] | None:
    """``{tensor: file}`` of the index; None where there is one file."""
    if (folder / SINGLE).exists():
        _inside(folder, SINGLE, SINGLE)
        return None
    path = folder / INDEX
    if not path.exists():
        raise ConsiliumError(
            f"{folder} holds no {SINGLE} and no {INDEX}; give a folder with weights in safetensors"
            " (pickled .bin and .pt files are never opened)."
        )
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ConsiliumError(f"{path} is larger than {_LARGEST_INDEX} bytes; download or save it again.")
        return _placed(folder, json.loads(path.read_bytes())["weight_map"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        if isinstance(error, ConsiliumError):
            raise
        raise ConsiliumError(
            f"{path} is not a readable index of weights; download or save it again."
        ) from None


def _placed(folder: Path, weight_map: Mapping[str, object]) -> dict[str, str]:
    """Check each file once: an index has thousands of tensors a file."""
    inside: set[object] = set()
    placed: dict[str, str] = {}
    for name, file in weight_map.items():
        known = isinstance(file, str) and file in inside
        placed[name] = str(file) if known else _inside(folder, file, f"{INDEX}: {name!r}")
        inside.add(placed[name])
    return placed


def _inside(folder: Path, file: object, where: str) -> str:
    """A shard is a plain file of this folder; the only link allowed is that of a Hugging Face cache."""
    if isinstance(file, str) and _SHARD.fullmatch(file):
        real = (folder / file).resolve()
        home = folder.resolve()
        if real.parent in (home, home.parent.parent / "blobs"):
            return file
    raise ConsiliumError(
        f"{folder / where[:200]} names or links {str(file)[:80]!r}, which is not a file of this folder;"
        " download the folder again from a source you trust."
    )


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names and values in their order, whatever the format of the files that they come from."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {list(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        found.update(flat.numpy().data)
    return found.hexdigest()
