"""The keys of a foreign config.json, each checked when it is read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from consilium.errors import ConsiliumError

_LARGEST: Final = 2**48


@final
@dataclass(frozen=True, slots=True)
class Keys:
    """``values`` by the names of one family, its defaults among them; null is None.

    Every method raises ConsiliumError naming the key whose value it cannot be.
    """

    path: Path
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def number(self, key: str, least: int = 1) -> int:
        value = self.values[key]
        if type(value) is not int or not least <= value < _LARGEST:
            raise self.wrong(key, "a positive whole number" if least else "0 or a positive whole number")
        return value

    def number_or(self, key: str, default: int) -> int:
        """``default`` where the key is null."""
        return self.number(key) if self.values[key] is not None else default

    def real(self, key: str) -> float:
        value = self.values[key]
        if type(value) not in {int, float} or not 0 < value < _LARGEST:
            raise self.wrong(key, "a positive number")
        return float(value)

    def coefficient(self, key: str) -> float:
        """0 where the key is null."""
        return self.real(key) if self.values[key] else 0.0

    def flag(self, key: str) -> bool:
        """False where the key is null, as code that asks ``if`` takes it."""
        value = self.values[key]
        if value is not None and type(value) is not bool:
            raise self.wrong(key, "true or false")
        return bool(value)

    def choice(self, key: str, *known: str) -> str:
        value = self.values[key]
        if value not in known:
            raise self.unsupported(key)
        return value

    def listed(self, key: str) -> list[Any]:
        """Empty where the key is null."""
        value = [] if self.values[key] is None else self.values[key]
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def wrong(self, key: str, wanted: str) -> ConsiliumError:
        return ConsiliumError(
            f"{self.path}: {key} is {repr(self.values[key])[:60]} and must be {wanted}; restore the file."
        )

    def unsupported(self, key: str, value: object = None) -> ConsiliumError:
        return unsupported(self.path, key, self.values[key] if value is None else value)


def unsupported(path: Path, key: str, value: object) -> ConsiliumError:
    return ConsiliumError(f"{path}: {key} {str(value)[:60]!r} is not computed here; use a model without it.")
