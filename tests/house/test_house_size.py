"""Functions and files stay small. The limits may fall, never rise."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator

import pytest

from house.tree import Source, sources

MEDIAN_FUNCTION = 10
USUAL_FUNCTION = 40
LONGEST_FUNCTION = 60
LONGEST_FILE = 400
LONGEST_RECIPE = 120


def function_lengths(source: Source) -> Iterator[tuple[int, str]]:
    """Lines from ``def`` to the end, the docstring not counted."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            yield lines, f"{source.name}:{node.lineno} {node.name}"


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    match node.body[0]:
        case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
            return last - first + 1
        case _:
            return 0


@pytest.mark.parametrize("folder", ["src", "tests", "bench"])
def test_functions_are_short(folder: str) -> None:
    lengths = sorted(length for source in sources(folder) for length in function_lengths(source))
    too_long = [f"{where} has {lines} lines" for lines, where in lengths if lines > LONGEST_FUNCTION]
    assert not too_long
    assert not lengths or statistics.median(lines for lines, _ in lengths) <= MEDIAN_FUNCTION
    above = [where for lines, where in lengths if lines > USUAL_FUNCTION]
    assert len(above) <= 0.05 * len(lengths), above


def test_files_are_short() -> None:
    lines = {source.name: source.text.count("\n") for source in sources("src", "tests", "bench", "docs")}
    assert not {name: count for name, count in lines.items() if count > LONGEST_FILE}


def test_a_recipe_fits_on_two_screens() -> None:
    lines = {source.name: source.text.count("\n") for source in sources("src/consilium/recipes")}
    assert not {name: count for name, count in lines.items() if count > LONGEST_RECIPE}
