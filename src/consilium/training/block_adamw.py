"""AdamW whose moments are kept in 8 bits and computed with in float32.

Legend: N values of a stretch of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from consilium.config.optimizer import AdamW, BlockState
from consilium.ops.blockwise import Coded, decode, encode

TOGETHER: Final = 2**22
"""Values, about, that are computed at once: scratch memory does not grow with the stack of experts."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Whole blocks of a parameter, as views that a step writes into."""

    weight_N: Tensor
    gradient_N: Tensor
    first: Coded
    second: Coded


@final
class BlockAdamW(torch.optim.Optimizer):
    """The steps of AdamW (1711.05101 algorithm 2) on moments that were quantised after the step before."""

    def __init__(self, groups: Iterable[Mapping[str, Any]], config: AdamW) -> None:
        super().__init__([dict(group) for group in groups], {"lr": config.learning_rate})
        assert isinstance(config.state, BlockState)
        self._config, self._block = config, config.state.block

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the gradients are there"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group["lr"], group["weight_decay"])

    def _update(self, weight: Tensor, rate: float, decay: float) -> None:
        state = self.state[weight]
        if not state:
            state.update(self._fresh(weight))
        state["step"] += 1
        weight.mul_(1 - rate * decay)
        for stretch in self._stretches(weight, state):
            self._move(stretch, rate, int(state["step"]))

    def _fresh(self, weight: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.zeros(())}
        for name, signed in (("first", True), ("second", False)):
            coded = encode(torch.zeros_like(weight).view(-1), self._block, signed=signed)
            state |= {f"{name}_code": coded.code_C, f"{name}_scale": coded.scale_K}
        return state

    def _stretches(self, weight: Tensor, state: Mapping[str, Tensor]) -> Iterator[Stretch]:
        assert weight.grad is not None
        blocks = max(1, TOGETHER // self._block)
        by_value = (weight.view(-1), weight.grad.reshape(-1), state["first_code"], state["second_code"])
        by_block = (state["first_scale"], state["second_scale"])
        parts = [x.split(blocks * self._block) for x in by_value] + [x.split(blocks) for x in by_block]
        for weight_N, gradient_N, *codes, first_K, second_K in zip(*parts, strict=True):
            yield Stretch(weight_N, gradient_N, Coded(codes[0], first_K), Coded(codes[1], second_K))

    def _move(self, stretch: Stretch, rate: float, step: int) -> None:
        config, gradient_N = self._config, stretch.gradient_N
        first_N = decode(stretch.first, self._block, signed=True).lerp_(gradient_N, 1 - config.beta1)
        second_N = decode(stretch.second, self._block, signed=False).mul_(config.beta2)
        second_N.addcmul_(gradient_N, gradient_N, value=1 - config.beta2)
        size_N = (second_N / (1 - config.beta2**step)).sqrt_().add_(config.epsilon)
        stretch.weight_N.addcdiv_(first_N, size_N, value=-rate / (1 - config.beta1**step))
        self._keep(stretch.first, encode(first_N, self._block, signed=True))
        self._keep(stretch.second, encode(second_N, self._block, signed=False))

    @staticmethod
    def _keep(old: Coded, new: Coded) -> None:
        old.code_C.copy_(new.code_C)
        old.scale_K.copy_(new.scale_K)
