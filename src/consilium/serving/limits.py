"""What a server takes of one request and of all together. Everything is checked before memory is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

BODY: Final = 4 * 2**20
"""Bytes of a request."""
BODY_SECONDS: Final = 10.0
"""In which they have to be there."""
HEADERS: Final = 64
HEADER_BYTES: Final = 16 * 2**10
HEADER_SECONDS: Final = 10.0
"""In which those of a request have to be there, from its first byte or from the connection on."""
DEPTH: Final = 64
"""Of lists and objects in one another."""
PROMPTS: Final = 256
"""In one request; lm-evaluation-harness sends its batches so."""
SAMPLES: Final = 8
"""``n`` and ``best_of``."""
TOP: Final = 20
"""``logprobs`` and ``top_logprobs``."""
STOPS: Final = 16
STOP_CHARACTERS: Final = 256
BIASES: Final = 1024
FORM_CHARACTERS: Final = 2**16
"""Of a schema, a regular expression, or all choices."""
MUTED: Final = 4096
"""Experts of all layers."""
MESSAGES: Final = 1024
TOOLS: Final = 128
CALLS: Final = 128
"""Of tools, in one message."""
COMPLETION_TOKENS: Final = 16
"""New tokens of a completion that names no number, as with OpenAI; a chat goes on to the model's length."""
COMMENT_SECONDS: Final = 5.0
"""After which a stream without anything to say says so, lest a client or proxy gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server is set up."""

    name: str
    """Of the model, as clients ask for it."""
    keys: tuple[str, ...] = ()
    """One of them opens every path but /health; without any all is open."""
    most_waiting: int = 64
    """Sequences that may wait for their turn; more are refused."""
    seconds: float = 600.0
    """That a request may take in all."""
    drain_seconds: float = 30.0
    """That running requests have when the server is told to stop."""
    runs: Path | None = None
    """The folder of training runs that the page shows."""
    place: Path = Path()
    """Below which the page looks for models to plan."""
