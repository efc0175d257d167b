"""A folder appears complete or not at all, and an old one goes only after the new one is durable.

Order of a commit: write ``NAME.tmp-*``, fsync every file, write and fsync the manifest, fsync the folder,
rename to ``NAME``, fsync the parent. The rename is the commit point. One process at a time writes below a
parent.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

from consilium.disk.files import DISK, Filesystem, make_parents, remove_tree, write_failure
from consilium.disk.manifest import NAME, list_files, read_manifest, seal, verify
from consilium.errors import ConsiliumError

_STEP: Final = re.compile(r"step-(\d{1,18})")
_LEFTOVER: Final = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{16}")


def commit_folder(destination: Path, write: Callable[[Path], None], *, files: Filesystem = DISK) -> None:
    """Let ``write`` fill a temporary folder, then make it ``destination`` in one step.

    A folder saved there before is replaced; after a crash it or the new one is complete. A folder with
    anything else in it is refused. Raises ConsiliumError in one sentence on no space, no permission or a
    failing disk.
    """
    destination = destination.resolve()
    try:
        _refuse_foreign(destination)
        make_parents(destination.parent, files)
        _clear(destination.parent, destination.name, files)
        _write_and_publish(destination, write, files)
    except OSError as error:
        raise write_failure(error, destination) from error


def sweep(parent: Path, *, files: Filesystem = DISK) -> list[Path]:
    """Remove what interrupted saves left below ``parent``, put back what they had moved; return the names."""
    try:
        return _clear(parent, None, files) if parent.is_dir() else []
    except OSError as error:
        raise write_failure(error, parent) from error


def recover(destination: Path, *, files: Filesystem = DISK) -> None:
    """Put ``destination`` back if a crash between the two renames of a replacement left it moved aside."""
    destination = destination.resolve()
    try:
        if not destination.exists() and destination.parent.is_dir():
            for path, match in _leftovers(destination.parent):
                if match["kind"] == "old" and match["name"] == destination.name:
                    files.rename(path, destination)
                    files.sync_folder(destination.parent)
                    return
    except OSError as error:
        raise write_failure(error, destination) from error


def steps(parent: Path) -> list[tuple[int, Path]]:
    """``step-N`` folders below ``parent`` in rising N, complete or not."""
    if not parent.is_dir():
        return []
    found = (
        (match, path) for path in parent.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()
    )
    return sorted((int(match[1]), path) for match, path in found)


def latest(
    parent: Path, *, fall_back: bool = False, notice: Callable[[str], None] = lambda sentence: None
) -> Path | None:
    """Return the newest complete and unchanged ``step-N`` below ``parent``, or None.

    A folder without a manifest was never finished here: it is skipped and ``notice`` is told. A folder whose
    files differ from its manifest is an error that names the file; with ``fall_back`` it is skipped with a
    notice.
    """
    for _, path in reversed(steps(parent)):
        if not (path / NAME).exists():
            notice(f"{path} is incomplete (no {NAME}); skipped.")
            continue
        try:
            verify(path)
        except ConsiliumError as error:
            if not fall_back:
                raise _with_older(error, parent, path) from None
            notice(f"{error} Skipped.")
            continue
        return path
    return None


def _with_older(error: ConsiliumError, parent: Path, damaged: Path) -> ConsiliumError:
    """The same, with the name of a checkpoint that may be used instead."""
    whole = [path for _, path in steps(parent) if path != damaged and _is_whole(path)]
    return ConsiliumError(f"{error} {whole[-1]} is an older one.") if whole else error


def prune(parent: Path, keep: int, *, current: Path | None = None, files: Filesystem = DISK) -> None:
    """Remove all but the ``keep`` newest complete ``step-N``; ``current``, just saved, always stays.

    A folder loses its name before its files, so that a crash never leaves a ``step-N`` with some of them.
    """
    assert keep >= 1, keep
    complete = [path for _, path in steps(parent) if _is_whole(path)]
    try:
        for path in complete[:-keep]:
            if current is None or path.resolve() != current.resolve():
                gone = _beside(path, "tmp")
                files.rename(path, gone)
                files.sync_folder(path.parent)
                remove_tree(gone, files)
    except OSError as error:
        raise write_failure(error, parent) from error


def _write_and_publish(destination: Path, write: Callable[[Path], None], files: Filesystem) -> None:
    staged = _beside(destination, "tmp")
    try:
        files.make_folder(staged)
        write(staged)
        seal(staged, files)
        _publish(staged, destination, files)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(staged, files)
        raise


def _publish(staged: Path, destination: Path, files: Filesystem) -> None:
    if not destination.exists():
        files.rename(staged, destination)
        files.sync_folder(destination.parent)
        return
    aside = _beside(destination, "old")
    files.rename(destination, aside)
    try:
        files.rename(staged, destination)
    except OSError:
        files.rename(aside, destination)
        raise
    files.sync_folder(destination.parent)
    remove_tree(aside, files)


def _clear(parent: Path, name: str | None, files: Filesystem) -> list[Path]:
    """Undo what saves of ``name`` (of anything, where None) left below ``parent``; return what went."""
    cleared: list[Path] = []
    for path, match in _leftovers(parent):
        if name is None or match["name"] == name:
            original = parent / match["name"]
            if match["kind"] == "old" and not original.exists():
                files.rename(path, original)
                files.sync_folder(parent)
            else:
                remove_tree(path, files)
            cleared.append(path)
    return cleared


def _leftovers(parent: Path) -> list[tuple[Path, re.Match[str]]]:
    return [
        (path, match)
        for path in sorted(parent.iterdir())
        if (match := _LEFTOVER.fullmatch(path.name)) and path.is_dir()
    ]


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(8)}")


def _is_whole(folder: Path) -> bool:
    """Complete by names and sizes; digests would make every save read all older ones."""
    try:
        entries = read_manifest(folder)
        return all((folder / name).stat().st_size == size for name, (size, _) in entries.items())
    except (ConsiliumError, OSError):
        return False


def _refuse_foreign(destination: Path) -> None:
    """Replacing a folder deletes it, so it must hold nothing but what a save wrote.

    A ``step-N`` is ours by its name: a damaged one must not block the step that writes it anew.
    """
    if not destination.exists() or (_STEP.fullmatch(destination.name) and destination.is_dir()):
        return
    if not destination.is_dir():
        raise ConsiliumError(f"cannot save to {destination}: it is a file; give the name of a new folder.")
    known = read_manifest(destination) if (destination / NAME).exists() else {}
    foreign = [name for name in list_files(destination) if name not in known]
    if foreign:
        raise ConsiliumError(
            f"cannot save to {destination}: it holds files that no save wrote ({', '.join(foreign[:3])});"
            " give a new or empty folder."
        )
