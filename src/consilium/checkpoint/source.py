"""The weights of a folder, checked against its configuration before any is read, then read one by one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, final

import torch
from torch import Tensor

from consilium.checkpoint import fp8, safetensors_io, weights
from consilium.checkpoint.fp8 import Scaled, Stored
from consilium.checkpoint.hf.config import NAME as CONFIG
from consilium.checkpoint.hf.config import layout_of
from consilium.checkpoint.hf.generation import read_generation
from consilium.checkpoint.hf.naming import covers, is_by_expert, named, published, redundant, table_of
from consilium.checkpoint.json_file import read_object
from consilium.checkpoint.safetensors_io import Entry
from consilium.config.generation import GenerationDefaults
from consilium.config.model import MTP, Model
from consilium.disk import manifest
from consilium.errors import ConsiliumError
from consilium.model.build import DTYPES
from consilium.moe.routing.router import table_of_old
from consilium.ops.weights import FLOAT8_GROUP, Packing
from consilium.planner.parameters import parameters
from consilium.recipes.layout import Table

_EMBEDDINGS: Final = ("embed_tokens.weight", "in_out_embed.weight")
_PIECE: Final = 2**20
_FEW: Final = 24
"""More tensors than any block has beside its experts."""
_SPARE: Final = 2**20
"""Values that a configuration may always ask for: below this, naming the missing tensors says more."""


class Source(Protocol):
    """Weights that fit ``config``; ``state`` says our names, shapes and dtypes and may have no memory."""

    @property
    def config(self) -> Model: ...

    @property
    def generation(self) -> GenerationDefaults: ...

    @property
    def state(self) -> Mapping[str, Tensor]: ...

    def fill(self, name: str, target: Tensor) -> None:
        """Copy our tensor ``name`` into ``target``, in its dtype; ConsiliumError names a tensor at fault."""
        ...

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        """The same of its rows from ``first`` on, as many as ``target`` has."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return our tensor ``name`` on the CPU, by default in the dtype that ``state`` says."""
        ...


class PackedSource(Source, Protocol):
    """A ``Source`` of files, which may hold weights packed."""

    def holds(self, name: str, packing: Packing) -> bool:
        """Whether the files have our tensor ``name`` packed so."""
        ...

    def fill_packed(self, name: str, codes: Tensor, scales: Tensor) -> None:
        """Copy the parts of our tensor ``name`` (``ops.weights.Packed``) as they lie in the files."""
        ...


