"""A folder of weights to one of another dtype, a tensor at a time; its tokenizer goes along."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from consilium.checkpoint import safetensors_io
from consilium.checkpoint.folders import GGUF, refuse_inside
from consilium.checkpoint.hf.config import NAME as CONFIG
from consilium.checkpoint.hf.config import to_hugging_face
from consilium.checkpoint.hf.generation import NAME as GENERATION
from consilium.checkpoint.hf.generation import generation_config
from consilium.checkpoint.hf.naming import named, published
from consilium.checkpoint.json_file import read_bytes, read_object
from consilium.checkpoint.packed import load_packed
from consilium.checkpoint.source import FolderSource, Source
from consilium.checkpoint.store import SCALARS, Content, open_folder, write_content
from consilium.data.gguf import has_tokenizer, tokenizer_files
from consilium.data.tokenizer import TEMPLATE_FILE
from consilium.disk.atomic import commit_folder
from consilium.disk.files import DISK, Filesystem
from consilium.ops.weights import Packing
from consilium.records.run import newest_of_run

Progress = Callable[[int, int], None]
"""Hears of bytes done and bytes in all."""

_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_CARRIED: Final = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    TEMPLATE_FILE,
)
"""Files that go along as they are. Code never does."""


def convert(
    folder: Path | str,
    destination: Path | str,
    *,
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
    files: Filesystem = DISK,
) -> None:
    """Write the model in ``folder`` to ``destination`` in the published layout of its architecture.

    ``dtype`` is by default that of the file. ``folder`` may be a GGUF file. One tensor is in memory at a
    time. The new folder appears complete or not at all. Raises ConsiliumError as ``load`` and ``save`` do,
    for NaN or infinity, and for weights beyond the range of ``dtype``.
    """
    folder, destination = Path(newest_of_run(folder, CONFIG)), Path(destination)
    refuse_inside("convert", folder, destination)
    source = open_folder(folder, dtype=dtype, check_finite=True)
    beside = companions(folder)
    commit_folder(
        destination,
        lambda staged: fill_folder(staged, source, beside=beside, progress=progress, files=files),
        unless=(SCALARS,),
        files=files,
    )


def pack(
    folder: Path | str,
    destination: Path | str,
    packing: Packing,
    *,
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
    files: Filesystem = DISK,
) -> None:
    """Write the model in ``folder`` with its matrices packed, to be generated from.

    ``dtype`` is that of the other tensors, by default bfloat16. The packed model is in memory. Progress and
    errors are those of ``convert``.
    """
    folder, destination = Path(newest_of_run(folder, CONFIG)), Path(destination)
    refuse_inside("convert", folder, destination)
    source, beside = open_folder(folder, dtype=dtype or "bfloat16", check_finite=True), companions(folder)
    content = Content.of(load_packed(source, packing, progress))

    def write(staged: Path) -> None:
        write_content(staged, content, None, files)
        for name, held in beside.items():
            files.write(staged / name, [held])

    commit_folder(destination, write, unless=(SCALARS,), files=files)


def fill_folder(
    folder: Path,
    source: Source,
    *,
    beside: Mapping[str, bytes],
    progress: Progress = lambda done, total: None,
    files: Filesystem = DISK,
) -> None:
    """Write ``source`` into ``folder``, and the files ``beside`` it by name, a tensor of ours at a time."""
    written = dict(named(source.config, source.state, published(source.config)))
    for name, content in {**_descriptions(source), **beside}.items():
        files.write(folder / name, [content])
    values = _checked(_values(source, written), written, progress)
    safetensors_io.write_sharded(folder, written, values=values, files=files)


@final
class _Repacked:
    """Tensors for one layout out of another: a tensor of ours is put together, then cut anew."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._ours = {
            name: ours
            for ours, tensor in source.state.items()
            for name, _ in named(source.config, {ours: tensor}, published(source.config))
        }
        self._ready: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self._ready:
            ours = self._ours[name]
            read = {ours: self._source.read(ours)}
            self._ready = dict(named(self._source.config, read, published(self._source.config)))
        return self._ready.pop(name)


def _values(source: Source, written: Mapping[str, Tensor]) -> safetensors_io.Values:
    """Where the layout stays, each tensor of the files is one of the result."""
    match source:
        case FolderSource(table=table) if table == published(source.config):

            def copied(name: str) -> Tensor:
                values = torch.zeros_like(written[name], device="cpu")
                source.fill_stored(name, values)
                return values

            return copied
        case _:
            return _Repacked(source)


def _checked(
    values: safetensors_io.Values, written: Mapping[str, Tensor], progress: Progress
) -> safetensors_io.Values:
    """``values`` that tell ``progress``, none of them beyond the range of its dtype."""
    total = sum(tensor.nbytes for tensor in written.values())
    done = 0

    def checked(name: str) -> Tensor:
        nonlocal done
        found = values(name)
        safetensors_io.refuse_overflow(name, found)
        done += found.nbytes
        progress(done, total)
        return found

    return checked


def _descriptions(source: Source) -> dict[str, bytes]:
    generation = source.generation
    dtype = str(source.state["embed.weight"].dtype).removeprefix("torch.")
    return {
        CONFIG: _json(to_hugging_face(source.config, dtype=dtype, generation=generation)),
        GENERATION: _json(generation_config(generation)),
    }


def companions(folder: Path) -> dict[str, bytes]:
    """The tokenizer of a folder or of a GGUF file, as the files that go along with its weights."""
    if folder.suffix == GGUF:
        return _own_tokenizer(folder)
    described: dict[str, bytes] = {}
    if (folder / _TOKENIZER_CONFIG).exists():
        described[_TOKENIZER_CONFIG] = _json(_tokenizer_config(read_object(folder / _TOKENIZER_CONFIG)))
    carried = (name for name in _CARRIED if (folder / name).exists())
    return described | {name: read_bytes(folder / name) for name in carried}


def _own_tokenizer(file: Path) -> dict[str, bytes]:
    """The tokenizer and the chat template that a GGUF file holds, if it does."""
    if not has_tokenizer(file):
        return {}
    description, config = tokenizer_files(file)
    return {"tokenizer.json": description.encode(), _TOKENIZER_CONFIG: _json(config)}


def _tokenizer_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without code, and with a class that every reader has: transformers 5 writes one that only it knows."""
    kept = {key: value for key, value in found.items() if key != "auto_map"}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    return kept


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
