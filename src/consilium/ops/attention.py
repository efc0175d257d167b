"""Attention over given queries, keys and values.

Legend: B sequences, S queries, L keys, H query heads, G key/value heads (G divides H), K width of a key,
V width of a value, C width of a latent row.

A mask is bool [B, S, L], True where a query may look. No mask means plain causal attention: S == L, query i
sees keys 0 to i. A query that sees nothing returns zeros and passes no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from consilium.ops.bfloat16 import is_storage


def attend(
    q_BHSK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    *,
    mask_BSL: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v for every head: [B, H, S, V] in the dtype of q.

    ``softcap`` replaces logits by softcap * tanh(logits / softcap) before the mask, as Grok-1 and Gemma 2 do.
    """
    if is_storage(q_BHSK):
        wide = (tensor.float() for tensor in (q_BHSK, k_BGLK, v_BGLV))
        return attend(*wide, mask_BSL=mask_BSL, scale=scale, softcap=softcap).to(q_BHSK.dtype)
    if softcap is not None:
        return _attend_softcapped(q_BHSK, k_BGLK, v_BGLV, mask_BSL, scale, softcap)
    width = v_BGLV.shape[-1]
    # Fused kernels need keys and values of one width; on CPU the padding pays for itself several times over.
    padded_BGLK = (
        functional.pad(v_BGLV, (0, k_BGLK.shape[-1] - width)) if width < k_BGLK.shape[-1] else v_BGLV
    )
    y_BHSK = functional.scaled_dot_product_attention(
        q_BHSK,
        k_BGLK,
        padded_BGLK,
        attn_mask=None if mask_BSL is None else mask_BSL[:, None],
        is_causal=mask_BSL is None,
        scale=scale,
        enable_gqa=q_BHSK.shape[1] != k_BGLK.shape[1],
    )
    return y_BHSK[..., :width]


def attend_latent(q_BHSC: Tensor, rows_BLC: Tensor, *, mask_BSL: Tensor | None, scale: float) -> Tensor:
    """Multi-query attention in which one latent row is key and value at once: [B, H, S, C].

    Heads become query rows, so that each row of the cache is read once for all of them.
    """
    if is_storage(q_BHSC):
        y_BHSC = attend_latent(q_BHSC.float(), rows_BLC.float(), mask_BSL=mask_BSL, scale=scale)
        return y_BHSC.to(q_BHSC.dtype)
    batch, heads, queries, width = q_BHSC.shape
    mask_BSL = _causal(queries, q_BHSC.device).expand(batch, -1, -1) if mask_BSL is None else mask_BSL
    y_B1QC = functional.scaled_dot_product_attention(
        q_BHSC.reshape(batch, 1, heads * queries, width),
        rows_BLC[:, None],
        rows_BLC[:, None],
        attn_mask=mask_BSL[:, None].expand(-1, heads, -1, -1).reshape(batch, 1, heads * queries, -1),
        scale=scale,
    )
    return y_B1QC.view(batch, heads, queries, width)


@dataclass(frozen=True, slots=True)
class Part:
    """Attention over some of the keys. Parts of the same queries merge into attention over all of them."""

    values_BHSV: Tensor
    """float32, zero where a query sees none of these keys."""
    lse_BHS: Tensor
    """float32: log of the sum of exp(logits); minus infinity where a query sees none of these keys."""


