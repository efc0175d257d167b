"""The processor's matrix unit (AMX), which a process on Linux has to ask for."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any, Final

import torch

_ARCH_PRCTL: Final = 158
_ASK_FOR_PART: Final = 0x1023
_TILES: Final = 18
"""Numbers of Linux on x86-64 (asm/prctl.h)."""


@functools.cache
def permitted() -> bool:
    """Whether this process may multiply bfloat16 tiles, from now on in all of its threads."""
    found = torch.cpu.get_capabilities()
    here = found.get("amx_bf16", False) and found.get("amx_tile", False)
    if not here or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    library: Any = ctypes.CDLL(None)
    return bool(library.syscall(_ARCH_PRCTL, _ASK_FOR_PART, _TILES) == 0)
