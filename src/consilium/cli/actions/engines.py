"""From a folder and sampling options to an engine."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from consilium.checkpoint import store
from consilium.checkpoint.folders import checkpoint_in
from consilium.data.tokenizer import Tokenizer
from consilium.engine.engine import Engine
from consilium.engine.request import Sampling


def load_engine(folder: Path) -> Engine:
    """The engine of a run's newest checkpoint or of a checkpoint.

    Raises ConsiliumError for any other folder.
    """
    checkpoint = checkpoint_in(folder)
    return Engine(store.load(checkpoint, check_finite=True), Tokenizer.load(checkpoint))


def sampling_of(options: Namespace) -> Sampling:
    return Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
