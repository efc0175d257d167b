"""Which experts computed which token: as the engine tells it, and as a file keeps it.

Legend: T tokens, M MoE layers, K choices, of which a layer may have fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.checkpoint import safetensors_io
from consilium.disk.atomic import commit_file
from consilium.errors import ConsiliumError
from consilium.moe.types import Chosen


@dataclass(frozen=True, slots=True)
class Routes:
    """Of tokens that follow one another."""

    layers: tuple[int, ...]
    """Indices of the blocks with experts."""
    experts_TMK: Tensor
    """int16; -1 where there is none."""
    weights_TMK: Tensor
    """float32."""
    seconds_TM: Tensor
    """int16: the expert closest to being used; -1 where there is none."""
    margins_TM: Tensor
    """float32: how far that was behind the last one used."""

    @property
    def tokens(self) -> int:
        return len(self.experts_TMK)

    def part(self, begin: int, end: int) -> Routes:
        return Routes(self.layers, *(values[begin:end] for values in self.values))

    @staticmethod
    def joined(parts: Sequence[Routes]) -> Routes:
        """Of tokens that follow one another; there is at least one part."""
        values = zip(*(part.values for part in parts), strict=True)
        return Routes(parts[0].layers, *(torch.cat(of) for of in values))

    @property
    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.experts_TMK, self.weights_TMK, self.seconds_TM, self.margins_TM

    @staticmethod
    def of(chosen: Mapping[int, Chosen]) -> Routes | None:
        """What the layers of a pass chose; None without experts."""
        if not chosen:
            return None
        layers = chosen.values()
        most = max(layer.experts_TK.shape[1] for layer in layers)

        def padded(values_TK: Tensor, spare: int) -> Tensor:
            return F.pad(values_TK, (0, most - values_TK.shape[1]), value=spare)

        experts_TMK = torch.stack([padded(layer.experts_TK, -1) for layer in layers], 1)
        weights_TMK = torch.stack([padded(layer.weights_TK.float(), 0) for layer in layers], 1)
        seconds_TM = torch.stack([_or(layer.second_T, layer, -1) for layer in layers], 1)
        margins_TM = torch.stack([_or(layer.margin_T, layer, 0) for layer in layers], 1)
        return Routes(
            tuple(chosen),
            experts_TMK.to(torch.int16).cpu(),
            weights_TMK.cpu(),
            seconds_TM.to(torch.int16).cpu(),
            margins_TM.float().cpu(),
        )


def _or(values_T: Tensor | None, layer: Chosen, spare: int) -> Tensor:
    return layer.experts_TK.new_full((len(layer.experts_TK),), spare) if values_T is None else values_T


@dataclass(frozen=True, slots=True)
class Recording:
    """Where the tokens of a text went, all but the last, which no pass computed."""

    tokens: tuple[int, ...]
    routes: Routes

    def write(self, file: Path) -> None:
        """As safetensors, whole or not at all: ``tokens`` [T], ``layers`` [M], both int32, and routes."""
        tensors = {
            "tokens": torch.tensor(self.tokens, dtype=torch.int32),
            "layers": torch.tensor(self.routes.layers, dtype=torch.int32),
            "experts": self.routes.experts_TMK.contiguous(),
            "weights": self.routes.weights_TMK.contiguous(),
            "seconds": self.routes.seconds_TM.contiguous(),
            "margins": self.routes.margins_TM.contiguous(),
        }
        commit_file(file, lambda staged: safetensors_io.write(staged, tensors))

    @staticmethod
    def read(file: Path) -> Recording:
        """Raises ConsiliumError for a file that is none."""
        found = safetensors_io.read_header(file)
        if {name: entry.dtype for name, entry in found.items()} != dict(_KINDS):
            raise ConsiliumError(
                f"{file} is no recorded routing; consilium generate --record-routing writes one."
            )
        tokens, layers, experts, weights, seconds, margins = (found[name].shape for name in _KINDS)
        if experts[:-1] != tokens + layers or weights != experts or not seconds == margins == tokens + layers:
            raise ConsiliumError(f"{file}: its tensors do not fit each other; record it anew.")
        values = safetensors_io.read(file)
        routes = Routes(tuple(values["layers"].tolist()), *(values[name] for name in tuple(_KINDS)[2:]))
        return Recording(tuple(values["tokens"].tolist()), routes)


_KINDS: Final = MappingProxyType(
    {
        "tokens": torch.int32,
        "layers": torch.int32,
        "experts": torch.int16,
        "weights": torch.float32,
        "seconds": torch.int16,
        "margins": torch.float32,
    }
)
