"""The public face is narrow, frozen and instant."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import consilium
from house.tree import ROOT

PUBLIC = [
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
WITHOUT_TORCH = ["config", "errors", "planner", "recipes", "records", "report", "cli"]


def test_the_public_names_are_frozen() -> None:
    assert sorted(consilium.__all__) == PUBLIC
    assert dir(consilium) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(consilium, name) is not None


def test_type_checkers_see_the_names_where_they_live() -> None:
    tree = ast.parse((ROOT / "src/consilium/__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted([*seen, "__version__"]) == PUBLIC
    assert not {name: home for name, home in seen.items() if getattr(consilium, name).__module__ != home}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rooter'"):
        _ = consilium.rooter


@pytest.mark.parametrize("package", ["", *(f".{name}" for name in WITHOUT_TORCH)])
def test_importing_it_does_not_import_torch(package: str) -> None:
    code = f"import sys, consilium{package}; print(sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
