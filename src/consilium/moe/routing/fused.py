"""Routers that the native kernels know, as their sources read them: the others are asked in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from torch import Tensor

from consilium.config.router import Normalised, Raw, Score, Sigmoid, Softmax, SoftmaxOfSelected, TopK, Weight
from consilium.moe.routing.router import Router
from consilium.ops.native.library import Route

_SCORES: Final[Mapping[type[Score], int]] = MappingProxyType({Softmax: 0, Sigmoid: 1})
_WEIGHTS: Final[Mapping[type[Weight], int]] = MappingProxyType({Raw: 0, Normalised: 1, SoftmaxOfSelected: 2})
_GROUPS: Final = MappingProxyType({"max": 1, "top2_sum": 2})
"""Numbers of ops/native/source/route.cpp."""


def fused(router: Router, bias_E: Tensor | None) -> Route | None:
    """The rule of ``router`` outside training, without overrides; None where kernels have no such rule."""
    config, gate = router.config, router.linear
    score, weigh = _SCORES.get(type(config.score)), _WEIGHTS.get(type(config.weight))
    other = config.offset == "logits" or config.transforms or config.weight_on == "input"
    select = config.select
    if other or gate is None or not isinstance(select, TopK) or score is None or weigh is None:
        return None
    weight, gate_bias_E = gate
    matrix = weight.native(gate_bias_E)
    if matrix is None:
        return None
    groups = select.groups
    return Route(
        experts=matrix.rows,
        choices=min(select.k, matrix.rows),
        groups=1 if groups is None else groups.count,
        keep_groups=1 if groups is None else groups.keep,
        group_rule=0 if groups is None else _GROUPS[groups.score],
        score=score,
        weigh=weigh,
        epsilon=config.weight.epsilon if isinstance(config.weight, Normalised) else 0.0,
        scale=config.scale,
        gate=matrix,
        bias=None if config.offset == "none" or bias_E is None else bias_E.data_ptr(),
    )
