"""How a run goes on: from which checkpoint, with which settings changed, and what older records become."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from consilium.config import io
from consilium.config.training import Training
from consilium.disk import atomic
from consilium.disk.manifest import verify
from consilium.errors import ConsiliumError
from consilium.records.io import write_text
from consilium.records.loads import LOADS_FILE
from consilium.records.metrics import METRICS_FILE
from consilium.records.run import CHECKPOINTS, META_FILE, SUMMARY_FILE
from consilium.training.files import CONFIG_FILE
from consilium.words.say import say

MAY_CHANGE: Final = frozenset(
    {"steps", "batch", "accumulate", "optimizer.learning_rate", "optimizer.router_learning_rate"}
    | {"eval_every", "eval_tokens", "save_every", "saving", "keep", "threads", "recompute", "overlap"}
)
_WHY: Final = {
    "model": "its weights fit that model alone",
    "init": "its weights have begun already",
    "tokenizer": "its tokens would mean something else",
    "data": "what it has read would be counted out of another text",
    "freeze": "the optimizer knows the parts that it began with",
    "optimizer": "the optimizer's moments were gathered with it",
    "schedule": "the rates behind it followed that curve, of which --steps moves the end",
    "ramp": "it decided what had been read",
    "average": "it has averaged so far as it began",
    "spikes": "what it watched for decided which steps counted",
    "dtype": "one run has one arithmetic",
    "seed": "the seed has ordered the text and drawn the weights",
}
_KEPT: Final = (METRICS_FILE, Path(LOADS_FILE).parent.name, META_FILE, SUMMARY_FILE)


def changes(stored: Training, asked: Training, out: Path) -> list[tuple[str, str, str]]:
    """Key, value before and after of what a resume changes.

    Raises ConsiliumError that says why where a run keeps what it began with.
    """
    found = _differences(stored, asked)
    for key, old, new in found:
        if key not in MAY_CHANGE:
            raise _cannot(out, key, old, new, _WHY.get(key.partition(".")[0], "that names the run"))
    return found


def refuse_unnamed(settled: Training, read: Training, out: Path, *, length: bool) -> None:
    """Refuse a file that says something else than the run and its options: an option says it by name.

    ``length``: an option says how long, whatever the file says.
    """
    for key, old, new in _differences(settled, read):
        # Processes raise it to a micro-batch each, and the file is the one that they began with.
        raised = key == "accumulate" and settled.accumulate % read.accumulate == 0
        if not (raised or (key == "steps" and length)):
            raise _cannot(out, key, old, new, "a file changes no run: options do, by name")


def _differences(one: Training, other: Training) -> list[tuple[str, str, str]]:
    old, new = dict(_leaves(io.to_data(one), "")), dict(_leaves(io.to_data(other), ""))
    keys = sorted(old.keys() | new.keys(), key=lambda key: (not key.endswith(".kind"), key))
    return [(key, str(old.get(key)), str(new.get(key))) for key in keys if old.get(key) != new.get(key)]


def _cannot(out: Path, key: str, old: str, new: str, why: str) -> ConsiliumError:
    words = ["consilium", "train", str(out / CONFIG_FILE), "--out", str(out), "--resume"]
    return ConsiliumError(
        f"cannot resume {out}: it was started with {key} = {old}, not {new}, and {why};"
        f" {shlex.join(words)} goes on as it was, or choose another --out."
    )


def newest_checkpoint(out: Path, notice: Callable[[str], None]) -> Path | None:
    """The newest complete and unchanged checkpoint; damaged newer ones are put aside, where they harm none.

    None before the first one. Raises ConsiliumError where all there are were damaged.
    """
    folder = out / CHECKPOINTS
    found = atomic.latest(folder, check=verify, notice=notice)
    steps = [path for _, path in atomic.steps(folder)]
    for path in steps if found is None else steps[steps.index(found) + 1 :]:
        aside = atomic.set_aside(path)
        kept = say("{path} is damaged and kept as {aside}", path=path, aside=aside and aside.name)
        if found is None:
            notice(say("{kept}; the run begins anew", kept=kept))
        else:
            notice(say("{kept}; the run goes on from {found}", kept=kept, found=found))
    return found


def put_records_aside(out: Path) -> Path | None:
    """Keep what steps left behind that no checkpoint holds; None where none ran."""
    metrics = out / METRICS_FILE
    if not metrics.exists() or b'"train/loss"' not in metrics.read_bytes():
        return None
    aside = _free(out / "unsaved")
    aside.mkdir()
    write_text(aside / CONFIG_FILE, (out / CONFIG_FILE).read_text(encoding="utf-8"))
    for name in _KEPT:
        if (out / name).exists():
            (out / name).rename(aside / name)
    return aside


def _free(path: Path) -> Path:
    """``path``, with a number behind it where it is taken."""
    names = (path if i == 0 else path.with_name(f"{path.name}-{i}") for i in range(10_000))
    return next(name for name in names if not name.exists())


def _leaves(data: object, prefix: str) -> Iterator[tuple[str, object]]:
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if pairs is None:
        yield prefix.removesuffix("."), data
    else:
        for key, value in pairs:
            yield from _leaves(value, f"{prefix}{key}.")
