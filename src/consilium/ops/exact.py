"""Float32 arithmetic as it is written, whatever a program has allowed for its large products.

Gates choose experts by differences that neither autocast's bfloat16 nor TF32 on CUDA nor bfloat16 products
inside float32 ones on CPUs (``torch.set_float32_matmul_precision``) would leave alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_MKLDNN = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - set at run time
_MATMUL = (torch.backends.cuda.matmul, _MKLDNN)
_IEEE = ("none", "ieee")


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep autocast out of what is computed on the device of ``x``; some devices have none."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x W^T + b, forward and backward in full float32."""
    if all(backend.fp32_precision in _IEEE for backend in _MATMUL):
        return F.linear(x, weight, bias)
    y: Tensor = _Product.apply(x, weight)
    return y if bias is None else y + bias


@contextmanager
def _ieee() -> Iterator[None]:
    before = [backend.fp32_precision for backend in _MATMUL]
    try:
        for backend in _MATMUL:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(_MATMUL, before, strict=True):
            backend.fp32_precision = precision


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with _ieee():
            return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's own type
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        with _ieee():
            grad_x = grad @ weight if ctx.needs_input_grad[0] else None
            grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
