"""Control groups of Linux: what a container or a job is limited to, in version 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")
_GROUPS: Final = "sys/fs/cgroup"


def folders(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Folders of the groups above this process, outermost first: ``controller``'s, then version 2's."""
    text = read(root / "proc/self/cgroup")
    lines = (line.split(":", 2) for line in text.splitlines() if line.count(":") > 1)
    own = {name: path for _, names, path in lines for name in names.split(",")}
    yield from _along(root / _GROUPS / controller, own.get(controller, ""))
    yield from _along(root / _GROUPS, own.get("", ""))


def read(path: Path) -> str:
    """The text of a file of the system, empty where there is none."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _along(top: Path, group: str) -> Iterator[Path]:
    yield top
    for part in group.split("/"):
        if part not in {"", ".."}:
            top /= part
            yield top
