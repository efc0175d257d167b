"""A group of processes and what it does together, each collective by its name.

A group of one has no backend beneath it: every collective gives back what it got, so that nothing above asks
how many processes there are. Collectives that carry decisions go through CPU memory.

Legend: P processes of the group, S rows that leave, G rows that arrive.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor

from consilium.errors import ConsiliumError
from consilium.parallel.watch import PeerLost, Watch

TOLD: Final = "Every process knows of this."
"""Note of an error that all processes raise: one of them shows it."""
_FINE: Final = "fine"
_MISTAKE: Final = "mistake"
_FAULT: Final = "fault"
_REDUCTIONS: Final = {"sum": dist.ReduceOp.SUM, "maximum": dist.ReduceOp.MAX}

Work = Callable[[], str | None]
"""What a process does before the others go on, and what it has to say to them."""


@final
@dataclass(frozen=True, slots=True)
class Ledger:
    """What the exchange of rows has cost this process, by the name of the collective, one entry a call."""

    sent: dict[str, list[int]] = field(default_factory=dict)
    """Bytes for others."""
    waited: dict[str, list[float]] = field(default_factory=dict)
    """Seconds in which nothing else was done."""

    def add(self, name: str, count: int) -> None:
        self.sent.setdefault(name, []).append(count)

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.waited.setdefault(name, []).append(time.perf_counter() - begun)

    def clear(self) -> None:
        self.sent.clear()
        self.waited.clear()


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Process ``rank`` of ``size``. Frozen; the ledger it writes belongs to whoever made it."""

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None
    watch: Watch | None = None
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Each value added up over the group, all in one message, in the dtypes that they have.

        Added in float64, which holds every integer below 2**53; the order of addition is the backend's, and
        every process gets the same bits.
        """
        return self._reduced("sum", values)

    def largest(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The largest of the group at each place of each value, all in one message."""
        return self._reduced("maximum", values)

    def sum(self, value: Tensor) -> Tensor:
        return self.sums(value)[0]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether any process raised it."""
        if self.handle is None:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        with self._named("agreement"):
            dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.handle)
        return tuple(bool(flag) for flag in raised)

    def of_first(self, number: float) -> float:
        """The number of the process that leads."""
        if self.handle is None:
            return number
        held = torch.tensor([number], dtype=torch.float64)
        with self._named("announcement"):
            dist.broadcast(held, group=self.handle, group_src=0)
        return float(held)

    def texts(self, text: str) -> list[str]:
        """The text of every process, in order of rank."""
        if self.handle is None:
            return [text]
        mine = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._named("comparison"):
            dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self.handle)
            most = max(int(size) for size in sizes)
            held = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(held, torch.cat((mine, mine.new_zeros(most - mine.numel()))), group=self.handle)
        sizes_P = [int(size) - 1 for size in sizes]
        return [bytes(t[:n].tolist()).decode() for t, n in zip(held, sizes_P, strict=True)]

    def joined(self, value: Tensor) -> Tensor:
        """The values of every process, of one shape, one after another along the first axis."""
        if self.handle is None:
            return value
        every = [torch.empty_like(value) for _ in range(self.size)]
        with self._named("gather"):
            dist.all_gather(every, value.contiguous(), group=self.handle)
        return torch.cat(every)

    def led(self, work: Work) -> str:
        """What ``work`` returns in the process that leads; its ConsiliumError is raised in all of them."""
        return self.agreed(work if self.leads else lambda: None)[0]

    def agreed(self, work: Work) -> list[str]:
        """What ``work`` returned in each process. Where one fails all do, with the sentence of the first."""
        if self.handle is None:
            return [work() or ""]
        error: Exception | None = None
        try:
            answer = f"{_FINE}\n{work() or ''}"
        except ConsiliumError as caught:
            error, answer = caught, f"{_MISTAKE}\n{caught}"
        except Exception as caught:  # noqa: BLE001 - raised again below, once the others know of it
            error, answer = caught, f"{_FAULT}\n{type(caught).__name__}: {caught}"
        answers = self.texts(answer)
        if error is not None:
            error.add_note(TOLD)
            raise error
        for rank, told in enumerate(answers):
            kind, _, text = told.partition("\n")
            if kind == _MISTAKE:
                mistake = ConsiliumError(text)
                mistake.add_note(TOLD)
                raise mistake
            if kind == _FAULT:
                raise PeerLost(f"rank {rank} failed: {text}; its own message says more.")
        return [told.partition("\n")[2] for told in answers]

    def exchange(self, packed_SB: Tensor, give: Sequence[int], take: Sequence[int], name: str) -> Exchange:
        """Send ``give[p]`` of the rows to process p and get ``take[p]`` from it, while other work goes on."""
        out_GB = packed_SB.new_empty(sum(take), *packed_SB.shape[1:])
        if self.handle is None:
            return Exchange(self, name, out_GB.copy_(packed_SB), None)
        row = packed_SB[0].numel() * packed_SB.element_size() if packed_SB.shape[0] else 0
        self.ledger.add(name, (sum(give) - give[self.rank]) * row)
        with self._named(name):
            work = dist.all_to_all_single(
                out_GB, packed_SB, list(take), list(give), group=self.handle, async_op=True
            )
        return Exchange(self, name, out_GB, work)

    def counts(self, give_PC: Tensor) -> Tensor:
        """Row p of ``give_PC`` goes to process p; what each has sent here comes back."""
        take_PC = torch.empty_like(give_PC)
        if self.handle is None:
            return take_PC.copy_(give_PC)
        self.ledger.add("counts", give_PC[0].numel() * give_PC.element_size() * (self.size - 1))
        with self._named("counts"), self.ledger.waiting("counts"):
            dist.all_to_all_single(take_PC, give_PC.contiguous(), group=self.handle)
        return take_PC

    def _reduced(self, name: Literal["sum", "maximum"], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.handle is None or not values:
            return values
        flat = torch.cat([value.detach().to("cpu", torch.float64).flatten() for value in values])
        with self._named(name):
            dist.all_reduce(flat, _REDUCTIONS[name], group=self.handle)
        parts = flat.split([value.numel() for value in values])
        return tuple(
            part.view(value.shape).to(value.device, value.dtype)
            for part, value in zip(parts, values, strict=True)
        )

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        if self.watch is None:
            yield
        else:
            with self.watch.over(name):
                yield


@final
@dataclass(frozen=True, slots=True)
class Exchange:
    """Rows on their way."""

    group: Group
    name: str
    rows_GB: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The rows that arrived, those of process 0 first."""
        if self.work is not None:
            named = self.group._named(self.name)  # noqa: SLF001 - the other half of the same collective
            with named, self.group.ledger.waiting(self.name):
                self.work.wait()
        return self.rows_GB
