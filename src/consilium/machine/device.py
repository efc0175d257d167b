"""The device that a model runs on: the one that was asked for, or a sentence that says why not."""

from __future__ import annotations

import re
from typing import Final

import torch

from consilium.errors import ConsiliumError

AUTO: Final = "auto"


def choose_device(name: str = AUTO) -> str:
    """``cpu`` or ``cuda:N`` for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the first CUDA device.

    Raises ConsiliumError for a device that is not here, or that nothing of ours was tested on.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ConsiliumError(f"unknown device {name!r}; give auto, cpu, cuda or cuda:N.")
    if name == "cpu" or (name == AUTO and not torch.cuda.is_available()):
        return "cpu"
    _refuse_absent(name, number := int(match[1] or 0))
    return f"cuda:{number}"


def device_text(device: str) -> str:
    """What a chosen device is called: ``cpu``, or ``cuda:0 (NVIDIA H100)``."""
    return device if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def _refuse_absent(name: str, number: int) -> None:
    if not torch.cuda.is_available():
        why = "sees no CUDA device" if torch.version.cuda else "was built for the CPU alone"
        raise ConsiliumError(
            f"device {name} is not here: torch {torch.__version__} {why}; use --device cpu, or install a"
            " driver and a build of torch for CUDA."
        )
    found = torch.cuda.device_count()
    if number >= found:
        raise ConsiliumError(
            f"device {name} is not here: there are {found} CUDA devices, numbered from 0; use"
            f" cuda:{found - 1}."
        )
