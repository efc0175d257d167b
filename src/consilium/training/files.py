"""A run folder and its files beside the checkpoints: lock, configuration, metrics and load matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, final

from consilium.config import io
from consilium.config.training import Training
from consilium.disk.atomic import refuse_in_saved
from consilium.disk.lock import held
from consilium.errors import ConsiliumError
from consilium.parallel.mesh import Mesh
from consilium.records.io import write_text
from consilium.records.loads import LOADS_FILE, FinalLoad, LoadFile
from consilium.records.metrics import METRICS_FILE, append_step, read_metrics, sync_metrics, truncate_metrics
from consilium.records.run import CONFIG_FILE, META_FILE, StepRecord
from consilium.training.step import StepResult
from consilium.words.say import say

LOCK_FILE = "run.lock"
"""Stays behind; the system forgets who held it when a process ends, however it ends."""


def stored_config(out: Path) -> Training | None:
    """The configuration of the run in ``out``, if there is one."""
    path = out / CONFIG_FILE
    return io.read_yaml(Training, path) if path.exists() else None


def run_in(out: Path, *, resume: bool) -> Training | None:
    """The configuration of the run that goes on in ``out``, None where one starts.

    Raises ConsiliumError where a run is there and ``resume`` is off, and where other files are.
    """
    stored = stored_config(out)
    if stored is not None and not resume:
        raise ConsiliumError(
            f"{out} already holds a run; add --resume to continue it or choose another --out."
        )
    _refuse_foreign(out)
    return stored


def _refuse_foreign(out: Path) -> None:
    """A run writes checkpoints and prunes them; it starts in no folder with files of somebody else."""
    if (out / CONFIG_FILE).exists():
        return
    refuse_in_saved(out.resolve())
    if out.exists() and not out.is_dir():
        raise ConsiliumError(f"{out} is a file; give the name of a new folder as --out.")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    foreign = [name for name in names if name not in {META_FILE, LOCK_FILE} and not name.startswith(".")]
    if foreign:
        raise ConsiliumError(
            f"{out} holds files that are no run's ({', '.join(foreign[:3])}); give a new or empty folder as"
            " --out."
        )


@contextlib.contextmanager
def locked(out: Path, notice: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from training in ``out`` meanwhile; a folder made for nothing goes again.

    The same thread may take it again inside: a command holds it while it prepares what ``train`` then does.
    Raises ConsiliumError where one does, where other files are, or where the folder cannot be made.
    """
    _refuse_foreign(out)
    made = not out.exists()
    busy = f"{out} is in use by another process that trains there; wait for it or choose another --out."
    with held(out / LOCK_FILE, busy=busy, notice=notice):
        try:
            yield
        finally:
            if made:
                _remove_unused(out)


@contextlib.contextmanager
def locked_by_one(out: Path, notice: Callable[[str], None], mesh: Mesh) -> Iterator[None]:
    """``locked``, by the process of ``mesh`` that leads, in a folder that every process sees."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(locked(out, notice))

        def see() -> None:
            if not (out / LOCK_FILE).exists():
                raise ConsiliumError(
                    f"rank {mesh.world.rank} does not see {out}, which rank 0 has made; give --out on a file"
                    " system that all processes share."
                )

        mesh.world.led(lock)
        mesh.world.agreed(see)
        yield


def _remove_unused(out: Path) -> None:
    with contextlib.suppress(OSError):
        if [path.name for path in out.iterdir()] == [LOCK_FILE]:
            (out / LOCK_FILE).unlink()
        out.rmdir()


class Files(Protocol):
    """What a run keeps beside its checkpoints."""

    def log(self, record: StepRecord) -> None: ...

    def log_once(self, record: StepRecord) -> None:
        """Of a change of shares: a run that goes on there makes it again."""
        ...

    def log_loads(self, step: int, result: StepResult) -> None: ...

    def sync(self) -> None:
        """Make every record durable, before the checkpoint that relies on them."""
        ...

    def has_evaluation(self, step: int) -> bool:
        """Whether a validation after ``step`` is on record."""
        ...

    def final_load(self) -> dict[int, FinalLoad]:
        """How even the loads of each MoE layer were in the newest steps of the run."""
        ...


@final
class NoFiles:
    """Of a process that another writes for."""

    def log(self, record: StepRecord) -> None:
        pass

    def log_once(self, record: StepRecord) -> None:
        pass

    def log_loads(self, step: int, result: StepResult) -> None:
        pass

    def sync(self) -> None:
        pass

    def has_evaluation(self, step: int) -> bool:
        return True

    def final_load(self) -> dict[int, FinalLoad]:
        return {}


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
    def reopen(out: Path, step: int, notice: Callable[[str], None]) -> RunFiles:
        """Open the files of a run that goes on after ``step``."""
        if truncate_metrics(out / METRICS_FILE, step).torn is not None:
            notice(
                say("{file} ended in half a record after a crash; it was dropped", file=out / METRICS_FILE)
            )
        loads = LoadFile.open(out) if (out / LOADS_FILE).exists() else None
        if loads is not None:
            loads.truncate(step)
        return RunFiles(out, loads)

    def log(self, record: StepRecord) -> None:
        append_step(self._metrics, record)

    def log_once(self, record: StepRecord) -> None:
        records = read_metrics(self._metrics).records
        if not any(known.step == record.step and known.shares for known in records):
            self.log(record)

    def sync(self) -> None:
        sync_metrics(self._metrics)
        if self._loads is not None:
            self._loads.sync()

    def has_evaluation(self, step: int) -> bool:
        records = read_metrics(self._metrics).records
        return any(record.step == step and record.bits_per_byte is not None for record in records)

    def final_load(self) -> dict[int, FinalLoad]:
        return {} if self._loads is None else self._loads.final()

    def log_loads(self, step: int, result: StepResult) -> None:
        if self._loads is not None:
            self._loads.append(step, [load.counts for load in result.loads.values()])
