"""Expert networks over rows sorted by expert: the plain loop under autograd and fast twins of it.

A fast twin is one autograd function over dense stacks. It saves its input, the pre-activations and the
weights, recomputes the activation in backward, writes the stacked gradients once and computes none that
nobody asked for; indexing a stacked weight under autograd would make one full [E, G, D] gradient an expert.

The mixture takes tokens and gives each token's weighted sum. It saves nothing that has a row of size D for
each choice: rows are gathered again, and a weight's gradient <g, W a> is taken before the last matrix, as
<g W, a>. So at a fixed active width K F the memory between the passes does not grow with K.

Legend: T tokens, K choices a token, R rows sorted by expert, E experts, D hidden size, F width, G = 2F where
the activation is gated, else F, P rows of a way's layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from consilium.config.feed_forward import Activation
from consilium.ops.bfloat16 import is_storage
from consilium.ops.feed_forward import activate
from consilium.ops.native.library import ACTIVATIONS
from consilium.ops.native.operators import networks, serve
from consilium.ops.native.training import Native, trains, trains_faster
from consilium.ops.rows import ByToken, Rows, sum_by_token
from consilium.ops.ways import Asked, Counts, Loop, Network, Padded, Passed, Passes, Ragged, Way, block
from consilium.ops.weights import DenseStack, Stack

Backend = Literal["reference", "grouped", "padded", "loop", "native"]

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
    if backend is None and (y_RD := _by_kernels(x_RD, counts_E, up, down, activation)) is not None:
        return y_RD
    if not (isinstance(up, DenseStack) and isinstance(down, DenseStack)):
        return observed_feed_forward(x_RD, counts_E, up, down, activation)[1]
    network = Network(up.weight_EOI, down.weight_EOI, activation)
    plan = _plan(backend, x_RD, counts_E, network)
    if plan.backend == "reference":
        return observed_feed_forward(x_RD, counts_E, up, down, activation)[1]
    if torch.is_grad_enabled():
        return _Networks.apply(x_RD, network.up_EGD, network.down_EDF, plan)
    return plan.way.forward(x_RD, network)[1]


def _by_kernels(
    x_RD: Tensor, counts_E: Counts, up: Stack, down: Stack, activation: Activation
) -> Tensor | None:
    """The outputs, summed in float32, in the dtype of ``x_RD``; None under autograd and without kernels.

    None for dense matrices that are not in bfloat16 themselves: float32 masters are for training, which casts
    them, and MKL is best at products of float32.
    """
    narrow = not isinstance(up, DenseStack) or up.weight_EOI.dtype == x_RD.dtype == torch.bfloat16
    first, second = up.held, down.held
    if not narrow or first is None or second is None or not serve(x_RD, first, second):
        return None
    tensors = (*first[:2], *second[:2])
    return networks(x_RD, counts_E, *tensors, second.columns, ACTIVATIONS[activation])


def mixed_feed_forward(
    rows: Rows, up: Stack, down: Stack, activation: Activation, backend: Backend | None = None
) -> Tensor:
    """Each token's sum [T, D] of weights times its rows' outputs, in at least float32.

    :func:`stacked_feed_forward` between :meth:`Rows.inputs` and :meth:`Rows.outputs`, in less memory.
    """
    direct = torch.is_grad_enabled() and not rows.weight_on_input
    if direct and isinstance(up, DenseStack) and isinstance(down, DenseStack):
        network = Network(up.weight_EOI, down.weight_EOI, activation)
        plan = _plan(backend, rows.x_TD, rows.counts_E, network)
        if plan.backend != "reference":
            tensors = rows.x_TD, rows.weight_R, network.up_EGD, network.down_EDF
            return _Mixture.apply(*tensors, _Tokens(plan, rows.by_token))
    y_RD = stacked_feed_forward(rows.inputs(), rows.counts_E, up, down, activation, backend)
    return rows.outputs(y_RD)


def observed_feed_forward(
    x_RD: Tensor, counts_E: Counts, up: Stack, down: Stack, activation: Activation
) -> tuple[Tensor, Tensor]:
    """The obvious loop over experts: hidden activations [R, F] and outputs [R, D], both in the graph."""
    up_E, down_E = up.matrices(), down.matrices()
    h_RG = torch.cat([w.times(x) for x, w in zip(x_RD.split(counts_E), up_E, strict=True)])
    a_RF = activate(h_RG, activation)
    y_RD = torch.cat([w.times(a) for a, w in zip(a_RF.split(counts_E), down_E, strict=True)])
    return a_RF, y_RD


def choose(x_RD: Tensor, counts_E: Counts, network: Network) -> Backend:
    """The fastest backend as measured in docs/decisions/0003-experts-backend.md."""
    if x_RD.device.type == "cuda":
        return "grouped" if x_RD.dtype == torch.bfloat16 else "padded"
    if x_RD.device.type != "cpu":
        return "loop"
    if is_storage(x_RD) and not torch.is_grad_enabled():
        return "reference"
    if trains_faster(x_RD, counts_E, network.up_EGD, network.down_EDF):
        return "native"
    if x_RD.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "padded" if _padding(counts_E) <= 1.3 else "loop"
    hidden_bytes = sum(counts_E) * network.up_EGD.shape[1] * x_RD.element_size()
    return "loop" if hidden_bytes > CACHE_BYTES else "grouped"


def _plan(backend: Backend | None, x_RD: Tensor, counts_E: Counts, network: Network) -> _Plan:
    """``x_RD`` may as well be the tokens of the rows: only what kind of tensor it is is asked."""
    chosen = _possible(backend or choose(x_RD, counts_E, network), x_RD, counts_E, network)
    compiled = x_RD.device.type == "cpu" and x_RD.dtype in (torch.bfloat16, torch.float16)
    blocks_E = tuple(map(block, counts_E)) if compiled else counts_E
    return _Plan(network.activation, counts_E, blocks_E, chosen, network.up_EGD.dtype == torch.float32)


def _possible(backend: Backend, x_RD: Tensor, counts_E: Counts, network: Network) -> Backend:
    match backend:
        case "grouped":
            strides = (*network.up_EGD.shape[1:], network.down_EDF.shape[2])
            aligned = all(stride * x_RD.element_size() % 16 == 0 for stride in strides)
            possible = aligned and x_RD.dtype in (torch.float32, torch.bfloat16, torch.float16)
        case "padded":
            possible = _padding(counts_E) <= MOST_PADDING
        case "native":
            possible = trains(x_RD, network.up_EGD, network.down_EDF)
        case "loop" | "reference":
            possible = True
    return backend if possible and sum(counts_E) else "loop"


def _padding(counts_E: Counts) -> float:
    return len(counts_E) * max(counts_E) / max(sum(counts_E), 1)


@dataclass(frozen=True, slots=True)
class _Plan:
    activation: Activation
    counts_E: Counts
    blocks_E: Counts
    backend: Backend
    wide: bool
    """Whether matrices and their gradients are float32."""

    @property
    def idle(self) -> list[int]:
        """Experts without rows, of which torch's kernels promise nothing."""
        return [e for e, count in enumerate(self.counts_E) if not count]

    @property
    def way(self) -> Way:
        match self.backend:
            case "grouped":
                return Passes(Ragged(self.counts_E), self.idle)
            case "padded":
                return Passes(Padded(self.counts_E), self.idle)
            case "native":
                return Passes(Native(self.counts_E, wide=self.wide), ())
            case "loop" | "reference":
                return Loop(self.counts_E, self.blocks_E)


