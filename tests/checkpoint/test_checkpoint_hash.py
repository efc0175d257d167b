"""The table of a hash router is saved with the weights that were trained for it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoint.models import hashed
from consilium.checkpoint.store import load, load_weights, save
from consilium.disk import manifest
from consilium.model.build import build
from consilium.moe.routing.router import table_of_old


def test_a_table_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    model = build(hashed(), seed=1)
    tables = [layer.router.table for layer in model.moe_modules().values()]
    for table in tables:
        table.copy_(table.flip(0))
    save(model, tmp_path / "model")
    for table, layer in zip(tables, load(tmp_path / "model").moe_modules().values(), strict=True):
        assert torch.equal(layer.router.table, table)


def test_a_folder_of_before_tables_were_saved_gets_the_table_that_it_was_trained_with(tmp_path: Path) -> None:
    model, folder = build(hashed(), seed=1), tmp_path / "model"
    save(model, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(".table")}
    assert len(weights) - len(kept) == len(model.moe_modules())
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / manifest.NAME).unlink()
    assert model.config.moe is not None
    old = table_of_old(model.config.moe.router, model.config.moe.experts)
    opened, filled = load(folder), build(hashed(), seed=2)
    load_weights(filled, folder)
    for layer in (*opened.moe_modules().values(), *filled.moe_modules().values()):
        assert torch.equal(layer.router.table, old)
    save(opened, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()
