"""Shares of the domains that follow the losses: state of a run, exact on a resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from consilium.checkpoint import store
from consilium.config.data import Data, Dynamic, Losses, Measured, Reference
from consilium.data.loader import Loader
from consilium.data.mixture import next_shares
from consilium.errors import ConsiliumError, nearest
from consilium.model.decoder import Decoder

LossesOf = Callable[[Decoder], Mapping[str, float]]
"""Held-out nats a token of a model, by domain."""


@dataclass(frozen=True, slots=True)
class Reweighted:
    """The shares from a step on."""

    step: int
    """Steps done before."""
    row: int
    shares: Mapping[str, float]


@dataclass(slots=True)
class Mixing:
    """What a loader cannot know from the step alone."""

    reference: Mapping[str, float] | None = None
    changes: list[Reweighted] = field(default_factory=list)

    def to_json(self) -> str:
        """Numbers come back bit for bit."""
        changes = [[change.step, change.row, dict(change.shares)] for change in self.changes]
        return json.dumps({"reference": self.reference, "changes": changes})

    @staticmethod
    def from_json(text: str) -> Mixing:
        found: dict[str, Any] = json.loads(text)
        return Mixing(found["reference"], [Reweighted(*change) for change in found["changes"]])

    def apply(self, loader: Loader) -> None:
        """Repeat in a fresh loader what was changed."""
        for change in self.changes:
            loader.change_shares(change.row, change.shares)


def mix(
    data: Data, mixing: Mixing, loader: Loader, model: Decoder, at: tuple[int, int], losses: LossesOf
) -> bool:
    """Before a step, ``at`` it and its first row: change the shares where it is time, and return whether.

    What is due and on record already, because a run goes on there, stays as it is.
    """
    if not isinstance(data.mixture, Dynamic):
        return False
    step, row = at
    if mixing.reference is None:
        mixing.reference = _reference(data.mixture, loader, model, losses)
    newest = mixing.changes[-1].step if mixing.changes else 0
    if step % data.mixture.every or step <= newest:
        return False
    shares = mixing.changes[-1].shares if mixing.changes else loader.asked
    changed = next_shares(data.mixture, shares, losses(model), mixing.reference)
    mixing.changes.append(Reweighted(step, row, changed))
    loader.change_shares(row, changed)
    return True


def _reference(dynamic: Dynamic, loader: Loader, model: Decoder, losses: LossesOf) -> Mapping[str, float]:
    found = _given_or_measured(dynamic.reference, model, losses)
    for domain in loader.domains:
        if domain not in found:
            raise ConsiliumError(
                f"data.mixture: there is no reference loss of the domain {domain!r}.{nearest(domain, found)}"
            )
    return dict(found)


def _given_or_measured(reference: Reference, model: Decoder, losses: LossesOf) -> Mapping[str, float]:
    match reference:
        case Losses(losses=found):
            return found
        case Measured(path=None):
            return losses(model)
        case Measured():
            return losses(_other(str(reference.path), model))


def _other(path: str, model: Decoder) -> Decoder:
    other = store.load(path, dtype="float32", device=str(next(model.parameters()).device)).eval()
    if other.config.vocab_size != model.config.vocab_size:
        raise ConsiliumError(
            f"data.mixture: the reference model {path} has a vocabulary of {other.config.vocab_size} tokens"
            f" and the run {model.config.vocab_size}; their losses are of other tokens."
        )
    return other
