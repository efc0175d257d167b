"""Our tensors under the names of GGUF, in llama.cpp's order of rows: read and written by one table.

Legend: H heads, N dimensions of a head without position, R rotated, V of a value, Z latent, F expert width,
D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from typing import Final

import torch
from gguf import MODEL_ARCH, MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType
from torch import Tensor

from consilium.config.attention import GQA, MLA
from consilium.config.model import Model

_T = MODEL_TENSOR
_SHARED: Final[Mapping[str, tuple[MODEL_TENSOR, ...]]] = {
    "embed": (_T.TOKEN_EMBD,),
    "norm": (_T.OUTPUT_NORM,),
    "head": (_T.OUTPUT,),
    "attention_norm": (_T.ATTN_NORM,),
    "feed_forward_norm": (_T.FFN_NORM,),
    "attention.q": (_T.ATTN_Q,),
    "attention.o": (_T.ATTN_OUT,),
    "feed_forward.up": (_T.FFN_GATE, _T.FFN_UP),
    "feed_forward.down": (_T.FFN_DOWN,),
    "moe.router.projection": (_T.FFN_GATE_INP,),
    "moe.balance.bias_E": (_T.FFN_EXP_PROBS_B,),
    "moe.experts.up": (_T.FFN_GATE_EXP, _T.FFN_UP_EXP),
    "moe.experts.down": (_T.FFN_DOWN_EXP,),
    "moe.shared.up": (_T.FFN_GATE_SHEXP, _T.FFN_UP_SHEXP),
    "moe.shared.down": (_T.FFN_DOWN_SHEXP,),
    "moe.shared.gate": (_T.FFN_GATE_INP_SHEXP,),
}
_GQA: Final[Mapping[str, tuple[MODEL_TENSOR, ...]]] = {
    "attention.k": (_T.ATTN_K,),
    "attention.v": (_T.ATTN_V,),
    "attention.q_norm": (_T.ATTN_Q_NORM,),
    "attention.k_norm": (_T.ATTN_K_NORM,),
}
_MLA: Final[Mapping[str, tuple[MODEL_TENSOR, ...]]] = {
    "attention.q_down": (_T.ATTN_Q_A,),
    "attention.q_norm": (_T.ATTN_Q_A_NORM,),
    "attention.q_up": (_T.ATTN_Q_B,),
    "attention.kv_down": (_T.ATTN_KV_A_MQA,),
    "attention.kv_norm": (_T.ATTN_KV_A_NORM,),
    "attention.kv_up": (_T.ATTN_K_B, _T.ATTN_V_B),
}
_NAME: Final = re.compile(r"(?:layers\.(\d+)\.)?(.+?)(?:\.(weight|bias))?")
_STACK: Final = re.compile(r"layers\.(\d+)\.moe\.experts\.(?:up|down)")
_ALWAYS_FLOAT32: Final = re.compile(r"blk\.\d+\.(ffn_gate_inp|exp_probs_b|ffn_gate_inp_shexp)\..*")
_MOST_SIDES: Final = 3
_BY_EXPERT: Final = {_T.FFN_GATE_EXP: "ffn_gate", _T.FFN_UP_EXP: "ffn_up", _T.FFN_DOWN_EXP: "ffn_down"}
"""What files of 2023 call the matrix of one expert, whose number comes behind it."""
_ROTATES_NEIGHBOURS: Final = frozenset({MODEL_ARCH.LLAMA, MODEL_ARCH.DEEPSEEK})
"""Where llama.cpp rotates pairs of neighbours in grouped-query attention, and we rotate halves."""


def exported(config: Model, arch: MODEL_ARCH, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what our tensor ``name`` becomes; nothing for those of multi-token prediction.

    The tensor may be on the meta device: the results then say names and shapes.
    """
    if not name.startswith("mtp."):
        for theirs, part in views(config, arch, name, tensor):
            yield theirs, part.flatten(0, -2) if part.ndim > _MOST_SIDES else part


