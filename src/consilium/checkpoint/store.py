"""A model as a folder in the Hugging Face layout, training state beside it; saved whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

from torch import Tensor

from consilium.checkpoint import parts, safetensors_io, together
from consilium.checkpoint.folders import GGUF
from consilium.checkpoint.fp8 import Stored
from consilium.checkpoint.gguf.source import open_file
from consilium.checkpoint.hf.config import NAME as CONFIG
from consilium.checkpoint.hf.config import config_from_folder, to_hugging_face
from consilium.checkpoint.hf.generation import NAME as GENERATION
from consilium.checkpoint.hf.generation import generation_config
from consilium.checkpoint.hf.naming import named, published
from consilium.checkpoint.json_file import read_object
from consilium.checkpoint.packed import description, load_packed, packed_state, packing_of, refuse_packed
from consilium.checkpoint.source import PackedSource, Source, as_stored, find, fitted, stored_dtype
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.disk import manifest
from consilium.disk.atomic import commit_folder
from consilium.disk.files import DISK, Filesystem
from consilium.errors import ConsiliumError
from consilium.model.build import allocate, build
from consilium.model.decoder import Decoder
from consilium.model.init import first_experts
from consilium.model.packing import packing_in
from consilium.ops.weights import Packing
from consilium.parallel.mesh import ALONE, Mesh
from consilium.records.run import newest_of_run

STATE: Final = "training_state"
TENSORS: Final = f"{STATE}/{parts.SINGLE}"
SCALARS: Final = f"{STATE}/state.json"
Scalar = int | float | str


class Savable(Protocol):
    """What is kept of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    def files(self) -> Mapping[str, bytes]:
        """Contents of tokenizer.json and its companions by name."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a resume needs beside the weights: moments and generators as tensors, counters as scalars."""

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Scalar]
    firsts: Mapping[str, int] = field(default_factory=dict)
    """Of tensors of which this process has a part: the row that it begins with."""

    def copied(self) -> TrainingState:
        return TrainingState(_copied(self.tensors), dict(self.scalars))


