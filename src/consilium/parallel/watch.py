"""When a process is gone: who does not answer, and in which collective the others noticed.

The backend tells that a connection broke, or that the time is up, but not who is at fault. Each process that
notices leaves a word in the store through which the group was made; who has left none after a moment is
missing.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from consilium.machine.process import identity, is_gone

GRACE: Final = 1.5
"""Seconds in which the others may leave their word."""
_BACKENDS: Final = ("distributed_c10d.py", "_functional_collectives.py")


class PeerLost(Exception):
    """A process of the group is gone or does not answer. Nothing that needs the group can go on."""


@final
@dataclass(frozen=True, slots=True)
class Watch:
    """Turns what the backend raises into a sentence that names rank and collective."""

    store: Store
    rank: int
    members: tuple[int, ...]
    """Ranks of the group, this one among them."""
    world: int
    """Processes of the run."""

    @contextlib.contextmanager
    def over(self, name: str | None = None) -> Iterator[None]:
        """Raise PeerLost for a failed collective inside; its name is found where ``name`` is None."""
        try:
            yield
        except RuntimeError as error:
            what = name or _collective(error)
            if what is None:
                raise
            missing = self._missing(what)
            who = f"rank {', '.join(map(str, missing))}" if missing else "another process"
            raise PeerLost(
                f"{who} did not answer in the collective '{what}', so rank {self.rank} stops:"
                f" {str(error).strip().splitlines()[0][:200]}"
            ) from error

    def introduce(self) -> None:
        """Say in the store which process this rank is."""
        self.store.set(f"process/{self.rank}", identity())

    def _missing(self, what: str) -> list[int]:
        """Ranks that leave no word within the grace; of these the ones known to be gone, where some are.

        Where all of this group have left one, they waited for somebody outside: for who is known to be gone.
        """
        until = time.monotonic() + GRACE
        with contextlib.suppress(RuntimeError):  # the store lived in a process that is gone
            self.store.set(f"left/{self.rank}", what)
        silent = self._silent(self.members, until)
        try:
            suspects = silent or self._silent(range(self.world), time.monotonic())
            gone = [rank for rank in suspects if is_gone(self.store.get(f"process/{rank}").decode())]
        except RuntimeError:
            return silent
        return gone or silent

    def _silent(self, ranks: Sequence[int], until: float) -> list[int]:
        """The others of ``ranks`` that have left no word at the time ``until``, or all where none is kept."""
        silent = [rank for rank in ranks if rank != self.rank]
        with contextlib.suppress(RuntimeError):
            while silent := [rank for rank in silent if not self.store.check([f"left/{rank}"])]:
                if time.monotonic() > until:
                    break
                time.sleep(0.05)
        return silent


def _collective(error: BaseException) -> str | None:
    """The collective that raised ``error``, such as one of FSDP's; None where none did."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [frame.name for frame in frames if frame.filename.endswith(_BACKENDS)]
    named = next((name for name in reversed(names) if name != "wrapper"), None)
    return named or ("wait" if isinstance(error, dist.DistError) else None)
