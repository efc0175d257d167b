"""Grouped-query attention turned into latent attention, layer by layer (TransMLA, 2502.07864).

All follows from the second moments of a layer's keys and values on the calibration text:

1. Keys of all heads are one key. Pairs of one frequency are complex numbers, and any unitary mixture of them
   rotates as they do, so their principal components (RoRoPE; the paper's mixtures are the real ones of these)
   put as much as possible into few pairs, which stay rotated. Where fewer pairs than frequencies stay,
   neighbouring frequencies count as the first of them (FreqFold).
2. What remains of the keys counts as if it stood at the query's own place. It is scaled to the size of the
   values, and the principal components of both together are the latent (BKV-PCA).
3. Queries take the inverse of each mixture, so that only what was left out or was rotated is approximate.

Legend: H query heads, G key/value heads, P width of a head, K = GP, J groups of frequencies, X pairs of a
group, R width of the rotated shared key, A = K - R, N width of a head's key without position, Z rank of the
latent, D hidden size, C columns: D, or 1 of a bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.attention.gqa import GroupedQueryAttention
from consilium.checkpoint.source import Source
from consilium.config.attention import GQA, MLA
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.config.upcycling import Upcycling
from consilium.evaluation.walk import Passage, Visit, walk
from consilium.ops.rope import rotation_scale
from consilium.upcycling.rounding import rounded
from consilium.upcycling.survey import Progress

_NAME: Final = re.compile(r"layers\.(\d+)\.attention\.(q|kv_down|kv_up)\.(weight|bias)")


@final
@dataclass(frozen=True, slots=True)
class Basis:
    """How keys and values of a layer are mixed, float32."""

    turn_KK: Tensor
    """Orthogonal, on keys of all heads: R rows of the shared rotated key, then A without position."""
    down_ZX: Tensor
    """From those A and the K values to the latent."""
    up_XZ: Tensor
    """And back."""


@final
@dataclass(frozen=True, slots=True)
class LatentSource:
    """A ``Source``: ``dense`` with its attention in ``bases``."""

    dense: Source
    asked: Upcycling
    config: Model
    state: Mapping[str, Tensor]
    bases: Mapping[int, Basis]

    @property
    def generation(self) -> GenerationDefaults:
        return self.dense.generation

    def fill(self, name: str, target: Tensor) -> None:
        """Write our tensor ``name`` into ``target``, in its dtype."""
        found = _NAME.fullmatch(name)
        if found is None:
            self.dense.fill(name, target)
        else:
            made = self._made(int(found[1]), found[2], found[3])
            # Rounded as it will be written, whatever the dtype of who asks.
            target.copy_(rounded(made.view(target.shape), self.state[name].dtype, name))

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        """The same of its rows from ``first`` on."""
        target.copy_(self.read(name, target.dtype)[first : first + target.shape[0]])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return our tensor ``name``, by default in the dtype that ``state`` says."""
        values = torch.zeros_like(self.state[name], dtype=dtype, device="cpu")
        self.fill(name, values)
        return values

    def _made(self, layer: int, part: str, kind: str) -> Tensor:
        config, made = _attentions(self.dense.config, self.config)
        basis = self.bases[layer]

        def read(matrix: str) -> Tensor:
            rows = self.dense.read(f"layers.{layer}.attention.{matrix}.{kind}", torch.float32)
            return rows.view(rows.shape[0], -1)

        match part:
            case "q":
                return queries(read("q"), basis, config, made)
            case "kv_down":
                turned_KC = basis.turn_KK @ read("k")
                rotated_RC, plain_AC = turned_KC.split((made.rope_dim, len(turned_KC) - made.rope_dim))
                return torch.cat((basis.down_ZX @ torch.cat((plain_AC, read("v"))), rotated_RC))
            case _:
                return ups(basis, config, made)


