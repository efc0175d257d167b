"""What every configuration class shares: frozen, keyword-only, unknown keys refused."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid")
