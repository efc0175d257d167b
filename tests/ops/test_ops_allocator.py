from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consilium.machine.allocator import huge

GLIBC = platform.libc_ver()[0] == "glibc"

SCRIPT = """
import resource, sys
import torch
from consilium.machine.allocator import keep_memory

if sys.argv[1] == "late":
    torch.zeros(1)
kept = keep_memory() if sys.argv[1] != "never" else None

def faults_of_one_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_one_block()
print(kept, min(faults_of_one_block() for _ in range(3)), max(faults_of_one_block() for _ in range(3)))
"""


def python(command: list[str]) -> str:
    """What a new process prints that has not inherited the setting from a command run in this one."""
    inherited = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=inherited)
    return done.stdout


def run(when: str) -> tuple[str, int, int]:
    command = [sys.executable, "-c", SCRIPT, when]
    printed = python(command).split()
    return printed[0], int(printed[1]), int(printed[2])


@pytest.mark.skipif(not GLIBC, reason="glibc only")
def test_kept_memory_is_reused_without_page_faults() -> None:
    _, least_without, _ = run("never")
    kept, _, most_with = run("first")
    assert kept == "True"
    assert most_with < least_without / 10


@pytest.mark.skipif(not GLIBC, reason="glibc only")
def test_too_late_changes_nothing() -> None:
    kept, *_ = run("late")
    assert kept == "False"


def test_elsewhere_it_is_a_no_op() -> None:
    script = (
        "import os, platform; platform.libc_ver = lambda: ('', '');"
        "from consilium.machine.allocator import keep_memory;"
        "print(keep_memory(), 'THP_MEM_ALLOC_ENABLE' in os.environ)"
    )
    assert python([sys.executable, "-c", script]).split() == ["False", "False"]


@pytest.mark.skipif(platform.system() != "Linux", reason="Linux only")
def test_huge_pages_are_asked_for_and_values_stay() -> None:
    values = huge(torch.empty(16 << 20, dtype=torch.uint8))
    values.fill_(3)
    place, inside, asked = values.data_ptr() + (4 << 20), False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (first := line.split()[0]) and not first.endswith(":"):
            begin, end = (int(edge, 16) for edge in first.split("-"))
            inside = begin <= place < end
        elif line.startswith("VmFlags:") and inside:
            asked.append("hg" in line.split())
    assert asked == [True]
    assert (values == 3).all()


def test_small_values_and_other_devices_are_left_alone() -> None:
    assert huge(torch.zeros(5)).tolist() == [0.0] * 5
    assert huge(torch.empty(64 << 20, device="meta")).is_meta
