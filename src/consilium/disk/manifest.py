"""The list of a folder's files with sizes and SHA-256: it is there: complete; they agree: unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final

from consilium.disk.files import Filesystem
from consilium.errors import ConsiliumError

NAME: Final = "manifest.json"
FORMAT: Final = 1
_LARGEST: Final = 16 * 2**20
Entry = dict[str, int | str]
"""Size and SHA-256 of a file."""
_READ: Final = frozenset({".json", ".safetensors"})
"""Suffixes of files that a loader opens because they are there: an unlisted one could replace another."""


def seal(folder: Path, files: Filesystem, known: Mapping[str, Entry] = MappingProxyType({})) -> None:
    """Make every file of ``folder`` durable, then its manifest, then the names of both.

    ``known`` are the entries of files that another process wrote and has made durable.
    """
    found = list_files(folder)
    entries: dict[str, Entry] = {}
    for name in found:
        entries[name] = known[name] if name in known else entry_of(folder / name, files)
    for name in known:
        _check_size(folder / name, int(entries[name]["bytes"]) if name in entries else 0)
    text = json.dumps({"format": FORMAT, "files": entries}, indent=1)
    files.write(folder / NAME, [text.encode()])
    files.sync_file(folder / NAME)
    for inner in sorted({(folder / name).parent for name in found} | {folder}, reverse=True):
        files.sync_folder(inner)


def entry_of(path: Path, files: Filesystem) -> Entry:
    """What a manifest says of a file, which is durable from now on."""
    files.sync_file(path)
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def check_complete(folder: Path, *, only: Collection[str] | None = None) -> None:
    """Raise ConsiliumError unless every file of the manifest, or of ``only``, is there in its size.

    Names and sizes are all that an interrupted write changes; digests would read everything.
    """
    for name, (size, _) in read_manifest(folder).items():
        if only is None or name in only:
            _check_size(folder / name, size)


def verify(folder: Path, *, only: Iterable[str] | None = None) -> None:
    """Compare ``folder`` with its manifest; ``only`` limits the digests to these names.

    Raises ConsiliumError naming the first file that is missing, truncated, changed or unlisted.
    """
    for fault in faults(folder, only=only):
        raise fault


def faults(
    folder: Path, *, only: Iterable[str] | None = None, read: Callable[[int], None] = lambda count: None
) -> Iterator[ConsiliumError]:
    """Yield what ``verify`` raises, of every file; ``read`` hears of the bytes of each that is done."""
    entries = read_manifest(folder)
    for name in list_files(folder):
        if name not in entries and Path(name).suffix in _READ:
            yield damaged(folder / name, "was not there when this folder was saved", "remove it")
    for name in entries.keys() if only is None else [name for name in only if name in entries]:
        try:
            _verify_file(folder / name, *entries[name])
        except ConsiliumError as error:
            yield error
        read(entries[name][0])


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return ``{name: (bytes, sha256)}``. Raises ConsiliumError where there is none or it makes no sense."""
    path = folder / NAME
    try:
        if path.stat().st_size > _LARGEST:
            raise damaged(path, f"is larger than {_LARGEST} bytes")
        data = json.loads(path.read_bytes())
        if set(data) != {"format", "files"} or data["format"] != FORMAT:
            raise damaged(path, f"is not of format {FORMAT}")
        return {_safe(path, name): _entry(path, entry) for name, entry in data["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise (
            error if isinstance(error, ConsiliumError) else damaged(path, "is not a readable manifest")
        ) from None
    except FileNotFoundError:
        raise damaged(path, "is missing, so the folder is incomplete", "use a complete checkpoint") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})", "check the disk") from None


def list_files(folder: Path) -> list[str]:
    """Names of all files below ``folder`` but the manifest, with forward slashes, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != NAME)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(
    path: Path, what: str, remedy: str = "restore the folder or use an older checkpoint"
) -> ConsiliumError:
    return ConsiliumError(f"{path} {what}; {remedy}.")


def _verify_file(path: Path, size: int, sha256: str) -> None:
    _check_size(path, size)
    try:
        found = digest(path)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})", "check the disk") from None
    if found != sha256:
        raise damaged(
            path,
            "was changed after it was saved (its SHA-256 differs)",
            f"restore it, or delete {NAME} beside it if you changed the file on purpose",
        )


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})", "check the disk") from None
    if actual != size:
        kind = "truncated" if actual < size else "changed"
        raise damaged(path, f"is {kind}: {actual} bytes, and {size} were saved")


def _safe(path: Path, name: str) -> str:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or pure.as_posix() != name:
        raise damaged(path, f"lists {name!r}, which is not a plain name inside the folder")
    return name


def _entry(path: Path, entry: Entry) -> tuple[int, str]:
    size, sha256 = entry["bytes"], entry["sha256"]
    if len(entry) != 2 or type(size) is not int or not isinstance(sha256, str):
        raise damaged(path, "has an entry without a size and a digest")
    return size, sha256
