"""The optimizer of a run: which rule moves which weights, at which share of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from consilium.config.feed_forward import GATED
from consilium.config.optimizer import AdamW, Muon
from consilium.config.optimizer import Optimizer as Config
from consilium.moe.experts import Experts
from consilium.moe.shared import GatedNetwork
from consilium.ops.feed_forward import DenseNetwork
from consilium.parallel.part import Sharding, Whole
from consilium.planner.training import in_blocks, is_hidden, is_router
from consilium.training.block_adamw import BlockAdamW
from consilium.training.muon import StackedMuon

Group = dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Optimizer:
    """Several rules as one optimizer; a weight belongs to one of them. A part that is frozen has no state."""

    rules: tuple[torch.optim.Optimizer, ...]

    @property
    def param_groups(self) -> list[Group]:
        """``share`` of a group is its rate in that of the run."""
        return [group for rule in self.rules for group in rule.param_groups]

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for rule in self.rules:
            rule.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        for rule in self.rules:
            rule.step()

    def state(self) -> Iterator[tuple[nn.Parameter, Mapping[str, Tensor]]]:
        """Each weight that has moved, with what is remembered of it."""
        for rule in self.rules:
            for weight, state in rule.state.items():
                assert isinstance(weight, nn.Parameter)
                yield weight, state

    def remember(self, weight: Tensor, field: str, value: Tensor) -> None:
        for rule in self.rules:
            if any(weight is own for group in rule.param_groups for own in group["params"]):
                rule.state[weight][field] = value


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    value: nn.Parameter
    share: float
    """Of its rate in that of the run."""
    decay: float
    hidden: bool
    parts: int
    """Matrices in its last two dimensions, one above the other."""


def build_optimizer(model: nn.Module, config: Config, sharding: Sharding = Whole()) -> Optimizer:
    """Rules for every parameter that trains; torch refuses a rule without any.

    Idle experts have zero gradients, so they decay like all others. Over processes the rules are of the plain
    tensors that a model has inside ``sharding.local``.
    """
    lie = dict(model.named_parameters())
    with sharding.local(model):
        weights = _weights(model, config)
        layouts: dict[Tensor, Tensor] = {own: lie[name] for name, own in model.named_parameters()}
    match config:
        case AdamW():
            own = [w for w in weights if in_blocks(config.state, w.value.numel(), hidden=w.hidden)]
            rules = [BlockAdamW(_groups(own), config)] if own else []
        case Muon():
            own = [w for w in weights if w.hidden]
            rules = [StackedMuon(_groups(own), config, layouts, sharding)] if own else []
    others = [w for w in weights if w not in own]
    return Optimizer((*rules, *([_adamw(others, config)] if others else [])))


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group its share of ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def moments(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; empty before the first step."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[weight]}:{key}": value for weight, state in optimizer.state() for key, value in state.items()
    }


def restore_moments(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Inverse of ``moments``; what else was saved beside them has no colon in its name."""
    parameters = dict(model.named_parameters())
    for key, value in saved.items():
        name, colon, field = key.rpartition(":")
        if colon:
            optimizer.remember(parameters[name], field, value.to(parameters[name].device, copy=True))


def _weights(model: nn.Module, config: Config) -> list[Weight]:
    router = (config.router_learning_rate or config.learning_rate) / config.learning_rate
    parts = _stacked(model) if isinstance(config, Muon) else {}
    return [
        Weight(
            parameter,
            share=router if is_router(name) else 1.0,
            decay=config.decay if parameter.ndim > 1 else 0.0,
            hidden=is_hidden(name, parameter.ndim),
            parts=parts.get(parameter, 1),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def _stacked(model: nn.Module) -> dict[Tensor, int]:
    """Up projections that are a gate above an up."""
    found: dict[Tensor, int] = {}
    for module in model.modules():
        match module:
            case Experts() if module.activation in GATED:
                found[module.up] = 2
            case DenseNetwork() | GatedNetwork() if module.activation in GATED:
                found[module.up.weight] = 2
            case _:
                pass
    return found


def _groups(weights: Sequence[Weight]) -> list[Group]:
    """Weights that are treated alike, in the order of the first of each kind."""
    groups: dict[tuple[float, float, int], Group] = {}
    for w in weights:
        new: Group = {"params": [], "weight_decay": w.decay, "share": w.share, "parts": w.parts}
        groups.setdefault((w.decay, w.share, w.parts), new)["params"].append(w.value)
    return list(groups.values())


def _adamw(weights: Sequence[Weight], config: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        _groups(weights),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
