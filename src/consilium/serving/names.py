"""Names of this machine, as it alone knows them."""

from __future__ import annotations

from typing import Final

LOOPBACK: Final = "127.0.0.1"
OWN_NAMES: Final = frozenset({"localhost", LOOPBACK, "[::1]"})
"""Of a server that this machine alone reaches: a web page elsewhere may resolve its own name to it."""
