"""What a user asks of the engine and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

from consilium.errors import ConsiliumError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """``temperature=0`` is greedy. ``top_k=0`` and ``top_p=1`` switch those filters off.

    A row draws from its own stream, made of the seed and of how many prompts before it in the same call are
    equal to its own: other prompts change nothing, and the same prompt n times gives n samples.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ConsiliumError(f"temperature {self.temperature} is out of range; use 0 (greedy) to 100.")
        if self.top_k < 0:
            raise ConsiliumError(
                f"top_k {self.top_k} is negative; use 0 (off) or the number of tokens to keep."
            )
        if not 0 < self.top_p <= 1:
            raise ConsiliumError(f"top_p {self.top_p} is out of range; use a probability above 0, 1 is off.")


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token as it leaves the engine."""

    request: int
    """Index of the prompt."""
    token: int
    text: str
    """What the token adds to the text; may be empty while a character is incomplete.

    '' without a tokenizer.
    """
    logprob: float
    """Natural log of the token's probability before temperature and filters."""
    finished: str | None
    """None, 'stop' (end token or stop text) or 'length'."""
