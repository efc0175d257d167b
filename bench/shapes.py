"""Models that benchmarks compare with others: of the catalogue, of a GGUF file, or of the yardstick's size.

The yardstick is ``deepseek-v3:1b``. ``mixtral`` and ``qwen3-moe`` have its vocabulary, width, layers and
active parameters, the experts of their systems, and four heads of keys and values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from consilium.checkpoint.store import open_folder
from consilium.config.attention import GQA
from consilium.config.model import MTP, Model
from consilium.recipes import catalogue

YARDSTICK: Final = "deepseek-v3:1b"
EXPERTS: Final[Mapping[str, tuple[int, int, int]]] = {"mixtral": (8, 2, 2048), "qwen3-moe": (64, 8, 512)}
"""Experts, choices a token, and their width."""


def model_of(name: str, max_length: int) -> Model:
    """Without multi-token prediction, which nobody decodes with here."""
    if name.endswith(".gguf"):
        found = open_folder(Path(name)).config
    elif name in EXPERTS:
        found = of_equal_size(name)
    else:
        system, _, size = name.partition(":")
        found = catalogue.recipe(system, size or None)
    return dataclasses.replace(found, mtp=MTP(), max_length=max_length)


def of_equal_size(name: str) -> Model:
    yardstick, small = catalogue.recipe(*YARDSTICK.split(":")), catalogue.recipe(name, "tiny")
    experts, choices, width = EXPERTS[name]
    assert small.moe is not None, "a system with experts"
    assert isinstance(small.attention, GQA), "and grouped-query attention"
    select = dataclasses.replace(small.moe.router.select, k=choices)
    router = dataclasses.replace(small.moe.router, select=select)
    return dataclasses.replace(
        small,
        vocab_size=yardstick.vocab_size,
        hidden_size=yardstick.hidden_size,
        layers=yardstick.layers,
        attention=dataclasses.replace(small.attention, heads=16, kv_heads=4, head_dim=64),
        moe=dataclasses.replace(small.moe, experts=experts, width=width, router=router),
    )


def label(name: str) -> str:
    """What stands behind the name of a record: nothing for the yardstick."""
    if name == YARDSTICK:
        return ""
    plain = Path(name).stem if name.endswith(".gguf") else name
    return f"-{plain.replace(':', '-').lower()}"
