"""Everything that this program writes, as two versions of one thing that a crash may stand between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from consilium.checkpoint.gguf.export import export
from consilium.data.store import entry_is_whole, write_entry
from consilium.disk.atomic import commit_folder, latest, prune, sweep
from consilium.disk.files import DISK, Filesystem
from consilium.disk.manifest import verify
from consilium.records.io import read_json_if_present, write_json, write_text
from consilium.records.loads import LOADS_FILE, LoadFile
from consilium.records.metrics import append_step, read_metrics, sync_metrics, truncate_metrics
from consilium.records.run import BitsPerByte, StepRecord

STEPS: Mapping[tuple[int, ...], str | None] = {(): None, (1,): "1", (1, 3): "1", (1, 2): "2"}
"""Version by the steps on record: 3 is what a resume after step 1 cuts off."""


@dataclass(frozen=True)
class Writer:
    """``write`` and ``read`` get a folder that may not exist; versions are "1" and "2", None is nothing."""

    first: Callable[[Path], None]
    write: Callable[[Path, Filesystem], None]
    read: Callable[[Path], str | None]


def fill(folder: Path, version: str, files: Filesystem) -> None:
    files.write(folder / "model.safetensors", [f"weights {version}".encode(), b"." * 64])
    files.make_folder(folder / "training_state")
    files.write(folder / "training_state" / "state.json", [version.encode()])


def commit(destination: Path, version: str, files: Filesystem = DISK) -> None:
    commit_folder(destination, lambda folder: fill(folder, version, files), files=files)


def rotate(folder: Path, files: Filesystem) -> None:
    """As training does: sweep, save step 2 and remove step 1."""
    sweep(folder, files=files)
    commit(folder / "step-2", "2", files)
    prune(folder, 1, current=folder / "step-2", files=files)


def newest(folder: Path) -> str | None:
    found = latest(folder)
    return None if found is None else held(found)


def held(folder: Path) -> str:
    """The version in ``folder``, which must be whole and of one save."""
    verify(folder)
    version = (folder / "training_state" / "state.json").read_text()
    assert (folder / "model.safetensors").read_text().startswith(f"weights {version}.")
    return version


def write_record(folder: Path, version: str, files: Filesystem = DISK) -> None:
    write_json(folder / "record.json", BitsPerByte(domains={"code": float(version)}), files=files)


def read_record(folder: Path) -> str | None:
    record = read_json_if_present(BitsPerByte, folder / "record.json")
    return None if record is None else f"{record.macro:.0f}"


def write_metrics(folder: Path, files: Filesystem) -> None:
    """Start, or go on after step 1; then log up to step 2 and make it durable."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        write_text(path, "", files=files)
    truncate_metrics(path, 1, files=files)
    for step in range(len(read_metrics(path).records) + 1, 3):
        append_step(path, StepRecord(step=step, tokens=step), files=files)
    sync_metrics(path, files=files)


def first_metrics(folder: Path) -> None:
    write_metrics(folder, DISK)
    truncate_metrics(folder / "metrics.jsonl", 1)
    append_step(folder / "metrics.jsonl", StepRecord(step=3, tokens=3))


def read_steps(folder: Path) -> str | None:
    return STEPS[tuple(record.step for record in read_metrics(folder / "metrics.jsonl").records)]


def write_loads(folder: Path, files: Filesystem) -> None:
    """As ``write_metrics``, but for load records."""
    there = (folder / LOADS_FILE).exists()
    loads = (
        LoadFile.open(folder, files=files)
        if there
        else LoadFile.create(folder, layers=[0, 2], experts=3, files=files)
    )
    loads.truncate(1)
    for step in range(len(loads) + 1, 3):
        loads.append(step, [[step] * 3] * 2)
    loads.sync()


def first_loads(folder: Path) -> None:
    write_loads(folder, DISK)
    loads = LoadFile.open(folder)
    loads.truncate(1)
    loads.append(3, [[3] * 3] * 2)


def read_loads(folder: Path) -> str | None:
    if not (folder / LOADS_FILE).exists():
        return None
    found = list(LoadFile.open(folder).read())
    assert all(load_LE == ((step,) * 3,) * 2 for step, load_LE in found)
    return STEPS[tuple(step for step, _ in found)]


def write_cache(folder: Path, files: Filesystem) -> None:
    write_entry(folder / "corpus" / "entry", {"ids": b"2" * 100, "index": b"2"}, files=files)


def first_cache(folder: Path) -> None:
    write_cache(folder, DISK)
    (folder / "corpus" / "entry" / "ids").write_bytes(b"1" * 100)


def read_cache(folder: Path) -> str | None:
    """A damaged entry is nothing: it is built again."""
    return "2" if entry_is_whole(folder / "corpus" / "entry") else None


def writers(model: Path) -> dict[str, Writer]:
    """Every writer by name; ``model`` is a saved one that can be exported."""

    def write_gguf(folder: Path, files: Filesystem) -> None:
        if not (folder / "a.gguf").exists():
            export(model, folder / "a.gguf", files=files)

    def read_gguf(folder: Path) -> str | None:
        path = folder / "a.gguf"
        return {0: None, size: "2"}[path.stat().st_size if path.exists() else 0]

    export(model, model.with_suffix(".gguf"))
    size = model.with_suffix(".gguf").stat().st_size
    return {
        "replacement": Writer(
            lambda folder: commit(folder / "step-1", "1"),
            lambda folder, files: commit(folder / "step-1", "2", files),
            newest,
        ),
        "rotation": Writer(lambda folder: commit(folder / "step-1", "1"), rotate, newest),
        "record": Writer(
            lambda folder: write_record(folder, "1"),
            lambda folder, files: write_record(folder, "2", files),
            read_record,
        ),
        "metrics": Writer(first_metrics, write_metrics, read_steps),
        "loads": Writer(first_loads, write_loads, read_loads),
        "cache": Writer(first_cache, write_cache, read_cache),
        "gguf": Writer(lambda folder: folder.mkdir(parents=True), write_gguf, read_gguf),
    }


NAMES = ("replacement", "rotation", "record", "metrics", "loads", "cache", "gguf")
