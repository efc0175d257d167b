"""Expert networks over rows sorted by expert: the plain loop under autograd and three fast twins of it.

A fast twin is one autograd function over dense stacks. It saves the rows, the pre-activations and the
weights, recomputes the activation in backward, writes the stacked gradients once and computes none that
nobody asked for; indexing a stacked weight under autograd would make one full [E, G, D] gradient an expert.

Legend: R rows sorted by expert, E experts, D hidden size, F width, G = 2F where the activation is gated, else
F, C the most rows of one expert, P rows of a layout (R or E*C), I inputs and O outputs of one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from consilium.config.feed_forward import Activation
from consilium.ops.feed_forward import activate, activate_backward
from consilium.ops.weights import DenseStack, Stack

Backend = Literal["reference", "grouped", "padded", "loop"]
Counts = tuple[int, ...]

CACHE_BYTES = 32 << 20
"""Pre-activations beyond this leave the last-level cache between two passes over all experts."""

MOST_PADDING = 4.0
"""Rows of the padded layout per real row that are ever accepted: one busy expert pads all others."""


def stacked_feed_forward(
    x_RD: Tensor,
    counts_E: Counts,
    up: Stack,
    down: Stack,
    activation: Activation,
    backend: Backend | None = None,
) -> Tensor:
    """Outputs [R, D]: each expert's feed-forward network over its own consecutive ``counts_E[e]`` rows.

    ``up`` is [E, G, D] and ``down`` [E, D, F]. Computes in the dtype of ``x_RD``. Dense weights may be wider
    (float32 masters): they are cast once a pass and their gradients keep their dtype. Experts without rows
    get gradients of exactly zero. ``backend`` None takes :func:`choose`; a backend that cannot compute these
    shapes gives way to the loop, and weights that are not dense take the reference.
    """
    assert sum(counts_E) == x_RD.shape[0], "counts and rows disagree"
    assert len(counts_E) == up.shape[0], "counts and weights disagree"
    if not (isinstance(up, DenseStack) and isinstance(down, DenseStack)):
        return observed_feed_forward(x_RD, counts_E, up, down, activation)[1]
    network = Network(up.weight_EOI, down.weight_EOI, activation)
    backend = _possible(backend or choose(x_RD, counts_E, network), x_RD, counts_E, network)
    if backend == "reference":
        return observed_feed_forward(x_RD, counts_E, up, down, activation)[1]
    if torch.is_grad_enabled():
        plan = _Plan(activation, counts_E, backend)
        return _Networks.apply(x_RD, network.up_EGD, network.down_EDF, plan)
    return _way(backend, counts_E).forward(x_RD, network)[1]


def observed_feed_forward(
    x_RD: Tensor, counts_E: Counts, up: Stack, down: Stack, activation: Activation
) -> tuple[Tensor, Tensor]:
    """The obvious loop over experts: hidden activations [R, F] and outputs [R, D], both in the graph."""
    up_E, down_E = up.matrices(), down.matrices()
    h_RG = torch.cat([w.times(x) for x, w in zip(x_RD.split(counts_E), up_E, strict=True)])
    a_RF = activate(h_RG, activation)
    y_RD = torch.cat([w.times(a) for a, w in zip(a_RF.split(counts_E), down_E, strict=True)])
    return a_RF, y_RD


@dataclass(frozen=True, slots=True)
class Network:
    """The stacked networks of all experts."""

    up_EGD: Tensor
    down_EDF: Tensor
    activation: Activation


def choose(x_RD: Tensor, counts_E: Counts, network: Network) -> Backend:
    """The fastest backend as measured in docs/decisions/0003-experts-backend.md."""
    if x_RD.device.type == "cuda":
        return "grouped" if x_RD.dtype == torch.bfloat16 else "padded"
    if x_RD.device.type != "cpu":
        return "loop"
    if x_RD.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "padded" if _padding(counts_E) <= 1.3 else "loop"
    hidden_bytes = x_RD.shape[0] * network.up_EGD.shape[1] * x_RD.element_size()
    return "loop" if hidden_bytes > CACHE_BYTES else "grouped"


def _possible(backend: Backend, x_RD: Tensor, counts_E: Counts, network: Network) -> Backend:
    match backend:
        case "grouped":
            strides = (*network.up_EGD.shape[1:], network.down_EDF.shape[2])
            aligned = all(stride * x_RD.element_size() % 16 == 0 for stride in strides)
            possible = aligned and x_RD.dtype in (torch.float32, torch.bfloat16, torch.float16)
        case "padded":
            possible = _padding(counts_E) <= MOST_PADDING
        case "loop" | "reference":
            possible = True
    return backend if possible and x_RD.shape[0] else "loop"


def _padding(counts_E: Counts) -> float:
    return len(counts_E) * max(counts_E) / max(sum(counts_E), 1)


@dataclass(frozen=True, slots=True)
class _Plan:
    activation: Activation
    counts_E: Counts
    backend: Backend


class _Asked(NamedTuple):
    """Which gradients somebody asked for."""

    x: bool
    up: bool
    down: bool

    @property
    def inside(self) -> bool:
        """Whether the gradient has to pass the second matrix."""
        return self.x or self.up


class _Networks(Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, up_EGD: Tensor, down_EDF: Tensor, plan: _Plan) -> Tensor:
        network = Network(up_EGD, down_EDF, plan.activation)
        h_PG, y_RD = _way(plan.backend, plan.counts_E).forward(x_RD, network)
        ctx.save_for_backward(x_RD, h_PG, up_EGD, down_EDF)
        ctx.plan = plan
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's own type
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_RD, h_PG, up_EGD, down_EDF = ctx.saved_tensors
        way = _way(ctx.plan.backend, ctx.plan.counts_E)
        network = Network(up_EGD, down_EDF, ctx.plan.activation)
        asked = _Asked(*ctx.needs_input_grad[:3])
        return *way.backward(grads[0].contiguous(), x_RD, h_PG, network, asked), None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of rows, ``up`` and ``down``; None where nobody asked."""


