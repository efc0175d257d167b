"""What launchers say to a process that they start: torchrun, and our own.

Light, so that a run of one process learns from it that it is one.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

import torch

from consilium.errors import ConsiliumError

STORE: Final = "CONSILIUM_STORE"
"""Path of the file in which forked processes meet: nothing listens on a network for it."""
TIMEOUT: Final = 300.0
"""Seconds that a collective may take: longer than a slow rank's checkpoint, far from torch's half an hour."""
LIMIT: Final = "CONSILIUM_TIMEOUT"
"""Environment variable with other seconds, for a network or a disk that is slower, or a test that is not."""
_NEEDED: Final = ("RANK", "WORLD_SIZE")
_BY_TORCHRUN: Final = ("MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether a launcher, torchrun or our own, started this process as one of its group."""
    environment = os.environ.keys()
    return set(_NEEDED) <= environment and (STORE in environment or set(_BY_TORCHRUN) <= environment)


def launched_rank() -> int:
    """The rank that a launcher gave to this process, 0 without one."""
    return int(os.environ["RANK"]) if is_launched() else 0


def launched_world() -> int:
    """How many processes a launcher started, 1 without one."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def local_device(name: str) -> str:
    """``name``, or this process's own CUDA device where it leaves that open and there are some."""
    if name in ("auto", "cuda") and is_launched() and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def restarts() -> int:
    """How often torchrun has started this group anew after a process was lost."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


def seconds() -> float:
    """The longest that a collective may take."""
    text = os.environ.get(LIMIT, str(TIMEOUT))
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise ConsiliumError(f"{LIMIT} is {text!r}; give the seconds that a collective may take, such as 300.")
