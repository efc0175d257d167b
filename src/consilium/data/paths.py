"""The user's own text: .txt, .md, .py and .jsonl files, or a folder of them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from consilium.data.documents import Text
from consilium.errors import ConsiliumError, nearest
from consilium.records.metrics import METRICS_FILE
from consilium.records.run import CONFIG_FILE

SUFFIXES = (".txt", ".md", ".py", ".jsonl")


def _silent(_: str) -> None:
    return


def path_texts(path: Path, report: Callable[[str], None] = _silent) -> list[Text]:
    """Read ``path``: a text a file, or a record of a .jsonl file; each is a unit of the split.

    The domain is a record's own ``domain``, else the first folder below ``path``, else the suffix. Linked
    files and folders are read once, wherever they lie; runs and models below ``path`` are left out and told
    to ``report``. Raises ConsiliumError for what is missing, empty, binary or malformed.
    """
    texts = [
        text
        for found in _files(path, report)
        for text in _read(found, _relative(found, path))
        if text.text.strip()
    ]
    if not texts:
        raise ConsiliumError(
            f"data: {path} has no text: all its files are empty; give files with text in them."
        )
    return texts


def _files(path: Path, report: Callable[[str], None]) -> list[Path]:
    if not path.exists():
        raise ConsiliumError(f"data: {path} does not exist; give a {_names()} file or a folder of them.")
    if path.is_dir():
        found = sorted(_once(_walk(path, report)))
        if not found:
            raise ConsiliumError(f"data: the folder {path} has no {_names()} file; give one that has.")
        return found
    if path.suffix.lower() not in SUFFIXES:
        raise ConsiliumError(
            f"data: {path} ends in {path.suffix or 'nothing'!r}, and only {_names()} files are read;"
            f" rename or convert it.{nearest(path.suffix, SUFFIXES) if path.suffix else ''}"
        )
    return [path]


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
                if entry.suffix.lower() in SUFFIXES:
                    yield entry
            elif (identity := _identity(entry)) not in seen:
                seen.add(identity)
                if (kind := _other_kind(entry)) is None:
                    waiting.insert(0 if entry.is_symlink() else len(waiting), entry)
                else:
                    report(f"{_shown(entry)} is left out of the text: it is {kind}")


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith((".", "__pycache__"))]
    except OSError as error:
        raise ConsiliumError(
            f"data: cannot read the folder {_shown(folder)}: {error.strerror}; check its permissions."
        ) from None


def _other_kind(folder: Path) -> str | None:
    """What a folder of ours, or of somebody's model, is: its files are no text to train on."""
    if (folder / CONFIG_FILE).is_file() and (folder / METRICS_FILE).is_file():
        return "a training run"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "a model"
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
            f"data: cannot read {_shown(path)}: {error.strerror}; restore or remove it."
        ) from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ConsiliumError(f"data: {_shown(path)} is neither a file nor a folder; leave it out.")
    return status.st_dev, status.st_ino


def _shown(path: Path) -> str:
    """A name in any bytes as text."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _relative(found: Path, root: Path) -> Path:
    return found.relative_to(root) if root.is_dir() else Path(found.name)


def _read(path: Path, relative: Path) -> list[Text]:
    name = Path(_shown(relative))
    suffix = path.suffix.lower()
    domain = name.parts[0] if len(name.parts) > 1 else suffix.removeprefix(".")
    content = _decode(path)
    if suffix == ".jsonl":
        return list(_records(path, content, name.as_posix(), domain))
    return [Text(content, domain, name.as_posix(), name.as_posix())]


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConsiliumError(
            f"data: cannot read {_shown(path)}: {error.strerror}; check its permissions."
        ) from None
    except UnicodeDecodeError as error:
        raise ConsiliumError(
            f"data: {_shown(path)} is not UTF-8 text (byte {error.start}); convert it or leave it out."
        ) from None
    if "\0" in content:
        raise ConsiliumError(
            f"data: {_shown(path)} has NUL bytes, so it is binary and not text; leave it out."
        )
    return content.replace("\r\n", "\n")


def _records(path: Path, content: str, name: str, domain: str) -> Iterator[Text]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"data: {_shown(path)}, line {number}"
            record = _record(line, where)
            text = _string(record, "text", where)
            chosen = _string(record, "domain", where) if "domain" in record else domain
            yield Text(text, chosen, f"{name}:{number}", f"{name}:{number}")


def _record(line: str, where: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConsiliumError(f"{where} is not JSON ({error}); write one object a line.") from None
    if not isinstance(record, dict):
        raise ConsiliumError(f'{where} is {type(record).__name__}, not an object; write {{"text": ...}}.')
    return record


def _string(record: dict[str, object], key: str, where: str) -> str:
    if key not in record:
        raise ConsiliumError(f"{where} has no key {key!r}.{nearest(key, map(str, record))}")
    text = record[key]
    if not isinstance(text, str):
        raise ConsiliumError(
            f"{where}: key {key!r} is {type(text).__name__}, not a string; write text in it."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConsiliumError(f"{where}: key {key!r} has half of a surrogate pair; remove it.") from None
    return text
