"""Weights: a matrix is an object that multiplies itself, and nobody outside ``ops`` reads its tensors.

Modules hold the tensors under the names of their state dict and hand these values to what multiplies. Another
format (int8, int4, fp8) is another final class here; kernels of ``ops`` that know a format match on it,
everything else calls ``times``.

Legend: R rows, E experts, O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import torch.nn.functional as F
from torch import Tensor


class Matrix(Protocol):
    """W [O, I]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def needs_gradient(self) -> bool:
        """Whether somebody asked for its gradient; a backward written by hand computes no other."""
        ...

    def times(self, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """The product x W^T + b [..., O] of rows [..., I], in the dtype of ``x`` and under autograd."""
        ...


class Stack(Protocol):
    """A matrix of each expert, W [E, O, I]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def needs_gradient(self) -> bool: ...

    def matrices(self) -> tuple[Matrix, ...]:
        """The E matrices, taken apart once: indexing under autograd makes a full gradient an expert."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Dense:
    """A floating-point matrix. Wider than ``x`` (float32 masters) it is cast in the graph at each product."""

    weight_OI: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight_OI.shape)

    @property
    def needs_gradient(self) -> bool:
        return self.weight_OI.requires_grad

    def times(self, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))


@final
@dataclass(frozen=True, slots=True)
class DenseStack:
    """Floating-point matrices in one tensor."""

    weight_EOI: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight_EOI.shape)

    @property
    def needs_gradient(self) -> bool:
        return self.weight_EOI.requires_grad

    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(Dense(weight_OI) for weight_OI in self.weight_EOI.unbind())
