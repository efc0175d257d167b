"""The processor's matrix unit (AMX), which a process on Linux has to ask for."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any, Final

from consilium.machine.processors import instructions

_ARCH_PRCTL: Final = 158
_ASK_FOR_PART: Final = 0x1023
_TILES: Final = 18
"""Numbers of Linux on x86-64 (asm/prctl.h)."""


@functools.cache
def permitted() -> bool:
    """Whether this process may multiply bfloat16 tiles, from now on in all of its threads."""
    here = {"amx_bf16", "amx_tile", "avx512_bf16"} <= instructions()
    if not here or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    library: Any = ctypes.CDLL(None)
    return bool(library.syscall(_ARCH_PRCTL, _ASK_FOR_PART, _TILES) == 0)
