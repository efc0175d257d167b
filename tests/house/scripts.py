"""A script of this repository as a module, so that tests can call its functions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from house.tree import ROOT


@contextmanager
def loaded(path: str) -> Iterator[ModuleType]:
    """Import ``path``, which may import its neighbours, and forget it afterwards."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        patch.syspath_prepend((ROOT / path).parent)
        spec.loader.exec_module(module)
        yield module
