"""``consilium serve`` that tells, on SIGUSR2, of objects, bytes of memory, and services."""

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
    objects = gc.get_objects()
    services = sum(type(one).__name__ == "Service" for one in objects)
    print(f"soaked {len(objects)} {resident} {services}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, tell)
    sys.exit(main(["serve", *sys.argv[1:]]))
