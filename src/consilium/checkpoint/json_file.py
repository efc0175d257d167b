"""Reading what lies beside the weights in a folder that somebody else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from consilium.errors import ConsiliumError

LARGEST: Final = 16 * 2**20


def read_bytes(path: Path) -> bytes:
    """Return what is in ``path``. Raises ConsiliumError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in ``path``. Raises ConsiliumError when it is absent, huge, or not a JSON object."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        data = json.loads(text) if len(text) <= LARGEST else None
    except FileNotFoundError:
        raise ConsiliumError(f"there is no {path.absolute()}; give the folder of a saved model.") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, RecursionError):
        raise ConsiliumError(f"{path} is not valid JSON; restore it or download it again.") from None
    if not isinstance(data, dict):
        raise ConsiliumError(
            f"{path} is not a JSON object of at most {LARGEST} bytes; restore it or download it again."
        )
    return data


def _unreadable(path: Path, error: OSError) -> ConsiliumError:
    return ConsiliumError(f"cannot read {path} ({(error.strerror or 'error').lower()}); check the folder.")
