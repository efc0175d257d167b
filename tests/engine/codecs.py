"""A codec for tests of the engine: tokens are bytes, and 256 opens and ends the text."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from types import MappingProxyType


class Bytes:
    eos_id = 256
    opening_id: int | None = 256
    known_ids = range(257)
    markers: Mapping[str, int] = MappingProxyType({"<end>": 256})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def stream(self) -> ByteStream:
        return ByteStream()


class ByteStream:
    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(bytes([token]) if token < 256 else b"")

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)