@dataclass(frozen=True, slots=True)
class Content:
    """What ``save`` writes of a model."""

    config: Model
    generation: GenerationDefaults
    weights: Mapping[str, Tensor]
    """By state name: views of a model, or values of their own."""
    firsts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Of stacks: the expert that they begin with, where a process has some alone."""

    @staticmethod
    def of(model: Decoder) -> Content:
        """Views: what trains on changes them."""
        return Content(model.config, model.generation, model.state_dict(), first_experts(model))

    @property
    def packing(self) -> Packing | None:
        return packing_in(self.weights)

    def copied(self) -> Content:
        """In the memory of the host, so that nothing changes it."""
        return dataclasses.replace(self, weights=_copied(self.weights))


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def save(  # noqa: PLR0913 - by keyword
    model: Decoder | Content,
    folder: Path | str,
    *,
    tokenizer: Savable | None = None,
    training_state: TrainingState | None = None,
    beside: Mapping[str, Content] = MappingProxyType({}),
    files: Filesystem = DISK,
    mesh: Mesh = ALONE,
) -> None:
    """Write ``model`` to ``folder`` so that transformers opens it where it has the architecture.

    The folder appears complete or not at all. It replaces one that was saved there and is still as it was;
    a checkpoint that training can go on from is replaced by another one only. Models ``beside`` it get
    folders of their own inside, by name. Raises ConsiliumError in one sentence on no space, no permission, a
    failing disk, or a folder with anything else in it.
    """
    unless = (SCALARS,) if training_state is None else ()
    models = {"": _content(model), **beside}
    if mesh.world.size > 1:
        assert training_state is not None, "a run over processes saves to go on"
        _save_together(Path(folder), models, tokenizer, training_state, mesh, files)
        return

    def write(staged: Path) -> None:
        for name, content in models.items():
            if name:
                files.make_folder(staged / name)
            write_content(staged / name, content, tokenizer, files)
        if training_state is not None:
            files.make_folder(staged / STATE)
            files.write(staged / SCALARS, [_json(training_state.scalars)])
            safetensors_io.write(staged / TENSORS, training_state.tensors, files=files)

    commit_folder(Path(folder), write, unless=unless, files=files)


def _content(model: Decoder | Content) -> Content:
    return model if isinstance(model, Content) else Content.of(model)


def write_content(folder: Path, model: Content, tokenizer: Savable | None, files: Filesystem) -> None:
    """Write weights and what describes them into a folder that is being made."""
    for name, content in _descriptions(model, tokenizer).items():
        files.write(folder / name, [content])
    table = published(model.config) if model.packing is None else None
    tensors = dict(named(model.config, model.weights, table))
    safetensors_io.write_sharded(folder, tensors, files=files)


def load(
    folder: Path | str,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    weights: Packing | None = None,
    check_finite: bool = False,
) -> Decoder:
    """Return the model in ``folder``, ours or of a known Hugging Face architecture, on ``device``.

    A run folder stands for its newest checkpoint; a .gguf file is a model too.
    ``dtype`` is by default that of the file, with ``weights`` bfloat16. These pack matrices into fewer bits
    as they are read, for a model that generates and is not trained; those of a GGUF file or a folder that has
    them so are taken as they are. Never runs code from the folder. Raises ConsiliumError that names the file
    or tensor when anything is missing, extra, changed or of another shape; ``check_finite`` also refuses NaN
    and infinity.
    """
    computed = dtype or (None if weights is None else "bfloat16")
    source = open_folder(folder, dtype=computed, check_finite=check_finite, packed=True)
    held = packing_in(source.state)
    if held is not None and weights not in {None, held}:
        raise ConsiliumError(f"{folder} holds weights packed into {held}; leave --weights {weights} out.")
    if (packing := held or weights) is not None:
        return load_packed(source, packing).to(device)
    kind = source.state["norm.weight"].dtype
    model = allocate(source.config, source.generation, dtype=kind, device=device)
    fill(Content.of(model), source)
    return model


def open_folder(
    folder: Path | str, *, dtype: str | None = None, check_finite: bool = False, packed: bool = False
) -> PackedSource:
    """Return the weights in ``folder`` ready to be read one at a time, with nothing of the model in memory.

    Arguments and errors are those of ``load``. Packed weights are refused unless they are what is asked for.
    """
    folder = newest_of_run(folder, CONFIG)
    if folder.suffix == GGUF:
        return open_file(folder, dtype=dtype, check_finite=check_finite)
    config, found = _open(folder)
    if not packed:
        refuse_packed(folder)
    model = build(config, dtype=dtype or stored_dtype(folder, config, found), device="meta")
    packing = packing_of(folder)
    state = model.state_dict() if packing is None else packed_state(model, packing)
    return fitted(folder, config, found, state, check_finite=check_finite)


def load_weights(
    model: Decoder | Content, folder: Path | str, *, check_finite: bool = False, mesh: Mesh = ALONE
) -> None:
    """Copy the weights in ``folder`` into ``model``, tensor by tensor and in the dtypes of ``model``.

    Over processes each reads its own experts and the rows that it has of all else. Raises ConsiliumError as
    ``load`` does; nothing in ``model`` changes unless all names and shapes fit.
    """
    folder, content = Path(folder), _content(model)
    refuse_packed(folder)
    shapes = build(content.config, device="meta").state_dict()
    found = find(folder, content.config)
    source = fitted(folder, content.config, found, shapes, check_finite=check_finite)
    fill(content, source, mesh)


def load_training_state(
    folder: Path | str, *, verified: bool = False, rows: parts.Rows = parts.every_row
) -> TrainingState:
    """Return the training state in ``folder``, or raise ConsiliumError where there is none or it changed.

    ``verified``: the caller has compared the folder with its manifest, so the files are not hashed again.
    ``rows`` says which rows of each tensor are read.
    """
    folder = Path(folder)
    if not (folder / STATE).exists():
        raise ConsiliumError(
            f"{folder} has no {STATE}, so no training can go on from it; give a checkpoint of a training run."
        )
    if not verified:
        names = [name for name in manifest.read_manifest(folder) if name.startswith(f"{STATE}/")]
        manifest.verify(folder, only=(*names, SCALARS))
    return TrainingState(parts.read_rows(folder / STATE, rows), read_object(folder / SCALARS))


def _save_together(
    folder: Path,
    models: Mapping[str, Content],
    tokenizer: Savable | None,
    training_state: TrainingState,
    mesh: Mesh,
    files: Filesystem,
) -> None:
    state = training_state.tensors
    contents = together.Contents(
        models={name: together.own_weights(model, mesh) for name, model in models.items()},
        state={name: t for name, t in state.items() if _writes(mesh, part=name in training_state.firsts)},
        firsts=training_state.firsts,
        whole={
            together.within(name, file): content
            for name, model in models.items()
            for file, content in _descriptions(model, tokenizer).items()
        }
        | {SCALARS: _json(training_state.scalars)},
    )
    together.write(folder, contents, mesh, state=STATE, files=files)


def _writes(mesh: Mesh, *, part: bool) -> bool:
    """Whether a tensor is written here: a part in the first replica, what all have in the first process."""
    return mesh.first_replica if part else mesh.world.leads


def _descriptions(model: Content, tokenizer: Savable | None) -> dict[str, bytes]:
    generation = model.generation
    if tokenizer is not None:
        generation = generation.or_tokens(tokenizer.bos_id, tokenizer.eos_id)
    dtype = str(model.weights["norm.weight"].dtype).removeprefix("torch.")
    packing = model.packing
    own = to_hugging_face(model.config, dtype=dtype, generation=generation, own=packing is not None)
    return {
        CONFIG: _json(own if packing is None else own | description(packing)),
        GENERATION: _json(generation_config(generation)),
        **({} if tokenizer is None else tokenizer.files()),
    }


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _open(folder: Path) -> tuple[Model, dict[str, Stored]]:
    """What the files of ``folder`` hold, and the configuration of the model that they make up."""
    config = config_from_folder(folder)
    found = find(folder, config)
    return as_stored(config, found), found


def fill(model: Content, source: Source, mesh: Mesh = ALONE) -> None:
    """Copy what ``source`` has of ``model``; a process reads of the experts those that it has."""
    for name in model.weights.keys() & source.state.keys():
        part = mesh.sharding.part(model.weights[name])
        if part.here.ndim:
            source.fill_rows(name, part.here, model.firsts.get(name, 0) + part.rows.start)
        else:
            source.fill(name, part.here)
