"""What a user asks of the engine and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from consilium.errors import ConsiliumError

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """``temperature=0`` is greedy; the other defaults switch their filters off.

    Filters apply as in transformers: repetition penalty (2019, arXiv 1909.05858 section 4.1; it also moves
    greedy text), temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    """Keep what is at least this times as likely as the likeliest token."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of the tokens in the prompt and the answer."""
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
        if not 0 <= self.min_p <= 1:
            raise ConsiliumError(f"min_p {self.min_p} is out of range; use 0 (off) to 1.")
        if not 0 < self.repetition_penalty <= 100:
            raise ConsiliumError(
                f"repetition_penalty {self.repetition_penalty} is out of range; use a factor above 0,"
                " 1 is off."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate: all that decides its tokens beside the weights."""

    prompt: tuple[int, ...] | str
    max_tokens: int | None = None
    """New tokens at most; None goes on until the model ends the text or its length is full."""
    sampling: Sampling = Sampling()
    sample: int = 0
    """Which sample of the same prompt this is: tokens are drawn from a stream of (seed, sample) alone."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; neither they nor what follows them is part of its text."""
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end the answer and have no text; None for those of the model's files or its tokenizer."""

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ConsiliumError("a stop text is empty and would end every answer at once; leave it out.")


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token as it leaves the engine."""

    request: int
    """What ``submit`` returned; from ``generate``, the index of the prompt."""
    token: int
    text: str
    """What the token adds to the text; may be empty while a character or a stop text is incomplete.

    '' without a tokenizer.
    """
    logprob: float
    """Natural log of the token's probability before penalty, temperature and filters."""
    finished: Finish | None
    """None, 'stop' (end token or stop text) or 'length'."""