class _Networks(Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, up_EGD: Tensor, down_EDF: Tensor, plan: _Plan) -> Tensor:
        network = Network(up_EGD, down_EDF, plan.activation)
        h_PG, y_RD = plan.way.forward(x_RD, network)
        ctx.save_for_backward(x_RD, h_PG, up_EGD, down_EDF)
        ctx.plan = plan
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's own type
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_RD, h_PG, up_EGD, down_EDF = ctx.saved_tensors
        network = Network(up_EGD, down_EDF, ctx.plan.activation)
        asks_x, asks_up, asks_down = ctx.needs_input_grad[:3]
        asked = Asked(asks_x, weight=False, up=asks_up, down=asks_down)
        found = ctx.plan.way.backward(Passed(grads[0].contiguous(), x_RD, h_PG), network, asked)
        return found.x, found.up, found.down, None


@dataclass(frozen=True, slots=True)
class _Tokens:
    plan: _Plan
    by_token: ByToken


class _Mixture(Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_R: Tensor, up_EGD: Tensor, down_EDF: Tensor, of: _Tokens
    ) -> Tensor:
        network = Network(up_EGD, down_EDF, of.plan.activation)
        h_PG, y_RD = of.plan.way.forward(x_TD.index_select(0, of.by_token.token_R), network)
        ctx.save_for_backward(x_TD, weight_R, h_PG, up_EGD, down_EDF)
        ctx.of = of
        return sum_by_token(y_RD, weight_R, of.by_token)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's own type
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_TD, weight_R, h_PG, up_EGD, down_EDF = ctx.saved_tensors
        plan, by_token = ctx.of.plan, ctx.of.by_token
        network = Network(up_EGD, down_EDF, plan.activation)
        grad_RD = grads[0].to(x_TD.dtype).index_select(0, by_token.token_R)
        passed = Passed(grad_RD, x_TD.index_select(0, by_token.token_R), h_PG, weight_R)
        found = plan.way.backward(passed, network, Asked(*ctx.needs_input_grad[:4]))
        grad_x_TD = None if found.x is None else sum_by_token(found.x, None, by_token).to(x_TD.dtype)
        return grad_x_TD, found.weight, found.up, found.down, None
