"""Disk, memory and system fail in one sentence; a fault of ours keeps its traceback and asks for a report."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from consilium.cli.failures import failure_text
from consilium.cli.main import main


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def arguments(_: ArgumentParser) -> None:
        pass

    def act(_: Namespace) -> int:
        raise error

    monkeypatch.setitem(sys.modules, "consilium.cli.bench", SimpleNamespace(arguments=arguments, run=act))


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_is_one_sentence(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if number in {errno.EPIPE, errno.ESHUTDOWN}:
        pytest.skip("a reader that left, which is no error")
    failing(monkeypatch, OSError(number, os.strerror(number), "some/file"))
    assert main(["bench"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "; " in shown.err or ": " in shown.err


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), ["a/b: no space left", "free some"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["no space left", "free some"]),
        (PermissionError(errno.EACCES, "Permission denied", b"a\xff"), ["permission denied", "permissions"]),
        (OSError(errno.EXDEV, "Cross-device link", "a", None, "b"), ["a to b: cross-device link"]),
        (OSError("odd"), ["odd; check the disk"]),
        (TimeoutError(), ["TimeoutError".lower()]),
        (MemoryError(), ["out of memory: close other programs"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ["out of memory"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), ["20.00 GiB more"]),
    ],
)
def test_the_sentence_says_what_and_what_to_do(
    error: BaseException,
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch, error)
    assert main(["bench"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in parts:
        assert part in shown.err


def test_an_allocation_that_torch_refuses_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    text = failure_text(caught.value)
    assert text is not None
    assert "out of memory (1048576.00 GiB more were asked for)" in text


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("ours"), RecursionError("deep")])
def test_a_fault_of_ours_asks_for_a_report(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        main(["bench"])
    assert "please report it" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_without_standard_error_nothing_goes_to_standard_output(closed: str) -> None:
    if "full" in closed and not Path("/dev/full").exists():
        pytest.skip("no device here that is always full")
    shell = f"exec {sys.executable} -m consilium plan lama {closed}"
    done = subprocess.run(["sh", "-c", shell], stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout == ""
