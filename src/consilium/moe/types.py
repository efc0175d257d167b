"""Values that travel between the stages of an MoE layer.

Legend: T tokens (flat, documents packed), D hidden size, E routed experts, K most experts a token may use,
R rows = kept (token, expert) pairs sorted by expert, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from consilium.errors import ConsiliumError


@dataclass(frozen=True, slots=True)
class Tokens:
    """What routing may know of the tokens beside their vectors."""

    ids_T: Tensor
    """int64 token ids, for hash routing."""
    sequence_T: Tensor
    """int64 in [0, sequences): which sequence of the micro-batch, for per-sequence losses and exemptions."""
    position_T: Tensor
    """int64 position inside the token's own document."""
    valid_T: Tensor
    """bool; padding is False and takes part in nothing."""

    @property
    def count(self) -> int:
        return self.ids_T.shape[0]


@dataclass(frozen=True, slots=True)
class Override:
    """Interventions on routing. Absent fields change nothing; ``Routing.replay`` fills in the last four."""

    mute_TE: Tensor | None = None
    """bool [T or 1, E]: experts that may not be selected."""
    k_T: Tensor | None = None
    """int64 [T or 1]: a budget of experts a token, at most the router's K."""
    experts_TK: Tensor | None = None
    """int64 [T, K]: replay; weights are recomputed from the live scores of these experts."""
    keep_TK: Tensor | None = None
    """bool [T, K]: which replayed choices are used; admission then decides nothing. Where absent, it does."""
    wanted_TK: Tensor | None = None
    """bool [T, K]: which the router used before admission, for losses; ``keep_TK`` where absent."""
    considered_TK: Tensor | None = None
    """bool [T, K]: over which weights are normalised; ``wanted_TK`` where absent."""

    def check(self, tokens: int) -> None:
        """Raise ConsiliumError for a field that does not fit a pass of ``tokens`` tokens."""
        masks = {"keep_TK": self.keep_TK, "wanted_TK": self.wanted_TK, "considered_TK": self.considered_TK}
        for name, mask_TK in masks.items():
            if mask_TK is not None and (self.experts_TK is None or mask_TK.shape != self.experts_TK.shape):
                raise ConsiliumError(f"override.{name} needs experts_TK of its own shape; give both.")
        for name, value, every in (
            ("mute_TE", self.mute_TE, (1, tokens)),
            ("k_T", self.k_T, (1, tokens)),
            ("experts_TK", self.experts_TK, (tokens,)),
        ):
            if value is not None and value.shape[0] not in every:
                one = " or one for all" if 1 in every else ""
                raise ConsiliumError(
                    f"override.{name} has {value.shape[0]} rows but the pass routes {tokens} tokens;"
                    f" give a row for each of them{one}."
                )


class Observer(Protocol):
    """Sees values that live inside a layer, such as what GPTQ, REAP or activation x gradient need."""

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None: ...

    def rows(self, layer: int, rows: Rows, hidden_RF: Tensor, output_RD: Tensor) -> None:
        """Rows into the experts, their hidden activations before the last matrix, and their outputs."""
        ...


@dataclass(frozen=True, slots=True)
class Mode:
    """How a pass runs: noise and drops only in training; overrides and observers in either."""

    training: bool = False
    generator: torch.Generator | None = None
    override: Override | Mapping[int, Override] | None = None
    """For every MoE layer, or by the index of its block (``Model.moe_layers``); the others stay free."""
    observer: Observer | None = None
    earlier: Mapping[int, Tensor] | None = None
    """int64 [E] by index of the MoE layer: copies chosen in earlier micro-batches of the optimizer step."""

    def at(self, layer: int) -> Mode:
        """The mode as one layer reads it: with its own override."""
        if isinstance(self.override, Mapping):
            return replace(self, override=self.override.get(layer))
        return self

    @property
    def own_override(self) -> Override:
        """What a layer does about overrides, after ``at``."""
        assert not isinstance(self.override, Mapping), "overrides by layer are resolved by the layer"
        return self.override or Override()


@dataclass(frozen=True, slots=True)
class Routing:
    """A router's decision. Which copies are used is said by ``keep_TK`` alone; padding keeps nothing."""

    logits_TE: Tensor
    """float32 after transforms and noise: what scores were made of."""
    scores_TE: Tensor
    """float32, without selection bias."""
    experts_TK: Tensor
    """int64, in falling order of preference; ids at positions not kept are valid but unused."""
    weights_TK: Tensor
    """float32 with gradient; zero where not kept by the router."""
    keep_TK: Tensor
    """bool."""
    clean_TE: Tensor
    """float32 logits before learned noise and transforms; jitter is already in the input.

    Where two gates decide one after the other, logits are the logarithms of joint probabilities.
    """
    chance_TE: Tensor | None = None
    """float32 with gradient, where noise is learned: each expert's smooth chance to be chosen.

    Its sum over valid tokens is the load whose variation the load loss measures.
    """
    weight_on_input: bool = False
    wanted_TK: Tensor | None = None
    """bool: what the router used before admission; ``keep_TK`` where absent."""
    considered_TK: Tensor | None = None
    """bool: over which weights were normalised; ``wanted_TK`` where absent."""

    def load_E(self) -> Tensor:
        """int64 [E] kept copies an expert."""
        return torch.bincount(self.experts_TK[self.keep_TK], minlength=self.logits_TE.shape[1])

    def replay(self) -> Override:
        """The override that repeats this decision: same experts, drops and losses, live scores.

        A whole pass repeats with ``Mode(override={layer: routing.replay(), ...})`` and the same noise.
        """
        return Override(
            experts_TK=self.experts_TK,
            keep_TK=self.keep_TK,
            wanted_TK=self.wanted_TK,
            considered_TK=self.considered_TK,
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """Kept copies sorted by expert, each expert's in token order."""

    x_RD: Tensor
    counts_E: tuple[int, ...]
    """Rows of each local expert; sums to R."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What combine needs to bring rows back to their tokens."""

    token_R: Tensor
    """int64: the token of each row."""
    weight_R: Tensor
    """float32 with gradient; ones where the weight was put on the input."""
    row_R: Tensor
    """int64: all rows, listed by token and then by choice: the fixed order in which a token adds them up."""
    first_T: Tensor
    """int64: where each token's rows begin in ``row_R``."""

    @property
    def tokens(self) -> int:
        return self.first_T.shape[0]


@dataclass(frozen=True, slots=True)
class Report:
    """What one layer says about its routing in one pass: values, so that recomputation cannot count twice."""

    losses: Mapping[str, Tensor]
    """Named balance losses, coefficients included, float32 scalars with gradient."""
    load_E: Tensor
    """int64 kept copies an expert."""
    wanted_E: Tensor
    """int64 copies that the router chose before admission; their difference from the load was dropped."""
    entropy: Tensor
    """float32 scalar, no gradient: mean over valid tokens of the entropy of normalised scores, in nats."""
    tokens: Tensor
    """int64 scalar: valid tokens."""

    @property
    def dropped(self) -> Tensor:
        return self.wanted_E.sum() - self.load_E.sum()
