"""The page in a real browser, whose console has to stay silent."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium")


@contextlib.contextmanager
def command(*words: str, said: str = r"http://\S+(?=/v1)", **options: Any) -> Iterator[str]:
    """The address that ``consilium WORDS`` tells, which ends with this."""
    line = [sys.executable, "-m", "consilium", *words]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, **options) as process:
        assert process.stderr is not None
        told = (re.search(said, line) for line in process.stderr)
        try:
            yield next(found[0] for found in told if found)
        finally:
            process.terminate()


@contextlib.contextmanager
def opened(address: str, *, refused: int | None = None, **options: Any) -> Iterator[Any]:
    """A page at ``address``. Skips where there is no browser; an error on its console is one of the test.

    A browser writes there of every answer that is an error: ``refused`` is the status that the test asks for.
    """
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("there is no chromium")
    faults: list[str] = []
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        found = browser.new_page(**options)
        found.set_default_timeout(60_000)
        found.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        found.on("pageerror", lambda error: faults.append(str(error)))
        found.goto(address)
        yield found
        browser.close()
    assert [fault for fault in faults if f"status of {refused}" not in fault] == []


def picture(page: Any, name: str, folder: Path, *, whole: bool = True) -> None:
    """Keep what is seen where CONSILIUM_SCREENSHOTS says."""
    place = Path(os.environ.get("CONSILIUM_SCREENSHOTS", folder))
    page.screenshot(path=place / f"{name}.png", full_page=whole)


def unnamed(page: Any) -> list[str]:
    """Fields, buttons and pictures in sight that a screen reader has no name for."""
    return page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button, canvas, svg, [role]')].filter("
        "one => one.checkVisibility() && !(one.labels?.length || one.textContent.trim() || one.ariaLabel"
        " || one.getAttribute('aria-labelledby') || ['status', 'log'].includes(one.getAttribute('role'))))"
        ".map(one => one.outerHTML.slice(0, 200))"
    )
