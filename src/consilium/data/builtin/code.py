"""Standard-library source and the docstrings in it, read from the running Python and never imported."""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from consilium.data.documents import Text, stable_fraction
from consilium.errors import ConsiliumError

# Tests are not written to be read, ``encodings`` is tables, ``pydoc_data`` is the prose domain itself,
# ``lib2to3`` repeats ``tokenize`` and would put held-out text into training.
SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"}
    | {"__pycache__", "__phello__"}
)
CODE_BYTES = 6_000_000
QUESTION_BYTES = 500_000
SHORTEST_ANSWER = 40


@dataclass(frozen=True, slots=True)
class Module:
    path: str
    """Relative to the library, with forward slashes: ``json/decoder.py``."""
    source: str


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def read_modules(root: Path, limit: int = CODE_BYTES) -> list[Module]:
    """Read modules below ``root`` in the order of the hash of their paths until ``limit`` bytes.

    Raises ConsiliumError where the Python has no sources (embedded and zipped distributions).
    """
    modules: list[Module] = []
    total = 0
    for path in sorted(_source_paths(root), key=lambda path: (stable_fraction(path, salt="choice"), path)):
        source = _read(root / path)
        if source.strip():
            modules.append(Module(path, source))
        total += len(source)
        if total >= limit:
            break
    if not modules:
        raise ConsiliumError(
            f"the built-in text needs the sources of the standard library and {root} has none (an embedded or"
            " zipped Python); use a full Python or give your own text with --data PATH."
        )
    return modules


def _source_paths(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in SKIPPED and not name.startswith("config-")
        )
        for name in names:
            # The build's own configuration names the machine that compiled this Python.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def code_texts(modules: Sequence[Module]) -> list[Text]:
    return [Text(module.source, "code", module.path, module.path) for module in modules]


def question_texts(modules: Sequence[Module], limit: int = QUESTION_BYTES) -> list[Text]:
    """Pair names with their docstrings, a text a module, until ``limit`` characters.

    The unit is the module's, so that no docstring trains whose source is held out, nor the other way round.
    """
    texts: list[Text] = []
    total = 0
    for module in modules:
        pairs = "".join(_question(*found) for found in _docstrings(module))
        if pairs:
            texts.append(Text(pairs, "qa", f"{module.path} docstrings", module.path))
        total += len(pairs)
        if total > limit:
            break
    return texts


def _question(name: str, kind: str, answer: str) -> str:
    match kind:
        case "module":
            question = f"What is the module {name} for?"
        case "class":
            question = f"What is the class {name}?"
        case _:
            question = f"What does {name} do?"
    return f"Q: {question}\nA: {answer}\n\n"


def _docstrings(module: Module) -> Iterator[tuple[str, str, str]]:
    """Yield (qualified name, kind, docstring) of the module and of its classes and functions, in order."""
    try:
        tree = ast.parse(module.source)
    except (SyntaxError, ValueError):
        return
    name = module.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    yield from _documented(tree, name, "module")


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, kind: str
) -> Iterator[tuple[str, str, str]]:
    text = ast.get_docstring(node)
    if text is not None and len(text) >= SHORTEST_ANSWER:
        yield name, kind, text
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, f"{name}.{child.name}", "class")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}", "function")
