"""Threads: what the process may use, whatever part of the machine its container or job was given."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.machine import processors
from consilium.machine.processors import instructions, threads

OWN = "proc/self/cgroup"
V1 = "sys/fs/cgroup/cpu"
V2 = "sys/fs/cgroup"


@pytest.fixture(autouse=True)
def _eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processors, "affinity", lambda: frozenset(range(8)))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 8),
        ({f"{V2}/cpu.max": "max 100000\n"}, 8),
        ({f"{V2}/cpu.max": "250000 100000\n"}, 2),
        ({f"{V2}/cpu.max": "50000 100000\n"}, 1),
        ({f"{V2}/cpu.max": "1600000 100000\n"}, 8),
        ({OWN: "0::/job/step\n", f"{V2}/job/cpu.max": "300000 100000\n"}, 3),
        (
            {
                OWN: "0::/job/step\n",
                f"{V2}/job/cpu.max": "300000 100000\n",
                f"{V2}/job/step/cpu.max": "max 100000",
            },
            3,
        ),
        ({f"{V1}/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 8),
        ({f"{V1}/cpu.cfs_quota_us": "399999\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 3),
        (
            {
                OWN: "5:cpuacct,cpu:/box\n0::/\n",
                f"{V1}/box/cpu.cfs_quota_us": "200000",
                f"{V1}/box/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        ({OWN: "nonsense\n0::/../..\n", f"{V2}/cpu.max": "\n"}, 8),
        ({f"{V2}/cpu.max": "100000 0\n"}, 8),
    ],
)
def test_a_quota_is_rounded_down_to_whole_processors(
    files: dict[str, str], wanted: int, tmp_path: Path
) -> None:
    assert threads(write(tmp_path, files)) == wanted


def test_two_threads_of_a_core_are_one(tmp_path: Path) -> None:
    siblings = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}\n"
        for n in range(8)
    }
    assert threads(write(tmp_path, siblings)) == 4


@pytest.mark.parametrize(("asked", "wanted"), [("3", 3), ("3,2", 3), ("0", 8), ("many", 8), ("", 8)])
def test_the_variable_of_openmp_is_obeyed(
    asked: str, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads(tmp_path) == wanted


def test_this_process_has_at_least_one() -> None:
    assert 1 <= threads() <= 8


@given(quota=st.integers(1, 10**7), period=st.integers(1, 10**6))
def test_threads_never_exceed_the_quota_nor_fall_to_none(
    quota: int, period: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = threads(write(tmp_path_factory.mktemp("root"), {f"{V2}/cpu.max": f"{quota} {period}"}))
    assert found == max(1, min(8, quota // period))


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("model name : A\nflags\t\t: fpu avx2 amx_tile\n", {"fpu", "avx2", "amx_tile"}),
        ("Features\t: fp asimd\n", set()),
        (None, set()),
    ],
)
def test_instructions_are_those_that_linux_names(told: str | None, found: set[str], tmp_path: Path) -> None:
    if told is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cpuinfo").write_text(told)
    assert instructions(tmp_path) == found
