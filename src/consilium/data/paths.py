"""The user's own text: which files below a path are read, and what each is called."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from consilium.data.documents import Text
from consilium.data.reading import SUFFIXES, read_texts, shown, suffix_of
from consilium.errors import ConsiliumError, closest
from consilium.records.metrics import METRICS_FILE
from consilium.records.run import CONFIG_FILE
from consilium.words.say import say


def _silent(_: str) -> None:
    return


@dataclass(frozen=True, slots=True)
class Found:
    """A file of text below a path."""

    path: Path
    name: str
    """Relative, with forward slashes."""
    domain: str
    """The first folder below the path, else the suffix."""


def found_files(path: Path, report: Callable[[str], None] = _silent) -> list[Found]:
    """Return the files of ``path``, one or those of a folder, by name.

    Linked files and folders are read once, wherever they lie; runs and models below ``path`` are left out and
    told to ``report``. Raises ConsiliumError for what is missing, unreadable or of another kind.
    """
    return [_found(file, _relative(file, path)) for file in _files(path, report)]


def _found(file: Path, relative: Path) -> Found:
    name = Path(shown(relative))
    suffix = (suffix_of(file) or "").lstrip(".").partition(".")[0]
    return Found(file, name.as_posix(), name.parts[0] if len(name.parts) > 1 else suffix)


def path_texts(path: Path, report: Callable[[str], None] = _silent) -> list[Text]:
    """Read all of ``path`` into memory: a text a file or a record, each a unit of the split.

    Raises ConsiliumError for what is missing, empty, binary or malformed.
    """
    texts = [
        text
        for file in found_files(path, report)
        for text in read_texts(file.path, file.name, file.domain)
        if text.text.strip()
    ]
    if not texts:
        raise empty(path)
    return texts


def empty(path: Path) -> ConsiliumError:
    return ConsiliumError(f"data: {path} has no text: all its files are empty; give files with text in them.")


def _files(path: Path, report: Callable[[str], None]) -> list[Path]:
    if not path.exists():
        raise ConsiliumError(f"data: {path} does not exist; give a {_names()} file or a folder of them.")
    if path.is_dir():
        found = sorted(_once(_walk(path, report)))
        if not found:
            raise ConsiliumError(f"data: the folder {path} has no {_names()} file; give one that has.")
        return found
    if suffix_of(path) is None:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise ConsiliumError(
            f"data: {path} {ending}, and only {_names()} files are read; rename or convert it."
            f"{_meant(path.suffix)}"
        )
    return [path]


def _meant(suffix: str) -> str:
    near = closest(suffix, SUFFIXES) if suffix else None
    return f" Did you mean {near!r}?" if near else ""


def _names() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _walk(folder: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """Yield the readable files below ``folder``, leaving out hidden ones, Python's caches, runs and models.

    What is linked comes after what is there, so that a file has its own name where it has one.
    """
    waiting, seen = [folder], {_identity(folder)}
    while waiting:
        parent = waiting.pop()
        for entry in sorted(_entries(parent), key=lambda path: (path.is_symlink(), path.name)):
            if not entry.is_dir():
                if suffix_of(entry) is not None:
                    yield entry
            elif (identity := _identity(entry)) not in seen:
                seen.add(identity)
                if (kind := _other_kind(entry)) is None:
                    waiting.insert(0 if entry.is_symlink() else len(waiting), entry)
                else:
                    report(kind)


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith((".", "__pycache__"))]
    except OSError as error:
        raise ConsiliumError(
            f"data: cannot read the folder {shown(folder)}: {error.strerror}; check its permissions."
        ) from None


def _other_kind(folder: Path) -> str | None:
    """What to say of a folder of ours, or of somebody's model, whose files are no text to train on."""
    if (folder / CONFIG_FILE).is_file() and (folder / METRICS_FILE).is_file():
        return say("{folder} is left out of the text: it is a training run", folder=shown(folder))
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return say("{folder} is left out of the text: it is a model", folder=shown(folder))
    return None


def _once(paths: Iterable[Path]) -> Iterator[Path]:
    """Text that is read twice would be trained on and held out at once."""
    seen: set[tuple[int, int]] = set()
    for path in paths:
        identity = _identity(path)
        if identity not in seen:
            seen.add(identity)
            yield path


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise ConsiliumError(
            f"data: cannot read {shown(path)}: {error.strerror}; restore or remove it."
        ) from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ConsiliumError(f"data: {shown(path)} is neither a file nor a folder; leave it out.")
    return status.st_dev, status.st_ino


def _relative(found: Path, root: Path) -> Path:
    return found.relative_to(root) if root.is_dir() else Path(found.name)
