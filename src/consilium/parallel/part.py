"""What of a parameter is in this process: all of it, or some rows of its first axis."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor, nn


@final
@dataclass(frozen=True, slots=True)
class Part:
    here: Tensor
    """Shares memory with the parameter."""
    rows: range
    """Of the first axis."""


class Sharding(Protocol):
    """How the parameters of a model lie over the processes."""

    def shard(self, model: nn.Module, alone: Iterable[nn.Module], experts: Iterable[nn.Module]) -> None:
        """Cut every parameter of ``model`` where it stands.

        Each module of ``alone`` and of ``experts`` is gathered by itself while it computes; ``experts`` lie
        over the processes that have the same of them, all else over everybody.
        """
        ...

    def part(self, tensor: Tensor) -> Part:
        """What is here of ``tensor``."""
        ...

    def like(self, tensor: Tensor, here: Tensor) -> Tensor:
        """``here``, whose memory it shares, as what is here of a tensor that lies as ``tensor`` does."""
        ...

    def gathered(self, tensor: Tensor) -> Tensor:
        """The whole tensor, in every process that has a part; all of them ask together."""
        ...

    def local(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the parameters of ``model`` are plain tensors of what is here, with their gradients.

        They are the same objects each time, so that an optimizer that was made of them moves the model.
        Nobody computes with the model meanwhile.
        """
        ...


def whole(tensor: Tensor) -> Part:
    """A tensor that is all here."""
    return Part(tensor, range(tensor.shape[0] if tensor.ndim else 0))


@final
@dataclass(frozen=True, slots=True)
class Whole:
    """One process has everything."""

    def shard(self, model: nn.Module, alone: Iterable[nn.Module], experts: Iterable[nn.Module]) -> None:
        pass

    def part(self, tensor: Tensor) -> Part:
        return whole(tensor)

    def like(self, tensor: Tensor, here: Tensor) -> Tensor:
        return here

    def gathered(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    def local(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()
