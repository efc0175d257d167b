"""Parts of a model that a run leaves as they are, by patterns over the names of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from consilium.config.training import is_frozen
from consilium.errors import ConsiliumError, nearest
from consilium.model.decoder import Decoder
from consilium.moe.layer import MoELayer


def freeze(model: Decoder, patterns: Sequence[str]) -> None:
    """Take the gradient from every parameter whose name ``patterns`` freeze.

    Raises ConsiliumError for a pattern that fits no weight and where nothing is left to train.
    """
    names = list(model.state_dict())
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        if not any(fnmatchcase(name, plain) for name in names):
            raise ConsiliumError(f"train.freeze: no weight is called {plain!r}.{nearest(plain, names)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name, patterns))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConsiliumError("train.freeze leaves nothing to train; take a pattern out.")


def balancing_layers(model: Decoder, patterns: Sequence[str]) -> Mapping[int, MoELayer]:
    """MoE layers by index whose balance moves: a frozen ``bias_E`` chooses as it did."""
    return {
        module.layer: module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer) and not is_frozen(f"{name}.balance.bias_E", patterns)
    }
