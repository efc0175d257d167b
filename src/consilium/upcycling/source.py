"""The weights of an upcycled model, made a tensor at a time out of those that it begins with.

Legend: D hidden size, F width of the network, E routed experts, S neurons of an expert, G = 2S where the
activation is gated (gate above up) else S.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.checkpoint.source import Source
from consilium.config.feed_forward import GATED
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.config.moe import MoE, SigmoidGated
from consilium.config.upcycling import Upcycling, VirtualGroup
from consilium.planner.upcycled import FLAT, factor, spread
from consilium.upcycling.compose import Composed
from consilium.upcycling.cut import Cut
from consilium.upcycling.gates import random_rows
from consilium.upcycling.rounding import raised, rounded

_NAME: Final = re.compile(r"layers\.(\d+)\.moe\.(.+)")


@final
@dataclass(frozen=True, slots=True)
class Upcycled:
    """A ``Source``. ``state`` says names, shapes and dtypes of the result and has no memory."""

    dense: Source
    asked: Upcycling
    config: Model
    state: Mapping[str, Tensor]
    cuts: Mapping[int, Cut]
    gates: Mapping[int, Tensor]
    """By layer: rows [E, D], levelled."""
    composed: Composed | None = None
    """Where experts are networks of several models, those models; ``dense`` then has what is not routed."""

    @property
    def generation(self) -> GenerationDefaults:
        return self.dense.generation

    def fill(self, name: str, target: Tensor) -> None:
        """Write our tensor ``name`` into ``target``, in its dtype."""
        found = _NAME.fullmatch(name)
        if found is None:
            self.dense.fill(name, target)
        else:
            # Rounded as it will be written, whatever the dtype of who asks.
            dtype = self.state[name].dtype
            target.copy_(rounded(self._made(int(found[1]), found[2], dtype), dtype, name))

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        """The same of its rows from ``first`` on."""
        target.copy_(self.read(name, target.dtype)[first : first + target.shape[0]])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return our tensor ``name``, by default in the dtype that ``state`` says."""
        values = torch.zeros_like(self.state[name], dtype=dtype, device="cpu")
        self.fill(name, values)
        return values

    def _made(self, layer: int, part: str, dtype: torch.dtype) -> Tensor:
        plan = self.cuts[layer]
        match part:
            case "experts.up":
                return self._up(layer, plan, dtype)
            case "experts.down":
                return self._down(layer, plan, dtype)
            case "shared.up.weight":
                return self._dense(layer, "up", dtype)[self._rows(plan.shared_N)]
            case "shared.down.weight":
                down_DF = self._dense(layer, "down", dtype)
                return down_DF if plan.shared_N is None else down_DF[:, plan.shared_N]
            case "shared.gate.weight":
                assert isinstance(self._moe.shared, SigmoidGated), "no other has a gate"
                # A half and no more; llama.cpp takes silu(x) / x for the sigmoid, which is no number at 0.
                size = self.state[f"layers.{layer}.moe.{part}"].shape[1]
                return random_rows(1, size, self._stream(layer, part)) * (FLAT / size**0.5)
            case "router.projection.output.weight":
                return torch.eye(self._moe.experts) * spread(self.asked)
            case "router.projection.hidden.weight":
                return self.gates[layer] / spread(self.asked)
            case "router.projection.weight":
                return raised(self.gates[layer], dtype)
            case _:
                raise AssertionError(f"an upcycled layer has no {part}")

    @property
    def _moe(self) -> MoE:
        assert self.config.moe is not None, "the result is sparse"
        return self.config.moe

    def _dense(self, layer: int, which: str, dtype: torch.dtype) -> Tensor:
        return self.dense.read(f"layers.{layer}.feed_forward.{which}.weight", dtype)

    def _rows(self, neurons: Tensor | None) -> Tensor:
        """Rows of the up matrix that belong to ``neurons`` [..., S]: those of the gate above those of up."""
        width = self._width
        neurons = torch.arange(width) if neurons is None else neurons
        gated = self._moe.activation in GATED
        return torch.cat((neurons, neurons + width), dim=-1) if gated else neurons

    @property
    def _width(self) -> int:
        return self.dense.state["layers.0.feed_forward.down.weight"].shape[1]

    def _up(self, layer: int, plan: Cut, dtype: torch.dtype) -> Tensor:
        if self.composed is not None:
            return self.composed.networks(layer, "up", dtype)
        up_GD = self._dense(layer, "up", dtype)
        up_EGD = up_GD[self._rows(plan.neurons_ES)]
        if plan.fresh_ES is not None:
            drawn = self._stream(layer, "up")
            parts = up_EGD.shape[1] // plan.fresh_ES.shape[1]  # gate and up, or up alone
            for rows_ESD, matrix_FD in zip(up_EGD.chunk(parts, 1), up_GD.chunk(parts), strict=True):
                draw_anew(rows_ESD, plan.fresh_ES, matrix_FD, drawn)
        return up_EGD * self._root if self._on_all else up_EGD

    def _down(self, layer: int, plan: Cut, dtype: torch.dtype) -> Tensor:
        if self.composed is not None:
            return self.composed.networks(layer, "down", dtype) * factor(self.asked)
        down_DF = self._dense(layer, "down", dtype)
        down_ESD = down_DF.T[plan.neurons_ES]
        if plan.fresh_ES is not None:
            draw_anew(down_ESD, plan.fresh_ES, down_DF, self._stream(layer, "down"))
        return (down_ESD * (self._root if self._on_all else factor(self.asked))).transpose(1, 2)

    @property
    def _on_all(self) -> bool:
        """Whether the factor is shared by all matrices: squared ReLU is cubic in a scale of both."""
        return isinstance(self.asked.method, VirtualGroup) and self.asked.method.scaling == "cube_root"

    @property
    def _root(self) -> float:
        return factor(self.asked) ** (1 / 3)

    def _stream(self, layer: int, which: str) -> torch.Generator:
        return stream(self.asked.seed, layer, which)


def stream(seed: int, layer: int, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose, so that no order of work changes what is drawn."""
    digest = hashlib.sha256(f"upcycling {seed} {layer} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw_anew(rows_ESD: Tensor, fresh_ES: Tensor, matrix: Tensor, generator: torch.Generator) -> None:
    """Write N(mean, std) of ``matrix`` into the rows that are ``fresh_ES`` (Drop-Upcycling section 3.2)."""
    wide = matrix.float()
    drawn_ND = torch.randn(int(fresh_ES.sum()), rows_ESD.shape[2], generator=generator)
    rows_ESD[fresh_ES] = (drawn_ND * wide.std() + wide.mean()).to(rows_ESD.dtype)
