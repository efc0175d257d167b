"""A folder of weights as one GGUF file, written one tensor of ours at a time; it appears whole or never."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    quant_shape_to_byte_shape,
    quantize,
)
from gguf.constants import GGML_QUANT_VERSION
from torch import Tensor

from consilium.checkpoint.folders import GGUF
from consilium.checkpoint.gguf.metadata import Value, arch_of, metadata, notices
from consilium.checkpoint.gguf.tensors import exported, stored_as
from consilium.checkpoint.gguf.tokenizer import Vocabulary, read_vocabulary
from consilium.checkpoint.source import Source
from consilium.checkpoint.store import open_folder
from consilium.data.splits import PIECES
from consilium.disk.atomic import commit_file
from consilium.disk.files import DISK, Filesystem, refuse_full
from consilium.errors import ConsiliumError, nearest

TYPES: Final[Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]]] = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
_ENDS: Final = (GGUFWriter.add_eos_token_id, GGUFWriter.add_eot_token_id, GGUFWriter.add_eom_token_id)
_SHARED_GATE: Final = "moe.shared.gate.weight"
_NEXT_TO_ZERO: Final = 1e-30
_FLOAT32: Final = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Exported:
    """``typed`` is the fraction of all values that are of the type asked for; the others are float32."""

    typed: float
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor of the file before it is read. ``shape`` is that of its values."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return math.prod(quant_shape_to_byte_shape(self.shape, self.kind))


Plan = Mapping[str, tuple[_Planned, ...]]
"""What becomes of each tensor of ours, in the order of the file."""


def export(
    folder: Path | str,
    destination: Path | str,
    *,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    files: Filesystem = DISK,
) -> Exported:
    """Write the model in ``folder`` to the file ``destination``, which must not exist.

    ``dtype`` is a key of TYPES, by default that of the folder. ``progress`` hears of bytes done and in all.
    The largest tensor of the model is in memory at a time, in float32. Raises ConsiliumError where llama.cpp
    has no architecture that computes the same, and where reading or writing fails.
    """
    folder, destination = Path(folder), Path(destination)
    if destination.exists():
        raise ConsiliumError(f"{destination} is already there; remove it or give another name.")
    if folder.suffix == GGUF:
        raise ConsiliumError(f"{folder} is a GGUF file already; convert it --to hf first.")
    source = open_folder(folder, check_finite=True)
    dtype = dtype or str(source.state["embed.weight"].dtype).removeprefix("torch.")
    if dtype not in TYPES:
        raise ConsiliumError(f"a GGUF file has no type {dtype!r}.{nearest(dtype, TYPES)}")
    kind, file_type = TYPES[dtype]
    arch = arch_of(source.config)
    vocabulary = read_vocabulary(folder, source.config.vocab_size)
    plan = _plan(source, arch, kind)
    writer = _described(source, arch, folder.resolve().name, file_type)
    _add_vocabulary(writer, vocabulary)
    if vocabulary is not None:
        _add_ends(writer, vocabulary.eos, source.generation.ends)
    refuse_full(destination, sum(planned.bytes for group in plan.values() for planned in group), "the file")
    commit_file(
        destination,
        lambda staged: _stream(writer, staged, source, arch, plan, progress),
        new=True,
        files=files,
    )
    return _report(source, plan, kind, vocabulary)


def _plan(source: Source, arch: MODEL_ARCH, wanted: GGMLQuantizationType) -> Plan:
    block, _ = GGML_QUANT_SIZES[wanted]

    def planned(name: str, shape: tuple[int, ...]) -> _Planned:
        return _Planned(name, shape, stored_as(name, shape, wanted, block))

    return {
        ours: tuple(planned(name, tuple(part.shape)) for name, part in parts)
        for ours, tensor in source.state.items()
        if (parts := list(exported(source.config, arch, ours, tensor)))
    }


def _described(source: Source, arch: MODEL_ARCH, name: str, file_type: LlamaFileType) -> GGUFWriter:
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[arch])
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in metadata(source.config, arch).items():
        _add(writer, key, value)
    return writer


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.split == PIECES:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(value=True)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary.split)
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    writer.add_add_bos_token(vocabulary.opens)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _add_ends(writer: GGUFWriter, end: int, ends: Sequence[int]) -> None:
    """Write what ends an answer: llama.cpp stops at the end of sequence, of turn and of message."""
    ordered = ends if ends and end not in ends else (end, *(one for one in ends if one != end))
    for add, token in zip(_ENDS, ordered, strict=False):
        add(writer, token)


def _stream(
    writer: GGUFWriter,
    staged: Path,
    source: Source,
    arch: MODEL_ARCH,
    plan: Plan,
    progress: Callable[[int, int], None],
) -> None:
    rows = [planned for group in plan.values() for planned in group]
    for planned in rows:
        writer.add_tensor_info(planned.name, planned.shape, _FLOAT32, planned.bytes, planned.kind)
    writer.write_header_to_file(staged)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(planned.bytes for planned in rows)
        for ours, group in plan.items():
            whole = source.read(ours, torch.float32)
            for planned, (_, part) in zip(group, exported(source.config, arch, ours, whole), strict=True):
                values = _never_zero(part) if ours.endswith(_SHARED_GATE) else part
                writer.write_tensor_data(quantize(values.contiguous().numpy(), planned.kind))
                done += planned.bytes
                progress(done, total)
    finally:
        writer.close()


def _never_zero(gate_D: Tensor) -> Tensor:
    """A gate that is half open for every token, as one so small that it still is.

    llama.cpp takes silu(x) / x for the sigmoid of a shared expert, which is no number at 0.
    """
    return gate_D if gate_D.any() else torch.full_like(gate_D, _NEXT_TO_ZERO)


def _report(
    source: Source, plan: Plan, wanted: GGMLQuantizationType, vocabulary: Vocabulary | None
) -> Exported:
    rows = [planned for group in plan.values() for planned in group]
    typed = sum(planned.values for planned in rows if planned.kind is wanted)
    lost = notices(source.config)
    if vocabulary is None:
        lost = (
            *lost,
            "the folder has no tokenizer.json, so the file holds none: give token ids to its reader.",
        )
    elif vocabulary.composes:
        lost = (
            *lost,
            "the tokenizer composes characters first (NFC) and llama.cpp does not: give it composed text.",
        )
    if vocabulary is not None and vocabulary.strips:
        lost = (*lost, "an added token takes the blanks beside it (lstrip, rstrip), and llama.cpp does not.")
    if len(source.generation.ends) > len(_ENDS):
        lost = (*lost, f"the model ends an answer at more tokens than the {len(_ENDS)} that a file names.")
    return Exported(typed / sum(planned.values for planned in rows), lost)