class _Way(Protocol):
    """A way to compute all experts without autograd."""

    def forward(self, x_RD: Tensor, network: Network) -> tuple[Tensor, Tensor]:
        """Pre-activations, in the way's own layout [P, G], and outputs [R, D]."""
        ...

    def backward(
        self, grad_RD: Tensor, x_RD: Tensor, h_PG: Tensor, network: Network, asked: _Asked
    ) -> Gradients:
        """What is asked for; gradients of weights in the weights' dtype and fully written."""
        ...


def _way(backend: Backend, counts_E: Counts) -> _Way:
    match backend:
        case "grouped":
            return _Passes(counts_E, _Ragged(counts_E))
        case "padded":
            return _Passes(counts_E, _Padded(counts_E))
        case "loop" | "reference":
            return _Loop(counts_E)


@final
class _Loop:
    """Expert after expert, products written in place: temporaries of one expert stay in the cache."""

    def __init__(self, counts_E: Counts) -> None:
        self.rows_E: list[slice] = []
        for count in counts_E:
            start = self.rows_E[-1].stop if self.rows_E else 0
            self.rows_E.append(slice(start, start + count))

    def forward(self, x_RD: Tensor, network: Network) -> tuple[Tensor, Tensor]:
        h_RG = x_RD.new_empty(x_RD.shape[0], network.up_EGD.shape[1])
        y_RD = x_RD.new_empty(x_RD.shape)
        for e, rows in self._live():
            up_GD, down_DF = network.up_EGD[e].to(x_RD.dtype), network.down_EDF[e].to(x_RD.dtype)
            torch.mm(x_RD[rows], up_GD.t(), out=h_RG[rows])
            torch.mm(activate(h_RG[rows], network.activation), down_DF.t(), out=y_RD[rows])
        return h_RG, y_RD

    def backward(
        self, grad_RD: Tensor, x_RD: Tensor, h_PG: Tensor, network: Network, asked: _Asked
    ) -> Gradients:
        grad_x_RD = torch.empty_like(x_RD) if asked.x else None
        grad_up_EGD = self._empty(network.up_EGD) if asked.up else None
        grad_down_EDF = self._empty(network.down_EDF) if asked.down else None
        for e, rows in self._live():
            up_GD, down_DF = network.up_EGD[e].to(x_RD.dtype), network.down_EDF[e].to(x_RD.dtype)
            if asked.inside:
                a, grad_h = activate_backward(h_PG[rows], grad_RD[rows] @ down_DF, network.activation)
            else:
                a = grad_h = activate(h_PG[rows], network.activation)
            if grad_x_RD is not None:
                torch.mm(grad_h, up_GD, out=grad_x_RD[rows])
            if grad_up_EGD is not None:
                _outer(grad_h, x_RD[rows], grad_up_EGD[e])
            if grad_down_EDF is not None:
                _outer(grad_RD[rows], a, grad_down_EDF[e])
        return grad_x_RD, grad_up_EGD, grad_down_EDF

    def _empty(self, weight_EOI: Tensor) -> Tensor:
        """Room for a gradient, already zero for idle experts."""
        grad_EOI = torch.empty_like(weight_EOI)
        for e, rows in enumerate(self.rows_E):
            if rows.start == rows.stop:
                grad_EOI[e].zero_()
        return grad_EOI

    def _live(self) -> list[tuple[int, slice]]:
        return [(e, rows) for e, rows in enumerate(self.rows_E) if rows.start < rows.stop]


