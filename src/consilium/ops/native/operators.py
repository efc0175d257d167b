"""The kernels as operators of torch: compiled graphs hold them, and tensors without values pass through them.

Legend: O outputs, I inputs, R rows sorted by expert, E experts, D hidden size, F width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from consilium.ops.constant import constant
from consilium.ops.native.library import MANY, Feed, kernels, native, readable


class Held(NamedTuple):
    """The tensors of a matrix, or of matrices one below the other: packed where there are scales."""

    values: Tensor
    scales: Tensor | None
    columns: int


def serve(x: Tensor, *matrices: Held, bias_O: Tensor | None = None) -> bool:
    """Whether the kernels are here and read these; not under autograd, and not where there is nothing."""
    asked = x.device.type == "cpu" and x.numel() > 0 and not torch.is_grad_enabled()
    return (
        asked
        and all(readable(held.values, held.scales) for held in matrices)
        and (bias_O is None or readable(bias_O))
        and _are_here()
    )


@constant
def _are_here() -> bool:
    return kernels() is not None


@torch.library.custom_op("consilium::product", mutates_args=(), device_types="cpu")
def product(x: Tensor, values: Tensor, scales: Tensor | None, bias_O: Tensor | None, columns: int) -> Tensor:
    """The product x W^T + b [..., O] of rows [..., I], summed in float32, in the dtype of ``x``."""
    found, matrix = kernels(), native(values, (len(values), columns), scales=scales, bias_O=bias_O)
    assert found is not None, "who asks has seen that kernels serve"
    assert matrix is not None, "and that they read this"
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = found.product(matrix, rows, many=len(rows) >= MANY).to(x.dtype)
    return y.reshape(*x.shape[:-1], len(values))


@product.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor | None, bias_O: Tensor | None, columns: int) -> Tensor:
    del scales, bias_O, columns
    return x.new_empty(*x.shape[:-1], len(values))


@torch.library.custom_op("consilium::networks", mutates_args=(), device_types="cpu")
def networks(  # noqa: PLR0913 - a schema has no structures
    x_RD: Tensor,
    counts_E: Sequence[int],
    up: Tensor,
    up_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    width: int,
    activation: int,
) -> Tensor:
    """Outputs [R, D] of each expert's network over its own rows: summed in float32, of the input's dtype."""
    experts, hidden = len(up), x_RD.shape[1]
    call = Feed(
        width=width,
        experts=experts,
        activation=activation,
        up=native(up, (*up.shape[:2], hidden), scales=up_scales),
        down=native(down, (*down.shape[:2], width), scales=down_scales),
    )
    found = kernels()
    assert found is not None, "who asks has seen that kernels serve"
    experts_R = torch.arange(experts).repeat_interleave(torch.tensor(counts_E))
    y_RD = found.networks(call, x_RD.float().contiguous(), experts_R, many=len(x_RD) >= MANY)
    return y_RD.to(x_RD.dtype)


@networks.register_fake
def _(x_RD: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(x_RD)
