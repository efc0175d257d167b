"""Ways to compute all experts without autograd, forward and backward, over rows sorted by expert.

Legend: R rows sorted by expert, E experts, D hidden size, F width, G = 2F where the activation is gated, else
F, C the most rows of one expert, P rows of a layout (R or E*C), I inputs and O outputs of one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.config.feed_forward import Activation
from consilium.ops.feed_forward import activate, activate_backward

Counts = tuple[int, ...]

SMALL: Final = 16
"""Rows up to which a block has no spare ones."""


@dataclass(frozen=True, slots=True)
class Network:
    """The stacked networks of all experts."""

    up_EGD: Tensor
    down_EDF: Tensor
    activation: Activation


class Asked(NamedTuple):
    """Which gradients somebody asked for."""

    x: bool
    weight: bool
    up: bool
    down: bool

    @property
    def inside(self) -> bool:
        """Whether the gradient has to pass the second matrix."""
        return self.x or self.up or self.weight


@dataclass(frozen=True, slots=True)
class Passed:
    """What a backward goes by."""

    grad_RD: Tensor
    """Of what leaves each row: its output, times its weight where there are weights."""
    x_RD: Tensor
    h_PG: Tensor
    """Pre-activations, in the way's own layout."""
    weight_R: Tensor | None = None


class Gradients(NamedTuple):
    """None where nobody asked."""

    x: Tensor | None
    weight: Tensor | None
    up: Tensor | None
    down: Tensor | None


class Way(Protocol):
    """A way to compute all experts without autograd."""

    def forward(self, x_RD: Tensor, network: Network) -> tuple[Tensor, Tensor]:
        """Pre-activations, in the way's own layout [P, G], and outputs [R, D]."""
        ...

    def backward(self, passed: Passed, network: Network, asked: Asked) -> Gradients:
        """What is asked for; gradients of matrices in their dtype and fully written."""
        ...


