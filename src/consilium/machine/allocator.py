"""Keep freed memory in the process, in huge pages.

Gradients of stacked experts are hundreds of megabytes, made anew every step. By default glibc returns such
blocks to the kernel at once, and every next step pays a page fault, with clearing, for every 4 KiB of them
(measured in docs/decisions/0003-experts-backend.md).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Names of parameters in glibc's malloc.h."""

_HUGE_PAGE = 2 << 20
_HUGE_FROM = 2 << 20
"""Bytes from which torch asks for huge pages, and then aligns to pages."""


def huge(values: torch.Tensor) -> torch.Tensor:
    """Ask for huge pages behind ``values``, whose memory nobody has touched, and return them.

    Weights are read from end to end at every token, and each page of 4 KiB costs a look into tables.
    Elsewhere than on Linux, and for less than a page, nothing is asked.
    """
    first = -(-values.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (values.data_ptr() + values.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if platform.system() == "Linux" and values.device.type == "cpu" and end > first:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return values


def keep_memory() -> bool:
    """Make the process keep what it frees, for speed, and return whether it does.

    Call it once, at the start of a process that trains, before the first tensor: torch reads
    ``THP_MEM_ALLOC_ENABLE`` (huge pages; a value set by the user is respected) at its first allocation. Too
    late, or elsewhere than on Linux with glibc, nothing changes. Resident memory then stays at its peak, up
    to 1.8 times that of live tensors. Values do not change.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Without the alignment to pages a freed block is some bytes too small for the next one of its size: the
    # heap would grow by a gradient a step.
    if torch.empty(_HUGE_FROM, dtype=torch.uint8).data_ptr() % mmap.PAGESIZE:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)