@final
@dataclass(frozen=True, slots=True)
class FolderSource:
    """A ``Source`` in safetensors; ``table`` is the layout that the files follow, None for our own."""

    config: Model
    generation: GenerationDefaults
    state: Mapping[str, Tensor]
    found: Mapping[str, Stored]
    table: Table | None
    check_finite: bool

    def fill(self, name: str, target: Tensor) -> None:
        """Copy our tensor ``name`` into ``target``, in its dtype; ConsiliumError names a tensor at fault."""
        if self.config.moe is not None and _derived(name, self.found):
            target.copy_(table_of_old(self.config.moe.router, self.config.moe.experts))
            return
        for stored_name, view in self._named(name, target):
            self.fill_stored(stored_name, view)

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        """Copy the rows of our tensor ``name`` from ``first`` on, as many as ``target`` has.

        Of a stack that lies there expert by expert, or as it is, nothing else is read.
        """
        whole = self.found.get(name) if self.table is None else None
        if is_by_expert(self.config, name, self.table):
            for stored_name, view in named(self.config, {name: target}, self.table, first=first):
                self.fill_stored(stored_name, view)
        elif target.shape == self.state[name].shape:
            self.fill(name, target)
        elif isinstance(whole, Entry) and whole.shape == self.state[name].shape:
            rows = safetensors_io.rows_of(whole, first, first + target.shape[0])
            safetensors_io.read_into(name, rows, target, check_finite=self.check_finite)
        else:
            target.copy_(self.read(name)[first : first + target.shape[0]])

    def holds(self, name: str, packing: Packing) -> bool:
        """Whether the files have our tensor ``name`` packed so: by us, or in blocks as DeepSeek publishes."""
        if f"{name}_scales" in self.state:
            return True
        stored = [self.found.get(theirs) for theirs, _ in self._named(name, self.state[name])]
        return packing == "fp8" and all(
            isinstance(one, Scaled) and one.block[1] == FLOAT8_GROUP for one in stored
        )

    def fill_packed(self, name: str, codes: Tensor, scales: Tensor) -> None:
        """Copy the parts of our tensor ``name`` (``ops.weights.Packed``) as they lie in the files."""
        if f"{name}_scales" in self.state:
            self.fill(name, codes)
            self.fill(f"{name}_scales", scales)
            return
        for (theirs, code), (_, scale) in zip(
            self._named(name, codes), self._named(name, scales), strict=True
        ):
            scaled = self.found[theirs]
            assert isinstance(scaled, Scaled), "who asks has seen that the files hold it"
            fp8.read_packed(theirs, scaled, code, scale, check_finite=self.check_finite)

    def _named(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        return named(self.config, {name: tensor}, self.table)

    def fill_stored(self, name: str, target: Tensor) -> None:
        """Copy one tensor of the files, by its name there."""
        match self.found[name]:
            case Entry() as entry:
                safetensors_io.read_into(name, entry, target, check_finite=self.check_finite)
            case Scaled() as scaled:
                fp8.read_into(name, scaled, target, check_finite=self.check_finite)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return our tensor ``name`` on the CPU, by default in the dtype that ``state`` says."""
        values = torch.zeros_like(self.state[name], dtype=dtype, device="cpu")
        self.fill(name, values)
        return values


def fitted(
    folder: Path,
    config: Model,
    found: Mapping[str, Stored],
    state: Mapping[str, Tensor],
    *,
    check_finite: bool = False,
) -> FolderSource:
    """Check that names and shapes ``found`` in ``folder`` are those of ``state``, a model of ``config``.

    Raises ConsiliumError naming the tensor at fault.
    """
    table = table_of(layout_of(folder), found)
    # The folder of another kind of model: what is missing is said in the names of this one.
    table = table if covers(table, config, state) else published(config)
    asked = {name: tensor for name, tensor in state.items() if not _derived(name, found)}
    weights.match(found, dict(named(config, asked, table)), folder, ignored=redundant(config))
    return FolderSource(config, read_generation(folder), state, found, table, check_finite)


def _derived(name: str, found: Mapping[str, Stored]) -> bool:
    """Whether ``name`` is the table of a hash router in a folder of before tables were saved."""
    return name.endswith(".moe.router.table") and name not in found


def find(folder: Path, config: Model) -> dict[str, Stored]:
    """Return the tensors of ``folder``, where there is a manifest in files of the size that was saved.

    What describes them is compared byte for byte; the weights themselves only where ``verify_folder`` or a
    resume asks for it, since that reads them all. Raises ConsiliumError naming the file or tensor at fault,
    and where ``config`` asks for far more than the folder holds.
    """
    if (folder / manifest.NAME).exists():
        manifest.verify(folder, only=(CONFIG, weights.INDEX))
        manifest.check_complete(folder, only={path.name for path in weights.weight_files(folder)})
    keys = read_object(folder / CONFIG)
    experts = 0 if config.moe is None else config.moe.experts
    blocks = config.layers + config.mtp.depth
    entries = weights.find(folder, tensors=2 * (_FEW * (blocks + 1) + 3 * blocks * experts))
    block = fp8.block_size(keys, folder / CONFIG)
    fp8.refuse_packed(keys, entries, folder)
    # Checked before anything is built: a small file must not be able to ask for a huge model.
    held = sum(math.prod(entry.shape) for entry in entries.values())
    if blocks > len(entries) or _values(config) > _SPARE + 4 * held:
        raise ConsiliumError(
            f"{folder / CONFIG} asks for {blocks} layers of {experts} experts, far more than the"
            f" {len(entries)} tensors of the weights beside it; use the two files of one save."
        )
    return fp8.pair(entries, block)


def as_stored(config: Model, found: Mapping[str, Stored]) -> Model:
    """Return ``config`` as the files are: without multi-token prediction where they have none of it.

    transformers announces its modules in every DeepSeek-V3 configuration and never writes them. It also
    keeps a head that differs from the embedding it is said to be tied to.
    """
    if config.tied and not _head_repeats(found):
        config = dataclasses.replace(config, tied=False)
    held = any(name.startswith((f"model.layers.{config.layers}.", "mtp.")) for name in found)
    return config if held or not config.mtp.depth else dataclasses.replace(config, mtp=MTP(depth=0))


def _head_repeats(found: Mapping[str, Stored]) -> bool:
    """Whether a head in the files, if there is one, holds the values of the embedding."""
    head = found.get("lm_head.weight")
    embedding = next((entry for name, entry in found.items() if name.endswith(_EMBEDDINGS)), None)
    if not isinstance(head, Entry) or not isinstance(embedding, Entry):
        return True
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    both = (
        safetensors_io.pieces(name, entry, itertools.repeat(_PIECE))
        for name, entry in (("head", head), ("embedding", embedding))
    )
    return all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def stored_dtype(folder: Path, config: Model, found: Mapping[str, Stored]) -> str:
    """Return the name of the dtype of the embedding, or of the last norm where that is packed.

    float32 where we compute in neither.
    """
    table = table_of(layout_of(folder), found)
    ends = {"embed.weight": torch.empty(1), "norm.weight": torch.empty(1)}
    for name, _ in named(config, ends, table):
        match found.get(name):
            case Entry(dtype=dtype) if (word := str(dtype).removeprefix("torch.")) in DTYPES:
                return word
            case Entry() | Scaled() | None:
                continue
    return "float32"


def _values(config: Model) -> int:
    count = parameters(config)
    return count.total + count.mtp
