"""A checkpoint that several processes write: each its part, hashed by it, and one commits the folder.

The folder is that of one process: a Hugging Face layout of whole tensors, in shards. An expert is written by
who has it; what is cut over processes is put together one tensor at a time, and each has some to write.
Training state needs no layout of anybody, and every process writes the rows that it has.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, final

import torch
from torch import Tensor

from consilium.checkpoint import parts, safetensors_io, weights
from consilium.checkpoint.hf.naming import is_by_expert, named, published
from consilium.config.model import Model as Config
from consilium.disk import manifest
from consilium.disk.atomic import publish, staging
from consilium.disk.files import Filesystem
from consilium.parallel.mesh import Mesh


@final
@dataclass(frozen=True, slots=True)
class Contents:
    """What one process writes. Files of ``whole`` are written by the one that leads."""

    models: Mapping[str, Mapping[str, Tensor]]
    """Weights by their names on disk, of each model by the folder inside, "" where there is none."""
    state: Mapping[str, Tensor]
    firsts: Mapping[str, int]
    """Of those of ``state`` that are parts: the row that they begin with."""
    whole: Mapping[str, bytes]


def within(inner: str, name: str) -> str:
    """The name of a file in a checkpoint, as its manifest has it."""
    return (PurePosixPath(inner) / name).as_posix()


def write(folder: Path, contents: Contents, mesh: Mesh, *, state: str, files: Filesystem) -> None:
    """Commit ``folder`` as every process wrote it, or nowhere. Errors are those of ``commit_folder``.

    ``state`` is the folder inside for training state. All processes see the same file system.
    """
    world = mesh.world
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            staged = stack.enter_context(staging(folder, files=files))
            for inner in filter(None, (state, *contents.models)):
                files.make_folder(staged / inner)
            return str(staged)

        staged = Path(world.led(begin))
        told = world.agreed(lambda: json.dumps(_write_part(staged, contents, mesh, state, files)))

        def finish() -> None:
            answers = [json.loads(text) for text in told]
            for name, content in {**contents.whole, **_indices(answers, state)}.items():
                files.write(staged / name, [content])
            known = {name: entry for answer in answers for name, entry in answer["files"].items()}
            publish(staged, folder, known=known, files=files)

        world.led(finish)


class Model(Protocol):
    @property
    def config(self) -> Config: ...

    @property
    def weights(self) -> Mapping[str, Tensor]: ...

    @property
    def firsts(self) -> Mapping[str, int]: ...


@torch.no_grad()
def own_weights(model: Model, mesh: Mesh) -> dict[str, Tensor]:
    """The tensors that this process writes, by their names on disk; all processes ask together."""
    table, stacks = published(model.config), model.firsts
    mine: dict[str, Tensor] = {}
    for turn, (name, tensor) in enumerate(model.weights.items()):
        if name in stacks and is_by_expert(model.config, name, table):
            part = mesh.sharding.part(tensor)
            if mesh.first_replica:
                first = stacks[name] + part.rows.start
                mine.update(named(model.config, {name: part.here}, table, first=first))
            continue
        whole = mesh.sharding.gathered(tensor)
        if name in stacks:
            whole = mesh.expert.joined(whole)
        if turn % mesh.world.size == mesh.world.rank:
            mine.update(named(model.config, {name: whole}, table))
    return mine


def _write_part(
    staged: Path, contents: Contents, mesh: Mesh, state: str, files: Filesystem
) -> dict[str, Any]:
    """What the one that leads must know of the files that are durable now."""
    world = mesh.world
    shard = f"model-{world.rank + 1:05}-of-{world.size:05}.safetensors"
    of_state = parts.file_of(world.rank, world.size)
    answer: dict[str, Any] = {"files": {}, "shard": shard, "state": of_state, "firsts": dict(contents.firsts)}
    models = {within(inner, shard): tensors for inner, tensors in contents.models.items()}
    for name, tensors in (models | {within(state, of_state): contents.state}).items():
        if tensors:
            safetensors_io.write(staged / name, tensors, files=files)
            answer["files"][name] = manifest.entry_of(staged / name, files)
    answer["models"] = {inner: list(tensors) for inner, tensors in contents.models.items()}
    answer["bytes"] = {inner: _bytes(tensors) for inner, tensors in contents.models.items()}
    return answer


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _indices(answers: Sequence[Mapping[str, Any]], state: str) -> dict[str, bytes]:
    written = [answer for answer in answers if within(state, answer["state"]) in answer["files"]]
    firsts = {answer["state"]: answer["firsts"] for answer in written}
    return {within(state, parts.INDEX): parts.index_text(firsts)} | {
        within(inner, weights.INDEX): _index(answers, inner) for inner in answers[0]["models"]
    }


def _index(answers: Sequence[Mapping[str, Any]], inner: str) -> bytes:
    placed = {name: answer["shard"] for answer in answers for name in answer["models"][inner]}
    total = sum(answer["bytes"][inner] for answer in answers)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return json.dumps(index, indent=2).encode()
