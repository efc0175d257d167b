"""Functions whose result compiled graphs take for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")
FIXED = "_dynamo_marked_constant"
"""What ``torch.compiler.assume_constant_result`` sets. The decorator itself imports the compiler, 130 MB and
seconds, into every process that never compiles; a test of compiled graphs says when this name changes."""


def constant(function: Callable[[], _T]) -> Callable[[], _T]:
    """For what a machine has or has not, which no graph is to ask again."""
    setattr(function, FIXED, True)
    return function
