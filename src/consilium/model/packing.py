"""Weights of a model in fewer bits: those of its projections, networks, experts and head.

Norms, gates, biases, the embedding and the latents' up-projection stay as they are: they are small, or read
value by value.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from consilium.model.decoder import Decoder
from consilium.model.vocabulary import Vocabulary
from consilium.moe.experts import Experts
from consilium.moe.shared import GatedNetwork
from consilium.ops.linear import Linear
from consilium.ops.weights import Packing, packed


def packable(model: Decoder) -> frozenset[str]:
    """State names of the weights that can be packed."""
    gates = {m.gate for m in model.modules() if isinstance(m, GatedNetwork)}
    return frozenset(
        f"{name}.{leaf}" for name, module in model.named_modules() for leaf in _leaves(model, module, gates)
    )


def _leaves(model: Decoder, module: nn.Module, gates: set[Linear]) -> Iterator[str]:
    match module:
        case Experts():
            yield from ("up", "down")
        case Linear() if module not in gates:
            yield "weight"
        case Vocabulary() if module is not model.embed:
            yield "weight"
        case _:
            pass


def hold(model: Decoder, name: str, integers: Tensor, scales: Tensor) -> None:
    """Put packed values in the place of the weight ``name``."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(integers, requires_grad=False))
    setattr(module, f"{leaf}_scales", scales)


def pack(model: Decoder, packing: Packing) -> None:
    """Pack all weights that can be, in place: what is trained on is no longer there."""
    weights = dict(model.named_parameters())
    for name in sorted(packable(model)):
        hold(model, name, *packed(weights.pop(name).detach(), packing))
