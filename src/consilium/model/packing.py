"""Weights of a model in fewer bits: those of its projections, networks, experts and head.

Norms, gates, biases, the latents' up-projection and an embedding that is no head stay as they are: they are
small, or read value by value. A head that is the embedding too is packed into int8 whatever the others are:
tokens that are rare have nothing but their row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.model.vocabulary import Vocabulary
from consilium.moe.experts import Experts
from consilium.moe.shared import GatedNetwork
from consilium.ops.linear import Linear
from consilium.ops.weights import PACKINGS, Packing, largest_of, packed, packing_of, range_of


def packings(model: Decoder, packing: Packing) -> Mapping[str, Packing]:
    """State names of the weights that can be packed, in order, and what each is packed into."""
    gates = {m.gate for m in model.modules() if isinstance(m, GatedNetwork)}
    return {
        f"{name}.{leaf}": "int8" if module is model.embed else packing
        for name, module in sorted(model.named_modules())
        for leaf in _leaves(model, module, gates)
    }


def _leaves(model: Decoder, module: nn.Module, gates: set[Linear]) -> Iterator[str]:
    match module:
        case Experts():
            yield from ("up", "down")
        case Linear() if module not in gates:
            yield "weight"
        case Vocabulary() if module is not model.embed or model.config.tied:
            yield "weight"
        case _:
            pass


def packing_in(weights: Mapping[str, Tensor]) -> Packing | None:
    """What a model is packed into, by its state."""
    scales = {name: tensor for name, tensor in weights.items() if name.endswith("_scales")}
    kinds = {packing_of(weights[name.removesuffix("_scales")], tensor) for name, tensor in scales.items()}
    return next((kind for kind in PACKINGS if kind in (kinds - {"int8"} or kinds)), None)


def hold(model: Decoder, name: str, codes: Tensor, scales: Tensor) -> None:
    """Put packed values in the place of the weight ``name``."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(codes, requires_grad=False))
    setattr(module, f"{leaf}_scales", scales)


def refuse_size(name: str, largest: float, packing: Packing) -> None:
    """Raise ConsiliumError for a weight whose largest value no scale of ``packing`` is made for."""
    least, most = range_of(packing)
    if largest != 0 and not least <= largest <= most:
        raise ConsiliumError(
            f"{name} has {largest:.3g} as its largest value, and {packing} is for {least:.3g} to {most:.3g},"
            " since its scales are float16; leave --weights out or take fp8, whose scales are float32."
        )


def pack(model: Decoder, packing: Packing) -> None:
    """Pack all weights that can be, in place: what is trained on is no longer there."""
    weights = dict(model.named_parameters())
    for name, kind in packings(model, packing).items():
        weight = weights.pop(name).detach()
        refuse_size(name, largest_of(weight), kind)
        hold(model, name, *packed(weight, kind))
