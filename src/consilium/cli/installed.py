"""What a verb needs beside the package."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from consilium.errors import ConsiliumError

SERVED: Final = ("fastapi", "llguidance", "prometheus_client", "uvicorn")
"""What the extra ``serve`` brings."""


def check_installed(verb: str) -> None:
    """Raise ConsiliumError where ``verb`` cannot serve."""
    missing = [name for name in SERVED if find_spec(name) is None]
    if missing:
        raise ConsiliumError(
            f"{verb} needs {', '.join(missing)}, which are not installed; pip install 'consilium-moe[serve]'."
        )
