"""A file or a folder appears complete or not at all, and an old one goes only after the new one is durable.

Order of a commit: write ``.NAME.tmp-*`` beside the destination, fsync every file, in a folder write and fsync
the manifest and fsync the folder, rename to ``NAME``, fsync the parent. The rename is the commit point.
Readers change nothing: only who writes a name, and who calls ``sweep``, clears what a crash left. One process
at a time writes a name, and another is refused; a folder that several share is written under ``disk.lock``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final

from consilium.disk.files import DISK, Filesystem, make_parents, remove_tree, write_failure
from consilium.disk.lock import filling, is_filled
from consilium.disk.manifest import NAME, Entry, check_complete, read_manifest, seal, verify
from consilium.errors import ConsiliumError

_STEP: Final = re.compile(r"step-(\d{1,18})")
_LEFTOVER: Final = re.compile(r"\.?(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{16}")

Notice = Callable[[str], None]
Check = Callable[[Path], None]


def commit_file(
    destination: Path, write: Callable[[Path], None], *, new: bool = False, files: Filesystem = DISK
) -> None:
    """Let ``write`` make a temporary file, then make it ``destination`` in one step.

    A file there is replaced, with ``new`` refused. Raises ConsiliumError in one sentence on no space, no
    permission, a failing disk, or anything but a file in the way.
    """
    destination = destination.resolve()
    try:
        refuse_in_saved(destination)
        _refuse_in_the_way(destination, new=new)
        make_parents(destination.parent, files)
        _clear(destination.parent, destination.name, files)
        with _staged(destination, files) as staged:
            write(staged)
            files.sync_file(staged)
            _refuse_in_the_way(destination, new=new)
            files.rename(staged, destination)
        files.sync_folder(destination.parent)
    except OSError as error:
        raise write_failure(error, destination) from error


def check_place(destination: Path) -> None:
    """Raise ConsiliumError for what is in the way, as ``commit_file`` would, before anything is written."""
    _refuse_in_the_way(destination.resolve(), new=False)


def write_file(destination: Path, content: bytes, *, files: Filesystem = DISK) -> None:
    """Replace ``destination`` by ``content`` whole or not at all; errors are those of ``commit_file``."""
    commit_file(destination, lambda staged: files.write(staged, [content]), files=files)


def commit_folder(
    destination: Path,
    write: Callable[[Path], None],
    *,
    unless: Collection[str] = (),
    files: Filesystem = DISK,
) -> None:
    """Let ``write`` fill a temporary folder, then make it ``destination`` in one step.

    An empty folder is replaced, and one that is unchanged since it was committed here, unless it holds a file
    named in ``unless``; after a crash it or the new one is complete. Any other is refused. Raises
    ConsiliumError in one sentence on no space, no permission or a failing disk.
    """
    with staging(destination, unless=unless, files=files) as staged:
        try:
            write(staged)
        except OSError as error:
            raise write_failure(error, destination.resolve()) from error
        publish(staged, destination, files=files)


@contextlib.contextmanager
def staging(destination: Path, *, unless: Collection[str] = (), files: Filesystem = DISK) -> Iterator[Path]:
    """A temporary folder for what will be ``destination``; gone again where anything fails."""
    destination = destination.resolve()
    try:
        refuse_in_saved(destination)
        _refuse_foreign(destination, unless)
        make_parents(destination.parent, files)
        _clear(destination.parent, destination.name, files)
    except OSError as error:
        raise write_failure(error, destination) from error
    with _staged(destination, files) as staged:
        try:
            files.make_folder(staged)
        except OSError as error:
            raise write_failure(error, destination) from error
        with filling(staged):
            yield staged


def publish(
    staged: Path,
    destination: Path,
    *,
    known: Mapping[str, Entry] = MappingProxyType({}),
    files: Filesystem = DISK,
) -> None:
    """Seal ``staged`` and make it ``destination``. ``known`` files were made durable by who wrote them."""
    destination = destination.resolve()
    try:
        seal(staged, files, known)
        _publish(staged, destination, files)
    except OSError as error:
        raise write_failure(error, destination) from error


def sweep(parent: Path, *, files: Filesystem = DISK) -> list[Path]:
    """Remove what interrupted writes left below ``parent``, put back what they had moved; return the names.

    Only for who alone writes there.
    """
    try:
        return _clear(parent, None, files) if parent.is_dir() else []
    except OSError as error:
        raise write_failure(error, parent) from error


def remove(path: Path, *, files: Filesystem = DISK) -> None:
    """Remove a file or a folder; it loses its name before its files, so that a crash never leaves a part."""
    gone = _beside(path, "tmp")
    try:
        files.rename(path, gone)
        files.sync_folder(path.parent)
        remove_tree(gone, files)
    except OSError as error:
        raise write_failure(error, path) from error


def standing(destination: Path) -> Path:
    """Return where ``destination`` is to be read: a crash in its replacement may have left it moved aside."""
    there = destination.resolve()
    if not there.exists() and there.parent.is_dir():
        for path, match in _leftovers(there.parent):
            if match["kind"] == "old" and match["name"] == there.name:
                return path
    return destination


def steps(parent: Path) -> list[tuple[int, Path]]:
    """``step-N`` folders below ``parent`` in rising N, complete or not, each where it is to be read."""
    if not parent.is_dir():
        return []
    names = {path.name for path in parent.iterdir()} | {match["name"] for _, match in _leftovers(parent)}
    found = ((match, standing(parent / name)) for name in names if (match := _STEP.fullmatch(name)))
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def latest(
    parent: Path,
    *,
    check: Check = check_complete,
    notice: Notice = lambda sentence: None,
) -> Path | None:
    """Return the newest ``step-N`` below ``parent`` that is whole, or None where there is no such folder.

    ``check`` raises ConsiliumError for one that is not: ``check_complete`` compares names and sizes,
    ``manifest.verify`` every byte. What is skipped is told to ``notice`` and stays as it is. Raises
    ConsiliumError where there are some and none is whole: nothing must start anew over them unasked.
    """
    skipped: list[str] = []
    for _, path in reversed(steps(parent)):
        try:
            check(path)
        except ConsiliumError as error:
            skipped.append(str(error))
            continue
        for sentence in skipped:
            notice(f"{sentence} Skipped: {path.name} is the newest whole one.")
        return path
    if skipped:
        raise ConsiliumError(f"no checkpoint in {parent} is complete and unchanged: {skipped[0]}")
    return None


def is_whole(folder: Path, check: Check = check_complete) -> bool:
    """Whether ``folder`` is there and complete; ``check`` as in ``latest``."""
    try:
        check(folder)
    except ConsiliumError:
        return False
    return True


def set_aside(folder: Path, *, files: Filesystem = DISK) -> Path:
    """Give a damaged ``folder`` another name, which nothing here ever deletes, and return it."""
    ends = itertools.chain([""], (f"-{number}" for number in itertools.count(1)))
    names = (folder.with_name(f"{folder.name}.damaged{end}") for end in ends)
    aside = next(path for path in names if not path.exists())
    try:
        files.rename(folder, aside)
        files.sync_folder(folder.parent)
    except OSError as error:
        raise write_failure(error, folder) from error
    return aside


def prune(parent: Path, keep: int, *, current: Path | None = None, files: Filesystem = DISK) -> None:
    """Remove all but the ``keep`` newest complete ``step-N``; ``current``, just saved, always stays."""
    assert keep >= 1, keep
    complete = [path for _, path in steps(parent) if is_whole(path)]
    for path in complete[:-keep]:
        if current is None or path.resolve() != current.resolve():
            remove(path, files=files)


@contextlib.contextmanager
def _staged(destination: Path, files: Filesystem) -> Iterator[Path]:
    """A name beside ``destination`` that is gone again where anything fails."""
    staged = _beside(destination, "tmp")
    try:
        yield staged
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
    """Undo what writes of ``name`` (of anything, where None) left below ``parent``; return what went."""
    cleared: list[Path] = []
    for path, match in _leftovers(parent):
        if name is None or match["name"] == name:
            original = parent / match["name"]
            if is_filled(path):
                if name is None:
                    continue
                raise ConsiliumError(
                    f"cannot save to {original}: another process is writing it now; wait for it, or give"
                    " another name."
                )
            if match["kind"] == "old" and not original.exists():
                files.rename(path, original)
                files.sync_folder(parent)
            else:
                remove_tree(path, files)
            cleared.append(path)
    return cleared


def _leftovers(parent: Path) -> list[tuple[Path, re.Match[str]]]:
    return [(path, match) for path in sorted(parent.iterdir()) if (match := _LEFTOVER.fullmatch(path.name))]


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(8)}")


def _refuse_in_the_way(destination: Path, *, new: bool) -> None:
    if destination.exists() and (new or not destination.is_file()):
        what = "there is a file already" if destination.is_file() else "there is something that is no file"
        raise ConsiliumError(f"cannot save to {destination}: {what}; remove it or give another name.")


def refuse_in_saved(destination: Path) -> None:
    """Raise ConsiliumError in a folder committed here, which would no longer be what its manifest says."""
    for above in destination.parents:
        if (above / NAME).is_file():
            with contextlib.suppress(ConsiliumError):  # somebody else's file of that name
                read_manifest(above)
                break
    else:
        return
    raise ConsiliumError(
        f"cannot save to {destination}: it lies inside {above}, which would no longer be what was saved;"
        " choose a place outside."
    )


def _refuse_foreign(destination: Path, unless: Collection[str]) -> None:
    """Replacing a folder deletes it, so it must hold nothing but what was committed here, as it was."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise ConsiliumError(f"cannot save to {destination}: it is a file; give the name of a new folder.")
    why = _worth_keeping(destination, unless)
    if why is not None:
        raise ConsiliumError(f"cannot save to {destination}: {why}; give a new or empty folder.")


def _worth_keeping(folder: Path, unless: Collection[str]) -> str | None:
    """Why ``folder`` must not be replaced, if anything in it speaks against it."""
    known: Collection[str] = ()
    with contextlib.suppress(ConsiliumError):
        known = read_manifest(folder).keys()
    ours = {NAME, *known, *(str(above) for name in known for above in PurePosixPath(name).parents)}
    if foreign := list(itertools.islice(_others(folder, ours if known else ()), 3)):
        return f"it holds files that no save wrote ({', '.join(foreign)})"
    precious = [name for name in known if name in unless]
    if precious:
        return f"it is a checkpoint that training can go on from ({precious[0]})"
    try:
        if known:
            verify(folder)
    except ConsiliumError as error:
        return f"it is not as it was saved ({str(error).removesuffix('.')})"
    return None


def _others(folder: Path, ours: Collection[str]) -> Iterator[str]:
    """What is in ``folder`` beside ``ours``, as it is met: there may be a whole disk of it."""
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        for name in sorted([*folders, *names]):
            if (inside / name).as_posix() not in ours:
                yield (inside / name).as_posix()
        folders[:] = sorted(name for name in folders if (inside / name).as_posix() in ours)