def bases(dense: Source, config: Model, text: Sequence[Passage], progress: Progress) -> dict[int, Basis]:
    """The basis of every layer, from keys and values on ``text``; a layer at a time is in memory."""
    found: dict[int, Basis] = {}
    for seen in walk(dense, text):
        found[seen.layer] = basis_of(moments(seen, text), *_attentions(dense.config, config))
        progress("measuring", seen.layer + 1, config.layers)
    return found


def _attentions(before: Model, after: Model) -> tuple[GQA, MLA]:
    assert isinstance(before.attention, GQA), "the planner has checked it"
    assert isinstance(after.attention, MLA), "the planner has made it"
    return before.attention, after.attention


@torch.no_grad()
def moments(seen: Visit, text: Sequence[Passage]) -> Tensor:
    """Second moments [2K, 2K] of a layer's keys, before their rotation, and values: float64."""
    attention = seen.block.attention
    assert isinstance(attention, GroupedQueryAttention), "the planner has checked it"
    width = 2 * attention.config.kv_heads * attention.config.head_dim
    found = torch.zeros(width, width, dtype=torch.float64)
    for passage, x_BSD in zip(text, seen.before, strict=True):
        normed_TD = passage.tokens(seen.block.attention_norm(x_BSD))
        kv_TX = torch.cat((attention.k(normed_TD), attention.v(normed_TD)), -1).double()
        found += (kv_TX.T @ kv_TX).cpu()
    return found


def basis_of(moments_XX: Tensor, config: GQA, made: MLA) -> Basis:
    """A function of second moments [2K, 2K] alone."""
    keys = config.kv_heads * config.head_dim
    turn_KK = turned(moments_XX[:keys, :keys], config, made)
    plain_XX = torch.block_diag(turn_KK[made.rope_dim :], torch.eye(keys, dtype=torch.float64))
    joint_XX = plain_XX @ moments_XX @ plain_XX.T
    scale_X = _balance(joint_XX.diagonal(), keys - made.rope_dim)
    vectors_XX = torch.linalg.eigh(joint_XX * scale_X * scale_X[:, None]).eigenvectors
    kept_XZ = vectors_XX.flip(1)[:, : made.kv_rank]
    return Basis(
        turn_KK.float(), (kept_XZ * scale_X[:, None]).T.float(), (kept_XZ / scale_X[:, None]).float()
    )


def _balance(squares_X: Tensor, plain: int) -> Tensor:
    """What brings the first ``plain`` to the size of the others, whose principal components they share."""
    keys, values = float(squares_X[:plain].sum()), float(squares_X[plain:].sum())
    scale = (values / keys) ** 0.5 if keys > 0 and values > 0 else 1.0
    return torch.cat((torch.full_like(squares_X[:plain], scale), torch.ones_like(squares_X[plain:])))


def turned(moments_KK: Tensor, config: GQA, made: MLA) -> Tensor:
    """Rows [K, K] of ``Basis.turn_KK``, float64.

    With z = a + ib of the pairs of a group, E the eigenvectors of E[z z*] by falling eigenvalue, z' = E* z:
    a' = Re(E)a + Im(E)b and b' = Re(E)b - Im(E)a, all transposed.
    """
    a_JX, b_JX = _pairs_of_groups(config, made)
    rows, columns = (..., slice(None), None), (..., None, slice(None))
    real_JXX = moments_KK[a_JX[rows], a_JX[columns]] + moments_KK[b_JX[rows], b_JX[columns]]
    imaginary_JXX = moments_KK[b_JX[rows], a_JX[columns]] - moments_KK[a_JX[rows], b_JX[columns]]
    vectors_JXX = torch.linalg.eigh(torch.complex(real_JXX, imaginary_JXX)).eigenvectors.flip(-1).mT
    size = len(moments_KK)
    first_JXK = _spread(vectors_JXX.real, a_JX, size) + _spread(vectors_JXX.imag, b_JX, size)
    second_JXK = _spread(vectors_JXX.real, b_JX, size) - _spread(vectors_JXX.imag, a_JX, size)
    kept = made.rope.repeats
    shared_RK = torch.empty(made.rope_dim, size, dtype=torch.float64)
    first_R, second_R = pairs(made.rope_dim, interleaved=made.rope.interleaved)
    shared_RK[first_R], shared_RK[second_R] = (
        first_JXK[:, :kept].flatten(0, 1),
        second_JXK[:, :kept].flatten(0, 1),
    )
    unrotated = torch.arange(size).view(config.kv_heads, -1)[:, config.rotated_dim :].flatten()
    plain = (first_JXK[:, kept:].flatten(0, 1), second_JXK[:, kept:].flatten(0, 1))
    return torch.cat((shared_RK, *plain, torch.eye(size, dtype=torch.float64)[unrotated]))