def block(count: int) -> int:
    """Rows of the block of an expert that has ``count``: at most 15 or an eighth more, of few sizes.

    oneDNN compiles a product for every shape that it has not seen, which takes longer than the product itself
    (docs/log.md), and in training an expert hardly ever has as many rows twice.
    """
    step = max(SMALL, 1 << max(count.bit_length() - 4, 0))
    return count if count <= SMALL else -(-count // step) * step


def _places(rows_E: Sequence[slice], counts_E: Counts) -> Tensor:
    """Of each row: where it is in blocks."""
    begins = [torch.arange(rows.start, rows.start + n) for rows, n in zip(rows_E, counts_E, strict=True)]
    return torch.cat(begins)


@final
class Loop:
    """Expert after expert, products written in place: temporaries of one expert stay in the cache.

    Each has a block of rows, of which those behind its own are zero.
    """

    def __init__(self, counts_E: Counts, blocks_E: Counts) -> None:
        self.rows_E: list[slice] = []
        for count in blocks_E:
            start = self.rows_E[-1].stop if self.rows_E else 0
            self.rows_E.append(slice(start, start + count))
        self.size = sum(blocks_E)
        self.place_R = None if blocks_E == counts_E else _places(self.rows_E, counts_E)

    def forward(self, x_RD: Tensor, network: Network) -> tuple[Tensor, Tensor]:
        x_PD = self._enter(x_RD)
        h_PG = x_PD.new_empty(x_PD.shape[0], network.up_EGD.shape[1])
        y_PD = x_PD.new_empty(x_PD.shape)
        for e, rows in self._live():
            up_GD, down_DF = network.up_EGD[e].to(x_RD.dtype), network.down_EDF[e].to(x_RD.dtype)
            torch.mm(x_PD[rows], up_GD.t(), out=h_PG[rows])
            torch.mm(activate(h_PG[rows], network.activation), down_DF.t(), out=y_PD[rows])
        return h_PG, self._leave(y_PD)

    def backward(self, passed: Passed, network: Network, asked: Asked) -> Gradients:
        x_PD, grad_PD = self._enter(passed.x_RD), self._enter(passed.grad_RD)
        weight_P = None if passed.weight_R is None else self._enter(passed.weight_R[:, None])[:, 0]
        found = Gradients(
            torch.empty_like(x_PD) if asked.x else None,
            torch.empty_like(weight_P) if asked.weight and weight_P is not None else None,
            self._empty(network.up_EGD) if asked.up else None,
            self._empty(network.down_EDF) if asked.down else None,
        )
        for e, rows in self._live():
            up_GD, down_DF = network.up_EGD[e].to(x_PD.dtype), network.down_EDF[e].to(x_PD.dtype)
            p_PF = grad_PD[rows] @ down_DF if asked.inside else None
            weight_P1 = None if weight_P is None else weight_P[rows, None]
            inner = _inner(passed.h_PG[rows], p_PF, weight_P1, network.activation)
            if found.x is not None:
                torch.mm(inner.grad_h, up_GD, out=found.x[rows])
            if found.weight is not None:
                found.weight[rows] = inner.grad_weight()
            if found.up is not None:
                _outer(inner.grad_h, x_PD[rows], found.up[e])
            if found.down is not None:
                _outer(grad_PD[rows], inner.weighted_a(), found.down[e])
        return found._replace(x=self._left(found.x), weight=self._left(found.weight))

    def _enter(self, x_RI: Tensor) -> Tensor:
        """Rows in blocks, spare rows zero."""
        if self.place_R is None:
            return x_RI
        x_PI = x_RI.new_zeros(self.size, x_RI.shape[1])
        return x_PI.index_copy_(0, self.place_R.to(x_RI.device), x_RI)

    def _leave(self, x_P: Tensor) -> Tensor:
        return x_P if self.place_R is None else x_P.index_select(0, self.place_R.to(x_P.device))

    def _left(self, x_P: Tensor | None) -> Tensor | None:
        return None if x_P is None else self._leave(x_P)

    def _empty(self, weight_EOI: Tensor) -> Tensor:
        """Room for a gradient, already zero for idle experts."""
        grad_EOI = torch.empty_like(weight_EOI)
        for e, rows in enumerate(self.rows_E):
            if rows.start == rows.stop:
                grad_EOI[e].zero_()
        return grad_EOI

    def _live(self) -> list[tuple[int, slice]]:
        return [(e, rows) for e, rows in enumerate(self.rows_E) if rows.start < rows.stop]


@final
@dataclass(frozen=True, slots=True)
class _Inner:
    """What a backward knows between the two matrices, rows being of any layout."""

    a_RF: Tensor
    grad_h: Tensor
    """Of the pre-activations [R, G]; the activations where nobody asked for what lies before them."""
    p_RF: Tensor | None
    """Gradient of the unweighted output times the last matrix."""
    weight_R1: Tensor | None

    def grad_weight(self) -> Tensor:
        """The dot product of each row [R], in at least float32."""
        assert self.p_RF is not None
        wide = torch.promote_types(self.a_RF.dtype, torch.float32)
        return (self.p_RF.to(wide) * self.a_RF).sum(dim=-1)

    def weighted_a(self) -> Tensor:
        return _weighted(self.a_RF, self.weight_R1)


def _inner(h_RG: Tensor, p_RF: Tensor | None, weight_R1: Tensor | None, activation: Activation) -> _Inner:
    if p_RF is None:
        a_RF = activate(h_RG, activation)
        return _Inner(a_RF, a_RF, None, weight_R1)
    a_RF, grad_h_RG = activate_backward(h_RG, _weighted(p_RF, weight_R1), activation)
    return _Inner(a_RF, grad_h_RG, p_RF, weight_R1)


def _weighted(x_RF: Tensor, weight_R1: Tensor | None) -> Tensor:
    """Multiplied in the wider dtype, in the dtype of ``x_RF``."""
    return x_RF if weight_R1 is None else (x_RF * weight_R1).to(x_RF.dtype)


def _outer(grad_RO: Tensor, x_RI: Tensor, out_OI: Tensor) -> None:
    """Write grad^T x, through the compute dtype where the gradient's is wider."""
    if out_OI.dtype == x_RI.dtype:
        torch.mm(grad_RO.t(), x_RI, out=out_OI)
    else:
        out_OI.copy_(torch.mm(grad_RO.t(), x_RI))


class _Products(Protocol):
    """The products of one matrix per expert with rows in a layout of its own, whose spare rows are zero.

    Computed in the dtype of the rows, whatever that of the matrix.
    """

    def enter(self, x_RI: Tensor) -> Tensor: ...

    def leave(self, x_PI: Tensor) -> Tensor: ...

    def times_transposed(self, x_PI: Tensor, w_EOI: Tensor) -> Tensor:
        """Each row times its expert's matrix, transposed: [P, O]."""
        ...

    def times(self, grad_PO: Tensor, w_EOI: Tensor) -> Tensor:
        """Each row times its expert's matrix: [P, I]."""
        ...

    def outer(self, grad_PO: Tensor, x_PI: Tensor) -> Tensor:
        """Sum over each expert's rows of the outer products: [E, O, I], as narrow as rows or wider."""
        ...


@final
class Passes:
    """One product over all experts after another."""

    def __init__(self, products: _Products, unwritten: Sequence[int]) -> None:
        """``unwritten`` are the experts whose gradients ``products`` leaves as memory was."""
        self.unwritten = list(unwritten)
        self.products = products

    def forward(self, x_RD: Tensor, network: Network) -> tuple[Tensor, Tensor]:
        products = self.products
        h_PG = products.times_transposed(products.enter(x_RD), network.up_EGD)
        a_PF = activate(h_PG, network.activation)
        return h_PG, products.leave(products.times_transposed(a_PF, network.down_EDF))

    def backward(self, passed: Passed, network: Network, asked: Asked) -> Gradients:
        products, x_RD, weight_R = self.products, passed.x_RD, passed.weight_R
        grad_PD = products.enter(passed.grad_RD)
        weight_P1 = None if weight_R is None else products.enter(weight_R[:, None])
        p_PF = products.times(grad_PD, network.down_EDF) if asked.inside else None
        inner = _inner(passed.h_PG, p_PF, weight_P1, network.activation)
        grad_x_RD = grad_weight_R = grad_up_EGD = grad_down_EDF = None
        if asked.down:
            grad_down_EDF = self._written(products.outer(grad_PD, inner.weighted_a()), network.down_EDF)
        if asked.up:
            grad_up_EGD = self._written(products.outer(inner.grad_h, products.enter(x_RD)), network.up_EGD)
        if asked.weight:
            grad_weight_R = products.leave(inner.grad_weight()[..., None]).flatten()
        if asked.x:
            grad_x_RD = products.leave(products.times(inner.grad_h, network.up_EGD))
        return Gradients(grad_x_RD, grad_weight_R, grad_up_EGD, grad_down_EDF)

    def _written(self, grad_EOI: Tensor, weight_EOI: Tensor) -> Tensor:
        """The gradient in the weight's dtype."""
        if self.unwritten:
            grad_EOI[self.unwritten] = 0
        return grad_EOI.to(weight_EOI.dtype)


@final
class Ragged:
    """Rows as they are, through ``grouped_mm``."""

    def __init__(self, counts_E: Counts) -> None:
        self.ends_E = torch.tensor(counts_E).cumsum(0).to(torch.int32)

    def enter(self, x_RI: Tensor) -> Tensor:
        return x_RI.contiguous()

    def leave(self, x_PI: Tensor) -> Tensor:
        return x_PI

    def times_transposed(self, x_PI: Tensor, w_EOI: Tensor) -> Tensor:
        return F.grouped_mm(x_PI, w_EOI.to(x_PI.dtype).transpose(1, 2), offs=self.ends_E.to(x_PI.device))

    def times(self, grad_PO: Tensor, w_EOI: Tensor) -> Tensor:
        return F.grouped_mm(grad_PO, w_EOI.to(grad_PO.dtype), offs=self.ends_E.to(grad_PO.device))

    def outer(self, grad_PO: Tensor, x_PI: Tensor) -> Tensor:
        return F.grouped_mm(grad_PO.t(), x_PI, offs=self.ends_E.to(x_PI.device))


@final
class Padded:
    """Every expert's rows padded with zeros to the busiest one's, [E, C, I], through ``bmm``."""

    def __init__(self, counts_E: Counts) -> None:
        self.shape = len(counts_E), max(counts_E)
        starts = [e * self.shape[1] for e in range(self.shape[0])]
        places = [torch.arange(s, s + count) for s, count in zip(starts, counts_E, strict=True)]
        self.place_R = torch.cat(places)

    def enter(self, x_RI: Tensor) -> Tensor:
        x_PI = x_RI.new_zeros(self.shape[0] * self.shape[1], x_RI.shape[1])
        return x_PI.index_copy_(0, self.place_R.to(x_RI.device), x_RI).unflatten(0, self.shape)

    def leave(self, x_PI: Tensor) -> Tensor:
        return x_PI.flatten(0, 1).index_select(0, self.place_R.to(x_PI.device))

    def times_transposed(self, x_PI: Tensor, w_EOI: Tensor) -> Tensor:
        return torch.bmm(x_PI, w_EOI.to(x_PI.dtype).transpose(1, 2))

    def times(self, grad_PO: Tensor, w_EOI: Tensor) -> Tensor:
        return torch.bmm(grad_PO, w_EOI.to(grad_PO.dtype))

    def outer(self, grad_PO: Tensor, x_PI: Tensor) -> Tensor:
        return torch.bmm(grad_PO.transpose(1, 2), x_PI)
