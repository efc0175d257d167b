"""The files of a run folder beside its checkpoints: configuration, identity, metrics and load matrices."""

from __future__ import annotations

from pathlib import Path
from typing import final

from consilium.config import io
from consilium.config.training import Training
from consilium.errors import ConsiliumError
from consilium.records.io import write_text
from consilium.records.loads import LOADS_FILE, LoadFile
from consilium.records.metrics import METRICS_FILE, append_step, read_metrics, truncate_metrics
from consilium.records.run import StepRecord
from consilium.training.step import StepResult

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"


def stored_config(out: Path) -> Training | None:
    """The configuration of the run in ``out``, if there is one."""
    path = out / CONFIG_FILE
    return io.read_yaml(Training, path) if path.exists() else None


def check_same(stored: Training, asked: Training, out: Path) -> None:
    """Refuse to resume with other settings: a run is one configuration from first step to last."""
    old, new = _flat(io.to_data(stored)), _flat(io.to_data(asked))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ConsiliumError(
                f"cannot resume {out}: it was started with {key} = {old.get(key)}, not {new.get(key)};"
                " leave the option away or choose another --out."
            )


def _flat(data: object, prefix: str = "") -> dict[str, object]:
    if isinstance(data, dict):
        pairs = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list):
        pairs = [(str(i), value) for i, value in enumerate(data)]
    else:
        return {prefix.removesuffix("."): data}
    return {name: leaf for key, value in pairs for name, leaf in _flat(value, f"{prefix}{key}.").items()}


@final
class RunFiles:
    """Append-only files of one run. A resume cuts them back to the checkpoint's step."""

    def __init__(self, out: Path, loads: LoadFile | None) -> None:
        self._metrics = out / METRICS_FILE
        self._loads = loads

    @staticmethod
    def start(out: Path, config: Training) -> RunFiles:
        """Write ``config.yaml`` and empty metrics.

        Raises ConsiliumError when the folder cannot be written.
        """
        write_text(out / CONFIG_FILE, io.to_yaml(config))
        write_text(out / METRICS_FILE, "")
        moe = config.model.moe
        layers = config.model.moe_layers
        loads = LoadFile.create(out, layers=layers, experts=moe.experts) if moe and layers else None
        return RunFiles(out, loads)

    @staticmethod
    def reopen(out: Path, step: int) -> RunFiles:
        """Open the files of a run that goes on after ``step``."""
        truncate_metrics(out / METRICS_FILE, step)
        loads = LoadFile.open(out) if (out / LOADS_FILE).exists() else None
        if loads is not None:
            loads.truncate(step)
        return RunFiles(out, loads)

    def log(self, record: StepRecord) -> None:
        append_step(self._metrics, record)

    def has_evaluation(self, step: int) -> bool:
        """Whether a validation after ``step`` is on record."""
        records = read_metrics(self._metrics).records
        return any(record.step == step and record.bits_per_byte is not None for record in records)

    def log_loads(self, step: int, result: StepResult) -> None:
        if self._loads is not None:
            self._loads.append(step, [load.counts for load in result.loads.values()])
