"""How processes share the work: data, experts and replicas, as numbers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from consilium.errors import ConsiliumError


@final
@dataclass(frozen=True, slots=True)
class Topology:
    """``replicas`` x ``data`` x ``expert`` processes; each reads rows of its own.

    Experts are dealt over ``expert`` neighbours and every share is kept by ``data`` processes together, all
    else by ``data * expert`` processes together; ``replicas`` hold copies. Ranks count experts fastest: those
    who exchange rows sit side by side.
    """

    replicas: int = 1
    data: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if min(self.replicas, self.data, self.expert) < 1:
            raise ConsiliumError(f"a topology needs at least one process in each direction, not {self}.")

    @staticmethod
    def of(world: int, *, expert: int = 1, replicas: int = 1) -> Topology:
        """``world`` processes. Raises ConsiliumError where they cannot be dealt."""
        if expert < 1 or replicas < 1 or world % (expert * replicas):
            copies = f" in each of {replicas} replicas" if replicas > 1 else ""
            product = " and --replicas whose product" if replicas > 1 else " that"
            raise ConsiliumError(
                f"{world} processes cannot be dealt into groups of {expert} that share experts{copies};"
                f" choose --ep{product} divides --nproc."
            )
        return Topology(replicas, world // (expert * replicas), expert)

    @property
    def world(self) -> int:
        return self.replicas * self.data * self.expert

    def place(self, rank: int) -> tuple[int, int, int]:
        """Replica, data and expert index of a rank."""
        return rank // (self.data * self.expert), rank // self.expert % self.data, rank % self.expert

    def __str__(self) -> str:
        return f"{self.replicas} replicas x {self.data} data x {self.expert} expert"


def share(experts: int, index: int, processes: int) -> range:
    """The experts of process ``index`` of so many: as many each, in order. ConsiliumError where uneven."""
    if experts % processes:
        raise ConsiliumError(
            f"{experts} experts cannot be dealt evenly over {processes} processes; choose --ep that divides"
            f" {experts}."
        )
    size = experts // processes
    return range(index * size, (index + 1) * size)
