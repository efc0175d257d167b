"""``consilium serve`` that tells, on SIGUSR1, how many objects Python holds and how much memory there is."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from pathlib import Path

from consilium.cli.main import main


def tell(number: int, frame: object) -> None:
    """What is free for the allocator to give back is given back first: it is not lost."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    print(f"soaked {len(gc.get_objects())} {resident}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, tell)
    sys.exit(main(["serve", *sys.argv[1:]]))