def _outer(grad_RO: Tensor, x_RI: Tensor, out_OI: Tensor) -> None:
    """Write grad^T x, through the compute dtype where the gradient's is wider."""
    if out_OI.dtype == x_RI.dtype:
        torch.mm(grad_RO.t(), x_RI, out=out_OI)
    else:
        out_OI.copy_(torch.mm(grad_RO.t(), x_RI))


class _Products(Protocol):
    """The products of one matrix per expert with rows in a layout of its own, whose spare rows are zero."""

    def enter(self, x_RI: Tensor) -> Tensor: ...

    def leave(self, x_PI: Tensor) -> Tensor: ...

    def times_transposed(self, x_PI: Tensor, w_EOI: Tensor) -> Tensor:
        """Each row times its expert's matrix, transposed: [P, O]."""
        ...

    def times(self, grad_PO: Tensor, w_EOI: Tensor) -> Tensor:
        """Each row times its expert's matrix: [P, I]."""
        ...

    def outer(self, grad_PO: Tensor, x_PI: Tensor) -> Tensor:
        """Sum over each expert's rows of the outer products: [E, O, I]."""
        ...


@final
class _Passes:
    """One product over all experts after another."""

    def __init__(self, counts_E: Counts, products: _Products) -> None:
        self.idle = [e for e, count in enumerate(counts_E) if not count]
        self.products = products

    def forward(self, x_RD: Tensor, network: Network) -> tuple[Tensor, Tensor]:
        products = self.products
        h_PG = products.times_transposed(products.enter(x_RD), network.up_EGD.to(x_RD.dtype))
        a_PF = activate(h_PG, network.activation)
        return h_PG, products.leave(products.times_transposed(a_PF, network.down_EDF.to(x_RD.dtype)))

    def backward(
        self, grad_RD: Tensor, x_RD: Tensor, h_PG: Tensor, network: Network, asked: _Asked
    ) -> Gradients:
        products = self.products
        grad_PD = products.enter(grad_RD)
        grad_x_RD = grad_up_EGD = grad_down_EDF = None
        if asked.inside:
            grad_a_PF = products.times(grad_PD, network.down_EDF.to(x_RD.dtype))
            a_PF, grad_h_PG = activate_backward(h_PG, grad_a_PF, network.activation)
        else:
            a_PF = grad_h_PG = activate(h_PG, network.activation)
        if asked.down:
            grad_down_EDF = self._written(products.outer(grad_PD, a_PF), network.down_EDF)
        if asked.up:
            grad_up_EGD = self._written(products.outer(grad_h_PG, products.enter(x_RD)), network.up_EGD)
        if asked.x:
            grad_x_RD = products.leave(products.times(grad_h_PG, network.up_EGD.to(x_RD.dtype)))
        return grad_x_RD, grad_up_EGD, grad_down_EDF

    def _written(self, grad_EOI: Tensor, weight_EOI: Tensor) -> Tensor:
        """The gradient in the weight's dtype. No kernel promises what it leaves for an idle expert."""
        if self.idle:
            grad_EOI[self.idle] = 0
        return grad_EOI.to(weight_EOI.dtype)


@final
class _Ragged:
    """Rows as they are, through ``grouped_mm``."""

    def __init__(self, counts_E: Counts) -> None:
        self.ends_E = torch.tensor(counts_E).cumsum(0).to(torch.int32)

    def enter(self, x_RI: Tensor) -> Tensor:
        return x_RI.contiguous()

    def leave(self, x_PI: Tensor) -> Tensor:
        return x_PI

    def times_transposed(self, x_PI: Tensor, w_EOI: Tensor) -> Tensor:
        return F.grouped_mm(x_PI, w_EOI.transpose(1, 2), offs=self.ends_E.to(x_PI.device))

    def times(self, grad_PO: Tensor, w_EOI: Tensor) -> Tensor:
        return F.grouped_mm(grad_PO, w_EOI, offs=self.ends_E.to(grad_PO.device))

    def outer(self, grad_PO: Tensor, x_PI: Tensor) -> Tensor:
        return F.grouped_mm(grad_PO.t(), x_PI, offs=self.ends_E.to(x_PI.device))


@final
class _Padded:
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
        return torch.bmm(x_PI, w_EOI.transpose(1, 2))

    def times(self, grad_PO: Tensor, w_EOI: Tensor) -> Tensor:
        return torch.bmm(grad_PO, w_EOI)

    def outer(self, grad_PO: Tensor, x_PI: Tensor) -> Tensor:
        return torch.bmm(grad_PO.transpose(1, 2), x_PI)
