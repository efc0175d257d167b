from __future__ import annotations

import sys
from pathlib import Path

import pytest

import consilium as cs
from consilium.machine import memory
from consilium.machine.memory import free_memory, memory_limit, physical_memory, refuse_beyond_memory

FILES = {
    "meminfo": "proc/meminfo",
    "own": "proc/self/cgroup",
    "v2": "sys/fs/cgroup/memory.max",
    "job": "sys/fs/cgroup/jobs/mine/memory.max",
    "v1": "sys/fs/cgroup/memory/memory.limit_in_bytes",
}


def machine(folder: Path, **files: str) -> Path:
    """A folder that looks like the root of a Linux system."""
    for name, content in files.items():
        path = folder / FILES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_swap_counts_and_a_container_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "physical_memory", lambda: 8_000)
    assert memory_limit(machine(tmp_path, meminfo="MemTotal: 7 kB\nSwapTotal:     2 kB\n")) == 10_048
    assert memory_limit(machine(tmp_path, v2="max\n")) == 10_048
    assert memory_limit(machine(tmp_path, v1="9223372036854771712\n")) == 10_048
    assert memory_limit(machine(tmp_path, v2="5000\n")) == 5_000
    assert memory_limit(machine(tmp_path, job="4000\n")) == 5_000
    assert memory_limit(machine(tmp_path, own="3:cpu:/x\n0::/jobs/mine\n")) == 4_000
    assert memory_limit(machine(tmp_path, own="0::/../../jobs/mine\n")) == 4_000


def test_a_system_that_does_not_say_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_limit(tmp_path) is None
    assert memory_limit(machine(tmp_path, meminfo="")) is None
    assert free_memory(machine(tmp_path, meminfo="MemAvailable: 3 kB\nSwapTotal: 2 kB\n")) == 3072
    assert free_memory(machine(tmp_path, meminfo="")) == physical_memory()
    monkeypatch.setattr(memory, "memory_limit", lambda: None)
    refuse_beyond_memory(2**80, "it", "no")


def test_exactly_what_there_is_is_not_too_much() -> None:
    refuse_beyond_memory(2**30, "it", "no", limit=2**30)
    with pytest.raises(cs.ConsiliumError, match=r"it needs 1\.0 GiB .*there are 1\.0 GiB here; buy some\."):
        refuse_beyond_memory(2**30 + 1, "it", "buy some", limit=2**30)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much there can be")
def test_this_machine_has_some() -> None:
    assert physical_memory() > 2**30
    limit = memory_limit()
    assert limit is not None
    assert limit > 2**28


def test_the_largest_models_are_refused_before_they_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 2**36)
    config = cs.recipe("deepseek-v3", size="671b")
    with pytest.raises(cs.ConsiliumError, match=r"deepseek-v3 with 68\d,\d+,\d+,\d+ parameters in float32"):
        cs.build(config)
    assert cs.build(config, device="meta").embed.weight.is_meta
