"""The two-matrix feed-forward network and its activations, forward and backward.

Legend: R rows, D hidden size, F width, G = 2F where the activation is gated (first F gate, last F up),
else F.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilium.config.feed_forward import Activation, matrices
from consilium.ops.linear import Linear


def activate(h_RG: Tensor, activation: Activation) -> Tensor:
    """Hidden activations [..., F] of the pre-activations [..., G], in their dtype.

    ``swiglu`` is silu(gate) * up and ``geglu`` gelu(gate) * up (2002.05202 equation 6). Both GELUs are the
    tanh approximation (1606.08415 section 2). ``squared_relu`` is relu(h)^2 (2109.08668).
    """
    match activation:
        case "swiglu":
            gate_RF, up_RF = h_RG.chunk(2, dim=-1)
            return F.silu(gate_RF) * up_RF
        case "geglu":
            gate_RF, up_RF = h_RG.chunk(2, dim=-1)
            return F.gelu(gate_RF, approximate="tanh") * up_RF
        case "gelu":
            return F.gelu(h_RG, approximate="tanh")
        case "relu":
            return F.relu(h_RG)
        case "squared_relu":
            return F.relu(h_RG).square()


def activate_backward(h_RG: Tensor, grad_RF: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Recompute the hidden activations [..., F] and return them with the gradient of ``h_RG``.

    For functions that save the pre-activations only. Not differentiable itself.
    """
    match activation:
        case "swiglu" | "geglu":
            return _gated_backward(h_RG, grad_RF, activation)
        case "gelu":
            return activate(h_RG, activation), torch.ops.aten.gelu_backward(grad_RF, h_RG, approximate="tanh")
        case "relu":
            a_RF = F.relu(h_RG)
            return a_RF, torch.where(a_RF > 0, grad_RF, 0)
        case "squared_relu":
            relu_RF = F.relu(h_RG)
            return relu_RF.square(), grad_RF * relu_RF * 2


def _gated_backward(h_RG: Tensor, grad_RF: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    gate_RF, up_RF = h_RG.chunk(2, dim=-1)
    grad_h_RG = torch.empty_like(h_RG)
    grad_gate_RF, grad_up_RF = grad_h_RG.chunk(2, dim=-1)
    if activation == "swiglu":
        s_RF = F.silu(gate_RF)
        torch.ops.aten.silu_backward.grad_input(grad_RF * up_RF, gate_RF, grad_input=grad_gate_RF)
    else:
        s_RF = F.gelu(gate_RF, approximate="tanh")
        torch.ops.aten.gelu_backward.grad_input(
            grad_RF * up_RF, gate_RF, approximate="tanh", grad_input=grad_gate_RF
        )
    torch.mul(grad_RF, s_RF, out=grad_up_RF)
    return s_RF.mul_(up_RF), grad_h_RG


@final
class DenseNetwork(nn.Module):
    """down(activate(up(x))) over the last axis of ``x`` [..., D], computed in the dtype of ``x``.

    Gate and up are one matrix where the activation is gated. Also the shared experts of an MoE layer.
    """

    def __init__(self, hidden_size: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = Linear(hidden_size, (matrices(activation) - 1) * width)
        self.down = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.activation))