def views(
    config: Model, arch: MODEL_ARCH, name: str, tensor: Tensor, held: Container[str] = (), first: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a file that our tensor ``name`` is made of, and its values as a view of ours.

    A view may have more sides than the file's tensor has; their values are in the same order. Latent
    attention whose rotation is by halves is written and never read: there it is a copy. ``held`` are the
    names of the file: older ones hold the matrix of keys and values whole, and that of each expert apart, of
    which ``tensor`` begins with the ``first``.
    """
    match = _NAME.fullmatch(name)
    assert match is not None, name
    layer, stem, suffix = match[1], match[2], match[3] or "weight"
    whole = TENSOR_NAMES[_T.ATTN_KV_B].format(bid=layer)
    if stem == "attention.kv_up" and f"{whole}.weight" in held:
        yield f"{whole}.weight", tensor
        return
    kinds = (_SHARED | (_GQA if isinstance(config.attention, GQA) else _MLA))[stem]
    suffix = "bias" if kinds == (_T.FFN_EXP_PROBS_B,) else suffix
    for kind, part in zip(kinds, _parts(config, arch, stem, tensor, len(kinds)), strict=True):
        if is_by_expert(name, held):
            for expert, matrix in enumerate(part, first):
                yield f"blk.{layer}.{_BY_EXPERT[kind]}.{expert}.{suffix}", matrix
        else:
            yield f"{TENSOR_NAMES[kind].format(bid=layer)}.{suffix}", part


def is_by_expert(name: str, held: Container[str]) -> bool:
    """Whether a file with the names ``held`` has a tensor for each expert of our stack ``name``."""
    match = _STACK.fullmatch(name)
    return match is not None and f"blk.{match[1]}.ffn_down.0.weight" in held


def stored_as(
    name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType, block: int
) -> GGMLQuantizationType:
    """Return the type of a tensor: vectors and the router stay float32, and rows that blocks do not fill."""
    whole = len(shape) > 1 and shape[-1] % block == 0 and not _ALWAYS_FLOAT32.fullmatch(name)
    return wanted if whole else GGMLQuantizationType.F32


def _parts(config: Model, arch: MODEL_ARCH, stem: str, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    match config.attention, stem:
        case GQA() as gqa, "attention.q" | "attention.k" if arch in _ROTATES_NEIGHBOURS:
            return (_pairs(tensor.unflatten(0, (-1, gqa.head_dim))),)
        case _, "moe.shared.gate":
            return (tensor[0],)
        case MLA() as mla, "attention.kv_up":
            up_HXZ = tensor.unflatten(0, (mla.heads, -1))
            return up_HXZ[:, : mla.nope_dim].transpose(1, 2), up_HXZ[:, mla.nope_dim :]
        case MLA() as mla, "attention.q" | "attention.q_up" if not mla.rope.interleaved:
            return (_paired_last(tensor.unflatten(0, (mla.heads, -1)), mla.rope_dim).flatten(0, 1),)
        case MLA() as mla, "attention.kv_down" if not mla.rope.interleaved:
            return (_paired_last(tensor, mla.rope_dim),)
        case _:
            return tensor.chunk(count, dim=-2) if count > 1 else (tensor,)


def _pairs(rows_XRD: Tensor) -> Tensor:
    """Row i beside row i + R/2, as a view [X, R/2, 2, D]: neighbours are rotated where we rotate halves."""
    return rows_XRD.unflatten(-2, (2, -1)).transpose(-3, -2)


def _paired_last(rows: Tensor, rotated: int) -> Tensor:
    """``_pairs`` for the last ``rotated`` rows, those that carry the position."""
    plain, position = rows.split((rows.shape[-2] - rotated, rotated), dim=-2)
    return torch.cat((plain, _pairs(position).flatten(-3, -2)), dim=-2)
