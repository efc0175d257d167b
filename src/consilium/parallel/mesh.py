"""The processes of a run and the groups that they form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

from consilium.parallel.group import Group, Ledger
from consilium.parallel.part import Sharding, Whole
from consilium.parallel.topology import Topology


@final
@dataclass(frozen=True, slots=True)
class Mesh:
    """What a run knows of its processes; ``ALONE`` is the run of one."""

    topology: Topology = Topology()
    world: Group = Group()
    expert: Group = Group()
    """Among whom experts are dealt."""
    replica: Group = Group()
    """All who hold one copy of the parameters between them."""
    sharding: Sharding = Whole()

    @property
    def first_replica(self) -> bool:
        """Whether what this process has is written by it; other replicas have the same."""
        return self.world.rank < self.replica.size

    @property
    def ledger(self) -> Ledger:
        """What this process has sent to the experts of others."""
        return self.expert.ledger

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise PeerLost for a collective of the backend's own users, such as FSDP, that fails inside."""
        if self.world.watch is None:
            yield
        else:
            with self.world.watch.over():
                yield


ALONE: Final = Mesh()
