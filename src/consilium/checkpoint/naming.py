"""How our tensors are called on disk in the Hugging Face layouts: a table a layout, read in both directions.

A pattern's ``{i}`` is the layer and ``{e}`` the expert. A tensor of ours is made of the tensors of its row:
stacked over ``{e}`` where that occurs, and the names of a row put together along the first axis (gate above
up). So the parts of a tensor are views of it, which a writer writes and a reader fills.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from torch import Tensor

from consilium.checkpoint.hf_architecture import Architecture

Row = tuple[str, ...]
Table = Mapping[str, Row]

_TRUNK: Final[Table] = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "layers.{i}.attention_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.feed_forward_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
}

_DENSE: Final[Table] = {
    "layers.{i}.feed_forward.up.weight": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.feed_forward.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
}

_GQA: Final[Table] = {
    f"layers.{{i}}.attention.{x}.weight": (f"model.layers.{{i}}.self_attn.{x}_proj.weight",) for x in "qkvo"
}

_MLA: Final[Table] = {
    f"layers.{{i}}.attention.{ours}.weight": (f"model.layers.{{i}}.self_attn.{theirs}.weight",)
    for ours, theirs in {
        "q": "q_proj",
        "q_down": "q_a_proj",
        "q_norm": "q_a_layernorm",
        "q_up": "q_b_proj",
        "kv_down": "kv_a_proj_with_mqa",
        "kv_norm": "kv_a_layernorm",
        "kv_up": "kv_b_proj",
        "o": "o_proj",
    }.items()
}

_DEEPSEEK_MOE: Final[Table] = {
    "layers.{i}.moe.router.projection.weight": ("model.layers.{i}.mlp.gate.weight",),
    "layers.{i}.moe.balance.bias_E": ("model.layers.{i}.mlp.gate.e_score_correction_bias",),
    "layers.{i}.moe.experts.up": (
        "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
        "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    ),
    "layers.{i}.moe.experts.down": ("model.layers.{i}.mlp.experts.{e}.down_proj.weight",),
    "layers.{i}.moe.shared.up.weight": (
        "model.layers.{i}.mlp.shared_experts.gate_proj.weight",
        "model.layers.{i}.mlp.shared_experts.up_proj.weight",
    ),
    "layers.{i}.moe.shared.down.weight": ("model.layers.{i}.mlp.shared_experts.down_proj.weight",),
}

_MIXTRAL_MOE: Final[Table] = {
    "layers.{i}.moe.router.projection.weight": ("model.layers.{i}.block_sparse_moe.gate.weight",),
    "layers.{i}.moe.experts.up": (
        "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
        "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    ),
    "layers.{i}.moe.experts.down": ("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",),
}

_MTP: Final[Table] = {
    "mtp.{i}.embed_norm.weight": ("model.layers.{i}.enorm.weight",),
    "mtp.{i}.hidden_norm.weight": ("model.layers.{i}.hnorm.weight",),
    "mtp.{i}.project.weight": ("model.layers.{i}.eh_proj.weight",),
    "mtp.{i}.norm.weight": ("model.layers.{i}.shared_head.norm.weight",),
}

TABLES: Final[Mapping[Architecture, Table]] = {
    "llama": _TRUNK | _DENSE | _GQA,
    "mixtral": _TRUNK | _GQA | _MIXTRAL_MOE,
    "deepseek_v2": _TRUNK | _DENSE | _MLA | _DEEPSEEK_MOE,
    "deepseek_v3": _TRUNK | _DENSE | _MLA | _DEEPSEEK_MOE | _MTP,
}

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

_NUMBERED: Final = re.compile(r"(layers|mtp)\.(\d+)\.(block\.)?(.*)", re.DOTALL)


def parts(
    state: Mapping[str, Tensor], architecture: Architecture, layers: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor on disk by its name there, as a view of our ``state``, in the order of ``state``.

    Multi-token prediction module k is layer ``layers`` + k on disk.
    """
    table = TABLES[architecture]
    for name, tensor in state.items():
        pattern, i = _pattern(name, layers)
        yield from _views(table[pattern], i, tensor)


def _pattern(name: str, layers: int) -> tuple[str, int]:
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return name, 0
    group, number, block, rest = match.groups()
    if group == "mtp":
        return f"{'layers' if block else 'mtp'}.{{i}}.{rest}", layers + int(number)
    return f"layers.{{i}}.{rest}", int(number)


def _views(row: Row, i: int, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if "{e}" not in row[0]:
        yield from zip((name.format(i=i) for name in row), tensor.chunk(len(row)), strict=True)
        return
    for e in range(tensor.shape[0]):
        yield from zip((name.format(i=i, e=e) for name in row), tensor[e].chunk(len(row)), strict=True)
