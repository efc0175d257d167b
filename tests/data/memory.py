"""Encodes text in a process of its own and prints what memory that took: bytes above the imports."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from consilium.config.data import Data, TextPath
from consilium.config.training import Bytes, Train
from consilium.data.corpus import build_corpus


def resident() -> int:
    """Peak, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(folder: Path, kind: str) -> None:
    build_corpus(Data(sources=(TextPath(path=str(folder / "small.txt")),)), 259, start=Bytes())
    before, begun = resident(), time.perf_counter()
    data = Data(sources=(TextPath(path=str(folder / "large")),))
    corpus = build_corpus(data, 2048, start=Train() if kind == "train" else Bytes())
    tokens = sum(text.token_count for text in corpus.train.values())
    told = {"bytes": resident() - before, "seconds": time.perf_counter() - begun, "tokens": tokens}
    print(json.dumps(told))


main(Path(sys.argv[1]), sys.argv[2])
