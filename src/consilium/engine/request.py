"""What a user asks of the engine and what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

from torch import Tensor

from consilium.engine.routes import Routes
from consilium.engine.steering import Steering
from consilium.errors import ConsiliumError

Finish = Literal["stop", "length", "error"]
Pooling = Literal["mean", "last"]
MOST_TOP: Final = 100
LEAST_PENALTY: Final = 0.01
"""Of repetition: far below it quotients of logits are no numbers."""


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
    presence_penalty: float = 0.0
    """Taken off the logits of the tokens in the answer."""
    frequency_penalty: float = 0.0
    """The same for each time that a token is there."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens and what is added to their logits, before all else."""
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
        if not LEAST_PENALTY <= self.repetition_penalty <= 100:
            raise ConsiliumError(
                f"repetition_penalty {self.repetition_penalty} is out of range; use a factor of"
                f" {LEAST_PENALTY} to 100, 1 is off."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ConsiliumError(f"{name} {getattr(self, name)} is out of range; use -2 to 2, 0 is off.")
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise ConsiliumError(
                    f"the logit bias {bias} of token {token} is out of range; use -100 to 100."
                )


class Matching(Protocol):
    """One answer on its way through a form."""

    def allowed(self) -> Tensor:
        """Bool [V]: tokens that may follow, on the CPU."""
        ...

    def accept(self, token: int) -> None: ...

    @property
    def may_end(self) -> bool: ...

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow."""
        ...


class Constraint(Protocol):
    """A form that answers have to have."""

    def begin(self) -> Matching: ...


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
    constraint: Constraint | None = None
    """The form that the answer has to have."""
    top: int = 0
    """How many of the likeliest tokens are told with each token."""
    scores_prompt: bool = False
    """Whether the tokens of the prompt are told with the first piece, as likely as they were."""
    routes: bool = False
    """Whether each piece tells which experts computed the tokens that led to it."""
    steering: Steering | None = None
    """What is forced on routing."""
    pools: Pooling | None = None
    """What of the prompt's last states is told with the only piece, instead of an answer."""
    salt: bytes = b""
    """Requests share what is computed for their prompts with those of the same salt alone."""

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ConsiliumError("a stop text is empty and would end every answer at once; leave it out.")
        if not 0 <= self.top <= MOST_TOP:
            raise ConsiliumError(f"the likeliest {self.top} tokens cannot be told; ask for 0 to {MOST_TOP}.")

    @property
    def whole_salt(self) -> bytes:
        return self.salt if self.steering is None else self.salt + self.steering.salt

    @property
    def reads_all(self) -> bool:
        """Whether every token of the prompt has to be computed for this request alone."""
        return self.scores_prompt or self.routes or self.pools is not None


def requests_of(common: Request, prompts: Iterable[Sequence[int] | str]) -> list[Request]:
    """A request a prompt, else alike; the same prompt for the n-th time is its n-th sample."""
    requests, equal = list[Request](), Counter[tuple[int, ...] | str]()
    for prompt in prompts:
        given = prompt if isinstance(prompt, str) else tuple(prompt)
        requests.append(replace(common, prompt=given, sample=equal[given]))
        equal[given] += 1
    return requests


Top = tuple[tuple[int, float], ...]
"""The likeliest tokens and natural logs of their probabilities, before penalty, temperature and filters."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A token of a prompt."""

    token: int
    logprob: float | None
    """Natural log of its probability after those before it; None for the first."""
    top: Top = ()


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
    """None, 'stop' (end token or stop text), 'length', or 'error' of a request that cannot go on."""
    top: Top = ()
    prompt: tuple[Scored, ...] = ()
    """Of the first piece, where that was asked for."""
    routes: Routes | None = None
    """Of the prompt with the first piece, then of the token before, where that was asked for."""
    error: ConsiliumError | None = None
    """Why it cannot; what Python raised is its cause."""
    state: tuple[float, ...] = ()
    """What was pooled, of length 1 in all."""
    cached: int = 0
    """Tokens of the prompt that were not computed for this request, because others began with the same."""
