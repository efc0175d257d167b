"""The page of a training run, in a process of its own that ends with the training."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from consilium.cli.installed import check_installed
from consilium.errors import ConsiliumError
from consilium.machine.browser import show
from consilium.words.say import say

SECONDS: Final = 20.0
"""In which it has to tell its address."""


@contextlib.contextmanager
def page_of(run: Path, tell: Callable[[str], None]) -> Generator[None, None, None]:
    """Show ``run``, and those beside it, meanwhile. Where that cannot be, ``tell`` hears why, and no more."""
    try:
        check_installed("train --open")
        process = _started(run.parent)
    except (ConsiliumError, OSError) as error:
        tell(say("no page of this run: {why}", why=str(error).removesuffix(".")))
        yield
        return
    try:
        place = _told(process)
        if place is None:
            tell(say("no page of this run: {why}", why=say("its process told no address")))
        else:
            place = f"{place}#train/{quote(run.name)}"
            tell(say("page       {place}", place=place))
            show(place)
        yield
    finally:
        _end(process)


def _started(folder: Path) -> subprocess.Popen[bytes]:
    """It ends when its standard input does, and so with this process, however that ends."""
    command = [sys.executable, "-m", "consilium", "runs", str(folder), "--open", "--until-closed"]
    return subprocess.Popen(  # noqa: S603 - our own command
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for the training, which saves and may take its time
    )


def _told(process: subprocess.Popen[bytes]) -> str | None:
    """Its first line; None where none comes."""
    late = threading.Timer(SECONDS, process.kill)
    late.start()
    try:
        assert process.stdout is not None, "it is a pipe"
        return process.stdout.readline().decode(errors="replace").strip() or None
    finally:
        late.cancel()


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None, "it is a pipe"
        with contextlib.suppress(OSError):
            pipe.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
