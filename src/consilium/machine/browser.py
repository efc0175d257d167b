"""The browser of whoever sits at this machine, if there is one."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import webbrowser
from collections.abc import Mapping


def has_screen(platform: str = sys.platform, settings: Mapping[str, str] = os.environ) -> bool:
    """Whether a window can open; without one, a browser of text would take the terminal from us."""
    if platform in {"win32", "darwin"}:
        return True
    return bool(settings.get("DISPLAY") or settings.get("WAYLAND_DISPLAY") or settings.get("BROWSER"))


def show(place: str) -> None:
    """Open a browser where there is one; never waits, never fails."""
    if has_screen():
        threading.Thread(target=_open, args=(place,), daemon=True).start()


def _open(place: str) -> None:
    # The address is told as well, and whoever wants it opens it.
    with contextlib.suppress(Exception):
        webbrowser.open(place)
