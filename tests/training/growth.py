"""How large a process grows while it makes its model: run by an interpreter of its own, whose heap is empty.

``python growth.py FOLDER`` prints bytes as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from pathlib import Path

import torch

from consilium.checkpoint import store
from consilium.config.data import Data
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.config.training import Bytes, Folder, Training
from consilium.data.corpus import Corpus, build_corpus
from consilium.data.tokenizer import Tokenizer
from consilium.model.build import build
from consilium.parallel.mesh import Mesh
from consilium.parallel.topology import Topology
from consilium.training.spread import allocated
from consilium.training.start import initial
from processes import together
from small import DEEPSEEK, DENSE

LARGE = dataclasses.replace(
    DENSE,
    hidden_size=256,
    layers=2,
    dense_first=0,
    moe=MoE(experts=32, width=512, router=Router(select=TopK(k=2))),
)
"""96 MiB, nearly all of it experts."""


def main(folder: Path) -> None:
    sizes = [parameter.nbytes for parameter in build(LARGE, device="meta").parameters()]
    store.save(build(LARGE), folder, tokenizer=Tokenizer.of_bytes())
    random = Training(model=LARGE, tokenizer=Bytes(), steps=1)
    read = dataclasses.replace(random, init=Folder(path=str(folder)))
    corpus = build_corpus(Data(), LARGE.vocab_size, start=Bytes())

    def drawn(mesh: Mesh) -> dict[str, torch.Tensor]:
        return {"bytes": torch.tensor(grown(random, corpus, mesh))}

    def of_folder(mesh: Mesh) -> dict[str, torch.Tensor]:
        return {"bytes": torch.tensor(grown(read, corpus, mesh))}

    found = {
        "drawn by two": together(Topology(expert=2), drawn)[1],
        "read by two": together(Topology(expert=2), of_folder)[1],
        "drawn by one": together(Topology(), drawn)[0],
    }
    growth = {name: float(result["bytes"]) for name, result in found.items()}
    print(json.dumps({"whole": sum(sizes), "largest": max(sizes), "growth": growth}))


def grown(config: Training, corpus: Corpus, mesh: Mesh) -> float:
    """Bytes by which the process was larger at most while it made its model, pages of files not counted."""
    allocated(DEEPSEEK, mesh)  # libraries that the first one imports
    done, seen = threading.Event(), [held()]

    def look() -> None:
        while not done.wait(0.0005):
            seen.append(held())

    watcher = threading.Thread(target=look)
    watcher.start()
    initial(config, corpus, mesh=mesh)
    done.set()
    watcher.join()
    return float(max(seen) - seen[0])


def held() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