def attend_part(
    q_BHSK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    *,
    mask_BSL: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Part:
    """``attend`` over one tile or page of the keys, with what ``merge`` needs; in at least float32."""
    wide = torch.promote_types(q_BHSK.dtype, torch.float32)
    q_BGNSK = q_BHSK.to(wide).unflatten(1, (k_BGLK.shape[1], -1))
    logits_BGNSL = q_BGNSK @ k_BGLK[:, :, None].to(wide).mT * scale
    if softcap is not None:
        logits_BGNSL = softcap * torch.tanh(logits_BGNSL / softcap)
    seen_BGNSL = mask_BSL[:, None, None].expand_as(logits_BGNSL)
    highest_BGNS1 = _highest(logits_BGNSL.masked_fill(~seen_BGNSL, -torch.inf))
    weights_BGNSL = (logits_BGNSL - highest_BGNS1).masked_fill(~seen_BGNSL, -torch.inf).exp()
    sums_BGNS1 = weights_BGNSL.sum(-1, keepdim=True)
    blind_BGNS1 = sums_BGNS1 == 0
    values_BGNSV = weights_BGNSL @ v_BGLV[:, :, None].to(wide) / sums_BGNS1.masked_fill(blind_BGNS1, 1.0)
    lse_BGNS1 = sums_BGNS1.masked_fill(blind_BGNS1, 1.0).log() + highest_BGNS1
    lse_BGNS = lse_BGNS1.masked_fill(blind_BGNS1, -torch.inf).squeeze(-1)
    return Part(values_BGNSV.flatten(1, 2), lse_BGNS.flatten(1, 2))


def merge(parts: Sequence[Part]) -> Part:
    """Attention over the keys of all parts, which share none. Parts add up in their order, always the same.

    With m the highest log-sum-exp: values = sum_i exp(lse_i - m) values_i / sum_i exp(lse_i - m). The result
    is a part again; a query that sees no key in any of them stays at zero and minus infinity.
    """
    lse_PBHS = torch.stack([part.lse_BHS for part in parts])
    highest_BHS = _highest(lse_PBHS.movedim(0, -1)).squeeze(-1)
    weights_PBHS = (lse_PBHS - highest_BHS).exp()
    total_BHS = weights_PBHS.sum(0)
    blind_BHS = total_BHS == 0
    share_PBHS = weights_PBHS / total_BHS.masked_fill(blind_BHS, 1.0)
    values_PBHSV = torch.stack([part.values_BHSV for part in parts])
    lse_BHS = total_BHS.masked_fill(blind_BHS, 1.0).log() + highest_BHS
    return Part((share_PBHS[..., None] * values_PBHSV).sum(0), lse_BHS.masked_fill(blind_BHS, -torch.inf))


def _highest(logits: Tensor) -> Tensor:
    """What is taken off before exp, over the last axis: a number, even where all are minus infinity."""
    highest = logits.detach().amax(-1, keepdim=True)
    return highest.masked_fill(highest == -torch.inf, 0.0)


def attend_naive(
    q_BHSK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    *,
    mask_BSL: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """The slow twin of ``attend``: head by head, an explicit softmax, at least float32."""
    batch, heads, queries, _ = q_BHSK.shape
    group = heads // k_BGLK.shape[1]
    seen_BSL = _causal(queries, q_BHSK.device).expand(batch, -1, -1) if mask_BSL is None else mask_BSL
    wide = torch.promote_types(q_BHSK.dtype, torch.float32)
    q, k, v = q_BHSK.to(wide), k_BGLK.to(wide), v_BGLV.to(wide)
    y_BHSV = torch.stack(
        [
            torch.stack(
                [
                    _head(q[b, h], k[b, h // group], v[b, h // group], seen_BSL[b], scale, softcap)
                    for h in range(heads)
                ]
            )
            for b in range(batch)
        ]
    )
    return y_BHSV.to(q_BHSK.dtype)


def _head(
    q_SK: Tensor, k_LK: Tensor, v_LV: Tensor, seen_SL: Tensor, scale: float, softcap: float | None
) -> Tensor:
    logits_SL = q_SK @ k_LK.T * scale
    if softcap is not None:
        logits_SL = softcap * torch.tanh(logits_SL / softcap)
    return _masked_softmax(logits_SL, seen_SL) @ v_LV


def _attend_softcapped(
    q_BHSK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, mask_BSL: Tensor | None, scale: float, softcap: float
) -> Tensor:
    seen_BSL = _causal(q_BHSK.shape[2], q_BHSK.device) if mask_BSL is None else mask_BSL
    q_BGNSK = q_BHSK.unflatten(1, (k_BGLK.shape[1], -1))
    logits_BGNSL = (q_BGNSK @ k_BGLK[:, :, None].mT).float() * scale
    capped_BGNSL = softcap * torch.tanh(logits_BGNSL / softcap)
    weights_BGNSL = _masked_softmax(capped_BGNSL, seen_BSL[:, None, None])
    return (weights_BGNSL.to(v_BGLV.dtype) @ v_BGLV[:, :, None]).flatten(1, 2)


def _masked_softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen; zeros, with zero gradients, where nothing is."""
    lowest = torch.finfo(logits.dtype).min
    return torch.softmax(logits.masked_fill(~seen, lowest), -1).masked_fill(~seen, 0.0)


def _causal(queries: int, device: torch.device) -> Tensor:
    return torch.ones(1, queries, queries, dtype=torch.bool, device=device).tril()
