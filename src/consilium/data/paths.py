"""The user's own text: .txt, .md, .py and .jsonl files, or a folder of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from consilium.data.documents import Text
from consilium.errors import ConsiliumError, nearest

SUFFIXES = (".txt", ".md", ".py", ".jsonl")


def path_texts(path: Path) -> list[Text]:
    """Read ``path``: a text a file, or a record of a .jsonl file; each is a unit of the split.

    The domain is a record's own ``domain``, else the first folder below ``path``, else the suffix.
    Raises ConsiliumError for what is missing, empty, binary or malformed.
    """
    texts = [
        text for found in _files(path) for text in _read(found, _relative(found, path)) if text.text.strip()
    ]
    if not texts:
        raise ConsiliumError(
            f"data: {path} has no text: all its files are empty; give files with text in them."
        )
    return texts


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ConsiliumError(f"data: {path} does not exist; give a {_names()} file or a folder of them.")
    if path.is_dir():
        found = sorted(_walk(path))
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


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the readable files below ``folder``, leaving out hidden ones and Python's caches."""
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__pycache__"))]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent) / name


def _relative(found: Path, root: Path) -> Path:
    return found.relative_to(root) if root.is_dir() else Path(found.name)


def _read(path: Path, name: Path) -> list[Text]:
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
        raise ConsiliumError(f"data: cannot read {path}: {error.strerror}; check its permissions.") from None
    except UnicodeDecodeError as error:
        raise ConsiliumError(
            f"data: {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8 or leave it out."
        ) from None
    if "\0" in content:
        raise ConsiliumError(f"data: {path} has NUL bytes, so it is binary and not text; leave it out.")
    return content.replace("\r\n", "\n")


def _records(path: Path, content: str, name: str, domain: str) -> Iterator[Text]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"data: {path}, line {number}"
            record = _record(line, where)
            text, chosen = _string(record, "text", where), record.get("domain", domain)
            if not isinstance(chosen, str):
                raise ConsiliumError(f"{where}: key 'domain' is {chosen!r}, not a string; write a name.")
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
