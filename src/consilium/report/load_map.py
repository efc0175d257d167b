"""The load matrices of a whole run, cut to what a picture can show.

Legend: S recorded steps, C columns of the picture, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilium.records.loads import HEADER_FILE, FinalLoad, LoadFile

MOST_COLUMNS = 600
MOST_PIXELS = 800_000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LoadMap:
    layers: tuple[int, ...]
    steps_S: NDArray[np.int64]
    first_C: NDArray[np.int64]
    """First step of each column."""
    share_LEC: Floats
    """Load over the fair share in each column; NaN where nothing was routed."""
    max_over_mean_LS: Floats
    """Of each step by itself."""
    final: tuple[FinalLoad, ...]
    """Of each layer."""

    @property
    def experts(self) -> int:
        return self.share_LEC.shape[1]

    @property
    def dead(self) -> int:
        """Experts of all layers that were dead at the end."""
        return sum(len(load.dead) for load in self.final)

    @property
    def worst(self) -> int:
        """Row of the least even layer at the end."""
        return int(np.nan_to_num([load.ratio for load in self.final], nan=-1.0).argmax())


def read_load_map(run: Path) -> LoadMap | None:
    """Read ``routing/`` of a run, a column at a time; None where nothing was recorded."""
    if not (run / HEADER_FILE).exists():
        return None
    file = LoadFile.open(run)
    layers, experts, steps = file.header.layers, file.header.experts, len(file)
    if steps == 0:
        return None
    dtype = np.dtype([("step", "<i8"), ("load", "<i4", (len(layers), experts))])
    records = np.memmap(file.path, dtype=dtype, mode="r", shape=(steps,))
    step_S, load_SLE = records["step"], records["load"]
    columns = min(steps, MOST_COLUMNS, max(MOST_PIXELS // (len(layers) * experts), 40))
    edges = np.linspace(0, steps, columns + 1).astype(np.int64)
    share_LEC = np.empty((len(layers), experts, columns))
    max_over_mean_LS = np.empty((len(layers), steps))
    for column, (start, end) in enumerate(pairwise(edges.tolist())):
        part_SLE = load_SLE[start:end].astype(np.float64)
        share_LEC[:, :, column] = _share(part_SLE.sum(axis=0))
        max_over_mean_LS[:, start:end] = _share(part_SLE).max(axis=2).T
    return LoadMap(
        layers=layers,
        steps_S=step_S.astype(np.int64),
        first_C=step_S[edges[:-1]].astype(np.int64),
        share_LEC=share_LEC,
        max_over_mean_LS=max_over_mean_LS,
        final=tuple(file.final().values()),
    )


def _share(load_E: Floats) -> Floats:
    """Loads over their mean along the last axis; NaN where nothing was routed."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return load_E / load_E.mean(axis=-1, keepdims=True)
