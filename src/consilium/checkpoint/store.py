"""A model as a folder in the Hugging Face layout, training state beside it; saved whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor

from consilium.checkpoint import manifest, safetensors_io, weights
from consilium.checkpoint.atomic import commit_folder, recover
from consilium.checkpoint.files import DISK, Filesystem
from consilium.checkpoint.hf_architecture import architecture
from consilium.checkpoint.hf_config import NAME as CONFIG
from consilium.checkpoint.hf_config import config_from_folder, generation_config, to_hugging_face
from consilium.checkpoint.json_file import read_object
from consilium.checkpoint.naming import REDUNDANT, parts
from consilium.checkpoint.safetensors_io import Entry
from consilium.config.model import MTP, Model
from consilium.errors import ConsiliumError
from consilium.model.build import DTYPES, torch_dtype
from consilium.model.decoder import Decoder
from consilium.planner.parameters import parameters

STATE: Final = "training_state"
TENSORS: Final = f"{STATE}/state.safetensors"
SCALARS: Final = f"{STATE}/state.json"
Scalar = int | float | str
_FEW: Final = 24
"""More tensors than any block has beside its experts."""
_SPARE: Final = 2**20
"""Values that a configuration may always ask for: below this, naming the missing tensors says more."""


class Savable(Protocol):
    """What is kept of a tokenizer."""

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


def save(
    model: Decoder,
    folder: Path | str,
    *,
    tokenizer: Savable | None = None,
    training_state: TrainingState | None = None,
    files: Filesystem = DISK,
) -> None:
    """Write ``model`` to ``folder`` so that transformers opens it where it has the architecture.

    The folder appears complete or not at all, and replaces one saved there before. Raises ConsiliumError in
    one sentence on no space, no permission, a failing disk, or a folder with other files in it.
    """

    def write(staged: Path) -> None:
        for name, content in _descriptions(model, tokenizer).items():
            files.write(staged / name, [content])
        safetensors_io.write_sharded(staged, _on_disk(model), files=files)
        if training_state is not None:
            files.make_folder(staged / STATE)
            files.write(staged / SCALARS, [_json(training_state.scalars)])
            safetensors_io.write(staged / TENSORS, training_state.tensors, files=files)

    commit_folder(Path(folder), write, files=files)


def load(folder: Path | str, *, dtype: str | None = None, check_finite: bool = False) -> Decoder:
    """Return the model in ``folder``, ours or of a known Hugging Face architecture, on the CPU.

    ``dtype`` is by default that of the file. Never runs code from the folder. Raises ConsiliumError that
    names the file or tensor when anything is missing, extra, changed or of another shape; ``check_finite``
    also refuses NaN and infinity.
    """
    folder = Path(folder)
    recover(folder)
    config = config_from_folder(folder)
    found = _find(folder, config)
    config = _as_stored(config, found)
    first = found.get("model.embed_tokens.weight", found.get("embed.weight"))
    # Parameters are allocated without being touched, so that a conversion of all of them needs no memory yet.
    model = Decoder(config).to(torch_dtype(dtype or _stored_dtype(first)))
    weights.match(found, _on_disk(model), folder, ignored=REDUNDANT)
    _fill(model, found, check_finite=check_finite)
    return model


def load_weights(model: Decoder, folder: Path | str, *, check_finite: bool = False) -> None:
    """Copy the weights in ``folder`` into ``model``, tensor by tensor and in the dtypes of ``model``.

    Raises ConsiliumError as ``load`` does; nothing in ``model`` changes unless all names and shapes fit.
    """
    folder = Path(folder)
    found = _find(folder, model.config)
    weights.match(found, _on_disk(model), folder, ignored=REDUNDANT)
    _fill(model, found, check_finite=check_finite)


def load_training_state(folder: Path | str) -> TrainingState:
    """Return the training state in ``folder``, or raise ConsiliumError where there is none or it changed."""
    folder = Path(folder)
    if not (folder / STATE).exists():
        raise ConsiliumError(
            f"{folder} has no {STATE}, so no training can go on from it; give a checkpoint of a training run."
        )
    manifest.verify(folder, only=(TENSORS, SCALARS))
    return TrainingState(safetensors_io.read(folder / TENSORS), read_object(folder / SCALARS))


def _on_disk(model: Decoder) -> dict[str, Tensor]:
    """Every tensor of ``model`` under its name on disk, as views of the model's own memory."""
    state: dict[str, Tensor] = model.state_dict()
    found = architecture(model.config)
    return state if found is None else dict(parts(state, found, model.config.layers))


def _descriptions(model: Decoder, tokenizer: Savable | None) -> dict[str, bytes]:
    end = None if tokenizer is None else tokenizer.eos_id
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    return {
        CONFIG: _json(to_hugging_face(model.config, dtype=dtype, end_of_text=end)),
        "generation_config.json": _json(generation_config(end)),
        **({} if tokenizer is None else tokenizer.files()),
    }


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _find(folder: Path, config: Model) -> dict[str, Entry]:
    """The tensors of ``folder``, which must be the ones saved where there is a manifest."""
    if (folder / manifest.NAME).exists():
        names = [path.name for path in weights.weight_files(folder)]
        manifest.verify(folder, only=(CONFIG, weights.INDEX, *names))
    experts = 0 if config.moe is None else config.moe.experts
    blocks = config.layers + config.mtp.depth
    found = weights.find(folder, tensors=_FEW * (blocks + 1) + 3 * blocks * experts)
    # Checked before anything is built: a small file must not be able to ask for a huge model.
    held = sum(math.prod(entry.shape) for entry in found.values())
    smallest = blocks if architecture(config) is None else max(blocks, experts)
    if smallest > len(found) or _values(config) > _SPARE + 4 * held:
        raise ConsiliumError(
            f"{folder / CONFIG} asks for {blocks} layers of {experts} experts, far more than the {len(found)}"
            " tensors of the weights beside it; use the two files of one save."
        )
    return found


def _values(config: Model) -> int:
    count = parameters(config)
    return count.total + count.mtp


def _as_stored(config: Model, found: Mapping[str, Entry]) -> Model:
    """Without the multi-token prediction modules that a file of transformers announces and does not hold."""
    held = any(name.startswith((f"model.layers.{config.layers}.", "mtp.")) for name in found)
    return config if held or not config.mtp.depth else dataclasses.replace(config, mtp=MTP(depth=0))


def _stored_dtype(entry: Entry | None) -> str:
    name = "float32" if entry is None else str(entry.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _fill(model: Decoder, found: Mapping[str, Entry], *, check_finite: bool) -> None:
    for name, target in _on_disk(model).items():
        safetensors_io.read_into(name, found[name], target, check_finite=check_finite)
