"""The processors of this machine, and how many of them this process can use."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from consilium.machine import groups
from consilium.machine.groups import ROOT, read


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    return _told("model name", ROOT) or platform.processor() or platform.machine()


def instructions(root: Path = ROOT) -> frozenset[str]:
    """Sets of instructions that the processor and the system have, by Linux's names; none elsewhere."""
    return frozenset(_told("flags", root).split())


def _told(key: str, root: Path) -> str:
    for line in read(root / "proc/cpuinfo").splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return ""


def threads(root: Path = ROOT) -> int:
    """Threads to compute with: of OMP_NUM_THREADS, or as many as have a core of their own here."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) else usable(root)


def usable(root: Path = ROOT) -> int:
    """Cores for this process: more threads wait for each other.

    The least of the processors that it may run on, the whole processors in the quota of its control groups,
    and the physical cores among them.
    """
    allowed = affinity()
    return max(1, min([len(allowed), len(_cores(allowed, root)), *map(int, _quotas(root))]))


def affinity() -> frozenset[int]:
    """The processors that this process may run on."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows bind nobody
        return frozenset(range(os.cpu_count() or 1))


def _cores(processors: frozenset[int], root: Path) -> frozenset[str]:
    """Physical cores of ``processors``; each is one where the system does not say."""
    folder = root / "sys/devices/system/cpu"
    return frozenset(
        read(folder / f"cpu{number}/topology/thread_siblings_list").strip() or str(number)
        for number in processors
    )


def _quotas(root: Path) -> Iterator[float]:
    """Processors in the quota of each group of this process: ``200000 100000`` are two, ``max`` is none."""
    for folder in groups.folders("cpu", root):
        quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
        text = f"{quota} {period}" if quota else read(folder / "cpu.max")
        numbers = text.split()
        if len(numbers) == 2 and all(map(str.isdecimal, numbers)) and int(numbers[1]):
            yield int(numbers[0]) / int(numbers[1])
