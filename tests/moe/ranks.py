"""Several ranks in the threads of one process: what they sum is summed over them, in the order asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from consilium.moe.types import Reduce

T = TypeVar("T")


def together(ranks: Sequence[Callable[[Reduce], T]]) -> list[T]:
    """Run every rank with a sum over all of them; a rank that fails fails the others."""
    barrier = threading.Barrier(len(ranks), timeout=60)
    given: list[Tensor | None] = [None] * len(ranks)

    def start(rank: int, call: Callable[[Reduce], T]) -> T:
        def reduce(values: Tensor) -> Tensor:
            given[rank] = values
            barrier.wait()
            total = torch.stack([value for value in given if value is not None]).sum(dim=0)
            barrier.wait()
            return total

        try:
            return call(reduce)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(start, range(len(ranks)), ranks))
