"""What the package never does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from house.tree import ROOT, Source, dotted, imports, sources

PACKAGE = sources("src")
RUNS_FOREIGN_CODE = ("marshal", "shelve", "dill", "cloudpickle", "joblib")
GOES_TO_THE_NETWORK = (
    "aiohttp",
    "ftplib",
    "http.client",
    "httpx",
    "huggingface_hub",
    "requests",
    "urllib.request",
    "urllib3",
)
BANNED_CALLS = frozenset({"hasattr", "yaml.load", "yaml.unsafe_load"})
"""Ruff refuses eval, exec, global statements, pickle, torch.load and torch.save."""
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
PLACE_ON_A_MACHINE = re.compile(r"(?<![\w.:/])/(?:home|opt|root|work|Users)/\w")


def imported(source: Source, banned: tuple[str, ...]) -> Iterator[str]:
    for line, name in imports(source.tree):
        if any(name == root or name.startswith(f"{root}.") for root in banned):
            yield f"{source.name}:{line} imports {name}"


@pytest.mark.parametrize("banned", [RUNS_FOREIGN_CODE, GOES_TO_THE_NETWORK], ids=["pickle", "network"])
def test_no_import_runs_foreign_code_or_goes_to_the_network(banned: tuple[str, ...]) -> None:
    assert not [found for source in PACKAGE for found in imported(source, banned)]


def test_no_banned_call() -> None:
    assert not [
        f"{source.name}:{node.lineno} calls {dotted(node.func)}"
        for source in PACKAGE
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and dotted(node.func) in BANNED_CALLS
    ]


def test_no_option_allows_pickle_or_remote_code() -> None:
    assert not [
        f"{source.name}:{node.value.lineno} sets {node.arg}"
        for source in PACKAGE
        for node in ast.walk(source.tree)
        if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}
        if ast.unparse(node.value) != "False"
    ]


def test_only_parallel_uses_torch_distributed() -> None:
    elsewhere = [source for source in PACKAGE if source.package != "parallel"]
    assert not [found for source in elsewhere for found in imported(source, ("torch.distributed",))]
    assert not [
        f"{source.name}:{node.lineno} uses torch.distributed"
        for source in elsewhere
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed"
    ]


def test_only_lazy_files_hide_imports_from_run_time() -> None:
    """The import contract does not see hidden imports, and a hidden import can hide a circle.

    The public face and the verbs, which import when they run, lie above everything and can close none.
    """
    hidden = [source.name for source in PACKAGE if "TYPE_CHECKING" in source.text and source.package != "cli"]
    assert hidden == ["src/consilium/__init__.py"]


def test_functions_import_only_in_the_command() -> None:
    assert not [
        f"{source.name}:{inner.lineno} imports inside a function"
        for source in PACKAGE
        if source.package != "cli"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]


def test_no_forward_stores_what_it_computed() -> None:
    """Recomputation would store twice; values that outlive a pass are returned."""
    assert not [
        f"{source.name}:{target.lineno} sets self.{target.attr} in forward"
        for source in PACKAGE
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef) and node.name == "forward"
        for inner in ast.walk(node)
        if isinstance(inner, ast.Assign | ast.AugAssign | ast.AnnAssign)
        for target in ([*inner.targets] if isinstance(inner, ast.Assign) else [inner.target])
        if isinstance(target, ast.Attribute) and dotted(target.value) == "self"
    ]


def test_nothing_is_left_for_later_and_no_path_of_one_machine() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in text_files()}
    for pattern in (UNFINISHED, PLACE_ON_A_MACHINE):
        found = {
            str(path.relative_to(ROOT)): hit.group()
            for path, text in texts.items()
            if (hit := pattern.search(text))
        }
        assert not found


def text_files() -> Iterator[Path]:
    for folder in ("src", "tests", "bench", "docs"):
        for suffix in ("py", "md", "toml", "yaml", "json", "html", "css", "js"):
            yield from (ROOT / folder).rglob(f"*.{suffix}")
    yield from ROOT.glob("*.md")
    yield from (ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run"))
