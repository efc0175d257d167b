"""Our tensors under their names on disk, by the tables of ``consilium.recipes.layout``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from torch import Tensor

from consilium.checkpoint.hf.architecture import Architecture, architecture
from consilium.config.model import Model
from consilium.recipes import layout, layout_fused, layout_remote
from consilium.recipes.layout import Row, Table

TABLES: Final[Mapping[Architecture, tuple[Table, ...]]] = {
    "llama": (layout.LLAMA,),
    "mistral": (layout.LLAMA,),
    "qwen2": (layout.QWEN2,),
    "qwen3": (layout.QWEN3,),
    "mixtral": (layout.MIXTRAL, layout_fused.MIXTRAL),
    "qwen2_moe": (layout.QWEN2_MOE, layout_fused.QWEN2_MOE),
    "qwen3_moe": (layout.QWEN3_MOE, layout_fused.QWEN3_MOE),
    "olmoe": (layout.OLMOE, layout_fused.OLMOE),
    "deepseek": (layout.DEEPSEEK,),
    "deepseek_v2": (layout.DEEPSEEK_V2, layout_fused.DEEPSEEK_V2),
    "deepseek_v3": (layout.DEEPSEEK_V3, layout_fused.DEEPSEEK_V3),
    "grok-1": (layout_remote.GROK_1, layout_remote.GROK),
    "skywork_moe": (layout_remote.SKYWORK_MOE,),
    "llama_moe": (layout_remote.LLAMA_MOE,),
}
"""The layouts of each architecture: the published one, which we write, and others that we read."""

REDUNDANT: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"model\.layers\.\d+\.embed_tokens\.weight",
        r"model\.layers\.\d+\.shared_head\.head\.weight",
    )
)
"""Tensors of published files that repeat others: rotary frequencies, and the embedding and head in a layer of
multi-token prediction. They are neither read nor written."""
_HEAD: Final = re.compile(r"lm_head\.weight")

_NUMBERED: Final = re.compile(r"(layers|mtp)\.(\d+)\.(block\.)?(.*)", re.DOTALL)
_PLACE: Final = re.compile(r"(?<=\.)(\d+|\{[ie]\})(?=\.|$)")


def redundant(config: Model) -> tuple[re.Pattern[str], ...]:
    """What a file of ``config`` may hold beside its tensors; a tied head repeats the embedding."""
    return (*REDUNDANT, _HEAD) if config.tied else REDUNDANT


def published(config: Model) -> Table | None:
    """Return the layout that ``config`` is written in, None for our own."""
    kind = architecture(config)
    return None if kind is None else TABLES[kind][0]


def covers(table: Table | None, config: Model, names: Iterable[str]) -> bool:
    """Whether ``table`` has a row for each of ``names`` of ours."""
    return table is None or all(_pattern(name, config.layers)[0] in table for name in names)


def table_of(layout: Architecture | None, names: Iterable[str]) -> Table | None:
    """Return the table that most of ``names`` on disk follow, the published one where none stands out."""
    if layout is None:
        return None
    seen = {_PLACE.sub("*", name) for name in names}

    def known(table: Table) -> int:
        return len(seen & {_PLACE.sub("*", pattern) for row in table.values() for pattern in row})

    return max(TABLES[layout], key=known)


def named(
    config: Model, state: Mapping[str, Tensor], table: Table | None, *, first: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor on disk by its name there, as a view of our ``state``, in the order of ``state``.

    ``table`` None is our own layout. Multi-token prediction module k is layer ``layers`` + k elsewhere. A
    stack that has a name an expert may be a part, from expert ``first`` on.
    """
    if table is None:
        yield from state.items()
        return
    for name, tensor in state.items():
        pattern, i = _pattern(name, config.layers)
        yield from _views(table[pattern], i, tensor, first)


def is_by_expert(config: Model, name: str, table: Table | None) -> bool:
    """Whether our stack ``name`` has a tensor on disk for each of its experts."""
    return table is not None and "{e}" in table[_pattern(name, config.layers)[0]][0]


def _pattern(name: str, layers: int) -> tuple[str, int]:
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return name, 0
    group, number, block, rest = match.groups()
    if group == "mtp":
        return f"{'layers' if block else 'mtp'}.{{i}}.{rest}", layers + int(number)
    return f"layers.{{i}}.{rest}", int(number)


def _views(row: Row, i: int, tensor: Tensor, first: int) -> Iterator[tuple[str, Tensor]]:
    if "{e}" not in row[0]:
        yield from zip((name.format(i=i) for name in row), _pieces(tensor, len(row)), strict=True)
        return
    for e in range(tensor.shape[0]):
        names = (name.format(i=i, e=first + e) for name in row)
        yield from zip(names, _pieces(tensor[e], len(row)), strict=True)


def _pieces(tensor: Tensor, count: int) -> Sequence[Tensor]:
    """A number, such as a loss coefficient, has no axis to cut along."""
    return (tensor,) if count == 1 else tensor.chunk(count)
