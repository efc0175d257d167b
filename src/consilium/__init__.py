"""Consilium: Mixture-of-Experts language models, built, trained, studied and served under one contract.

The public names below are imported when they are first used: ``import consilium`` is instant and
does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilium.checkpoint.store import load, save
    from consilium.config.data import BuiltIn, Data, TextPath
    from consilium.config.optimizer import AdamW, Muon
    from consilium.config.training import Bytes, Folder, Training
    from consilium.data.tokenizer import Tokenizer
    from consilium.engine.drafts import Ahead, NGrams
    from consilium.engine.engine import Engine
    from consilium.engine.request import Request, Sampling
    from consilium.errors import ConsiliumError
    from consilium.evaluation.texts import evaluate
    from consilium.model.build import build
    from consilium.planner.plan import plan
    from consilium.recipes.catalogue import recipe, systems
    from consilium.training.loop import train
    from consilium.upcycling.run import upcycle

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Ahead",
    "BuiltIn",
    "Bytes",
    "ConsiliumError",
    "Data",
    "Engine",
    "Folder",
    "Muon",
    "NGrams",
    "Request",
    "Sampling",
    "TextPath",
    "Tokenizer",
    "Training",
    "__version__",
    "build",
    "evaluate",
    "load",
    "plan",
    "recipe",
    "save",
    "systems",
    "train",
    "upcycle",
]

_HOME = {
    "AdamW": "consilium.config.optimizer",
    "Ahead": "consilium.engine.drafts",
    "BuiltIn": "consilium.config.data",
    "Bytes": "consilium.config.training",
    "ConsiliumError": "consilium.errors",
    "Data": "consilium.config.data",
    "Engine": "consilium.engine.engine",
    "Folder": "consilium.config.training",
    "Muon": "consilium.config.optimizer",
    "NGrams": "consilium.engine.drafts",
    "Request": "consilium.engine.request",
    "Sampling": "consilium.engine.request",
    "TextPath": "consilium.config.data",
    "Tokenizer": "consilium.data.tokenizer",
    "Training": "consilium.config.training",
    "build": "consilium.model.build",
    "evaluate": "consilium.evaluation.texts",
    "load": "consilium.checkpoint.store",
    "plan": "consilium.planner.plan",
    "recipe": "consilium.recipes.catalogue",
    "save": "consilium.checkpoint.store",
    "systems": "consilium.recipes.catalogue",
    "train": "consilium.training.loop",
    "upcycle": "consilium.upcycling.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'consilium' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
