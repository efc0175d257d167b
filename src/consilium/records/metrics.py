"""``metrics.jsonl``: one JSON object a logged step, append-only; a crash tears the last line at most."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from consilium.disk.files import DISK, Filesystem, write_failure
from consilium.errors import ConsiliumError
from consilium.records.io import adapter, write_text
from consilium.records.run import StepRecord

METRICS_FILE = "metrics.jsonl"
NUL = b"\0"
_SHOWN = 200

_DOMAIN = "val/bits_per_byte/"
_LAYER = re.compile(r"moe/layer_([0-9]{1,6})/max_over_mean")
_LOSS = "moe/loss/"
_SHARE = "data/share/"
_FLAT = TypeAdapter(dict[str, float | None])


KEYS: Mapping[str, str] = {
    "step": "step",
    "tokens": "tokens",
    "train/loss": "loss",
    "train/ce": "ce",
    "train/grad_norm": "grad_norm",
    "train/lr": "lr",
    "train/tok_per_sec": "tok_per_sec",
    "train/skipped": "skipped",
    "train/spike": "spike",
    "val/bits_per_byte": "bits_per_byte",
    "moe/max_over_mean": "max_over_mean",
    "moe/dead_experts": "dead_experts",
    "moe/router_entropy": "router_entropy",
    "moe/dropped_frac": "dropped_frac",
    "moe/bias_spread": "bias_spread",
}
"""Key in the file -> field of StepRecord. Scripts rely on the keys: they never change."""


@dataclass(frozen=True, slots=True)
class Metrics:
    records: tuple[StepRecord, ...]
    torn: str | None
    """The start of the last line that a crash tore, None where there is none."""


def to_line(record: StepRecord) -> str:
    """One line of ``metrics.jsonl``, newline included."""
    data = adapter(StepRecord).dump_python(record, exclude_none=True)
    flat: dict[str, float] = {key: data[field] for key, field in KEYS.items() if field in data}
    flat |= {_DOMAIN + name: value for name, value in record.domains.items()}
    flat |= {f"moe/layer_{layer}/max_over_mean": value for layer, value in record.layers.items()}
    flat |= {_LOSS + name: value for name, value in record.losses.items()}
    flat |= {_SHARE + name: value for name, value in record.shares.items()}
    flat |= record.other
    finite = {key: value if math.isfinite(value) else None for key, value in flat.items()}
    return json.dumps(finite, allow_nan=False, ensure_ascii=False) + "\n"


def from_line(line: str | bytes) -> StepRecord:
    """Parse one line. Raises ValueError when it is not a whole record."""
    data: dict[str, float | None] = _FLAT.validate_json(line)
    fields: dict[str, Any] = {"domains": {}, "layers": {}, "losses": {}, "shares": {}, "other": {}}
    for key, value in data.items():
        _place(fields, key, math.nan if value is None else value)
    return adapter(StepRecord).validate_python(fields)


def _place(fields: dict[str, Any], key: str, value: float) -> None:
    if key in KEYS:
        fields[KEYS[key]] = value
    elif key.startswith(_DOMAIN):
        fields["domains"][key.removeprefix(_DOMAIN)] = value
    elif key.startswith(_LOSS):
        fields["losses"][key.removeprefix(_LOSS)] = value
    elif key.startswith(_SHARE):
        fields["shares"][key.removeprefix(_SHARE)] = value
    elif layer := _LAYER.fullmatch(key):
        fields["layers"][int(layer[1])] = value
    else:
        fields["other"][key] = value


def append_step(path: Path, record: StepRecord, *, files: Filesystem = DISK) -> None:
    """Add one line with one write. Raises ConsiliumError when the file cannot grow."""
    try:
        files.append(path, to_line(record).encode())
    except OSError as error:
        raise write_failure(error, path) from error


def sync_metrics(path: Path, *, files: Filesystem = DISK) -> None:
    """Make durable what was appended. Raises ConsiliumError where the disk fails."""
    try:
        files.sync_file(path)
    except OSError as error:
        raise write_failure(error, path) from error


def read_metrics(path: Path) -> Metrics:
    """Read all records; a missing file is an empty one.

    What a crash tore is left out: the last line, and lines with the NULs that a power cut leaves where names
    were durable before contents. Raises ConsiliumError when another line is damaged.
    """
    records: list[StepRecord] = []
    torn: str | None = None
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        try:
            records.append(from_line(line.strip(NUL)))
        except ValueError:
            if number < len(lines) and NUL not in line:
                raise ConsiliumError(
                    f"{path} line {number} is not a record of a step; remove that line to read the rest."
                ) from None
            torn = line[:_SHOWN].decode(errors="replace")
    return Metrics(records=tuple(records), torn=torn)


def truncate_metrics(path: Path, step: int, *, files: Filesystem = DISK) -> Metrics:
    """Keep the whole records up to ``step``, as a resume from that step's checkpoint needs.

    Returns what was there before.
    """
    before = read_metrics(path)
    kept = [to_line(record) for record in before.records if record.step <= step]
    write_text(path, "".join(kept), files=files)
    return before


def _lines(path: Path) -> list[bytes]:
    try:
        return [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConsiliumError(
            f"cannot read {path}: {error.strerror or error}; give the folder of a run."
        ) from None
