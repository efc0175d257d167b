"""Everything a page needs, read from a run folder. What a run has not written yet is None."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from consilium.config.io import from_yaml
from consilium.config.training import Training
from consilium.disk import atomic
from consilium.errors import ConsiliumError
from consilium.records.io import read_json_if_present
from consilium.records.metrics import METRICS_FILE, Metrics, read_metrics
from consilium.records.run import CHECKPOINTS, CONFIG_FILE, META_FILE, SUMMARY_FILE, RunMeta, Summary
from consilium.records.specialisation import SPECIALISATION_FILE, Specialisation
from consilium.report.load_map import LoadMap, read_load_map
from consilium.words.say import say


@dataclass(frozen=True, slots=True)
class Run:
    folder: Path
    meta: RunMeta | None
    metrics: Metrics
    summary: Summary | None
    loads: LoadMap | None
    specialisation: Specialisation | None
    config: str
    """``config.yaml`` as written; empty where there is none."""
    checkpoint: Path | None
    """The newest one."""

    layers: int | None
    """Blocks of the model; MoE layers beyond them are those of multi-token prediction."""

    generates: bool
    """Whether the engine takes this model: its experts choose for each token alone."""

    def layer_name(self, layer: int) -> str:
        """``layer 3``, or ``prediction module 1`` for what stands behind the last block."""
        if self.layers is None or layer < self.layers:
            return say("layer {layer}", layer=layer)
        return say("prediction module {number}", number=layer - self.layers + 1)

    @property
    def name(self) -> str:
        return self.folder.name or self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises ConsiliumError when it is not one, or when a record in it is damaged."""
    if not folder.is_dir():
        raise ConsiliumError(f"report: {folder} is not a folder; give the folder that --out named.")
    if not any((folder / name).exists() for name in (METRICS_FILE, META_FILE, CONFIG_FILE)):
        raise ConsiliumError(
            f"report: {folder} has no {METRICS_FILE}, so it is no training run; give --out's folder."
        )
    return Run(
        folder=folder,
        meta=read_json_if_present(RunMeta, folder / META_FILE),
        metrics=read_metrics(folder / METRICS_FILE),
        summary=read_json_if_present(Summary, folder / SUMMARY_FILE),
        loads=read_load_map(folder),
        specialisation=read_json_if_present(Specialisation, folder / SPECIALISATION_FILE),
        config=_text(folder / CONFIG_FILE),
        checkpoint=newest_checkpoint(folder),
        layers=_layers(_text(folder / CONFIG_FILE)),
        generates=_generates(_text(folder / CONFIG_FILE)),
    )


def _layers(config: str) -> int | None:
    """Of the run's own configuration; a page is no place to refuse one of another version."""
    match = re.search(r"^model:\n(?:[ ]+.*\n)*?[ ]+layers: ([0-9]+)$", config, re.MULTILINE)
    return None if match is None else int(match[1])


def _generates(config: str) -> bool:
    """False too where this version cannot read it: it could not load the model either."""
    try:
        moe = from_yaml(Training, config, where=CONFIG_FILE).model.moe
    except ConsiliumError:
        return False
    return moe is None or moe.independent


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, complete or not."""
    found = atomic.steps(folder / CHECKPOINTS)
    return found[-1][1] if found else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