def _pairs_of_groups(config: GQA, made: MLA) -> tuple[Tensor, Tensor]:
    """Both dimensions, int64 [J, X], of the pairs that are mixed: all heads, neighbouring frequencies."""
    first_P, second_P = pairs(config.rotated_dim, interleaved=config.rope.interleaved)
    offsets_G1 = torch.arange(config.kv_heads)[:, None] * config.head_dim
    groups = made.rope_dim // 2 // made.rope.repeats
    first_JX, second_JX = (
        (offsets_G1 + of_head).view(config.kv_heads, groups, -1).transpose(0, 1).flatten(1)
        for of_head in (first_P, second_P)
    )
    return first_JX, second_JX


def pairs(dim: int, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both dimensions, int64 [dim / 2], of each rotary pair."""
    index = torch.arange(dim)
    return (index[::2], index[1::2]) if interleaved else (index[: dim // 2], index[dim // 2 :])


def _spread(values_JXX: Tensor, index_JX: Tensor, size: int) -> Tensor:
    """Columns put at ``index_JX`` of rows [J, X, size] of zeros."""
    rows_JXK = torch.zeros(*values_JXX.shape[:2], size, dtype=torch.float64)
    return rows_JXK.scatter(2, index_JX[:, None, :].expand_as(values_JXX), values_JXX)


def queries(q_QC: Tensor, basis: Basis, config: GQA, made: MLA) -> Tensor:
    """Rows of every head's query: as they were, for keys without position, and mixed as the shared key is."""
    q_GIPC = q_QC.view(config.kv_heads, -1, config.head_dim, q_QC.shape[1])
    shared_RGP = basis.turn_KK[: made.rope_dim].view(made.rope_dim, config.kv_heads, -1)
    rotated_GIRC = torch.einsum("rgp,gipc->girc", shared_RGP, q_GIPC)
    plain_GINC = q_GIPC[:, :, config.head_dim - made.nope_dim :]
    made_GIXC = torch.cat((plain_GINC, rotated_GIRC), 2)
    return (made_GIXC * (config.softmax_scale / made.softmax_scale)).flatten(0, 2)


def ups(basis: Basis, config: GQA, made: MLA) -> Tensor:
    """From the latent to the key without position and the value of every head, [H * (N + P), Z]."""
    plain_AGP = basis.turn_KK[made.rope_dim :].view(-1, config.kv_heads, config.head_dim)
    up_AZ, up_KZ = basis.up_XZ.split((len(plain_AGP), len(basis.turn_KK)))
    unrotated = config.kv_heads * (config.head_dim - config.rotated_dim)
    stretch_A = torch.ones(len(up_AZ))
    # YaRN stretches queries and keys as it rotates them, which nobody does to what is not rotated.
    stretch_A[: len(up_AZ) - unrotated] = rotation_scale(config.rope) ** 2
    key_GPZ = torch.einsum("agp,az->gpz", plain_AGP, up_AZ * stretch_A[:, None])
    value_GPZ = up_KZ.view(config.kv_heads, config.head_dim, -1)
    both_GXZ = torch.cat((key_GPZ[:, config.head_dim - made.nope_dim :], value_GPZ), 1)
    return both_GXZ.repeat_interleave(config.heads // config.kv_heads, 0).flatten(0, 1)
