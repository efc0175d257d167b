"""Values that travel between the stages of an MoE layer.

Legend: T tokens (flat, documents packed), D hidden size, E routed experts, K most experts a token may use,
R rows = kept (token, expert) pairs sorted by expert, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final, Protocol, Self, final

import torch
from torch import Tensor

from consilium.errors import ConsiliumError
from consilium.ops.counting import occurrences
from consilium.ops.rows import Rows


@dataclass(frozen=True, slots=True)
class Tokens:
    """What routing may know of the tokens beside their vectors."""

    ids_T: Tensor
    """int64 token ids, for hash routing."""
    sequence_T: Tensor
    """int64 in [0, sequences): which document of the micro-batch, for per-sequence losses and exemptions."""
    position_T: Tensor
    """int64 position inside the token's own document."""
    valid_T: Tensor
    """bool; padding is False and takes part in nothing."""
    row_T: Tensor | None = None
    """int64: the row of the micro-batch, where documents are packed into rows; else a document is a row."""
    sequences: int | None = None
    """Known without asking the device; None where there are at most as many as tokens."""

    @property
    def count(self) -> int:
        return self.ids_T.shape[0]

    @property
    def most_sequences(self) -> int:
        return max(self.count, 1) if self.sequences is None else self.sequences

    def part(self, begin: int, end: int) -> Tokens:
        """Some consecutive ones, whose sequences keep their numbers."""
        row_T = None if self.row_T is None else self.row_T[begin:end]
        ids_T, sequence_T, position_T, valid_T = (
            of_T[begin:end] for of_T in (self.ids_T, self.sequence_T, self.position_T, self.valid_T)
        )
        return Tokens(ids_T, sequence_T, position_T, valid_T, row_T, self.sequences)


@dataclass(frozen=True, slots=True)
class Replay:
    """A decision to repeat: an expert a choice and how far the choice came, a small number each."""

    experts_TK: Tensor
    """int64 [T, K]; weights are recomputed from the live scores of these experts."""
    reached_TK: Tensor
    """uint8 [T, K]: 0 not chosen, then one of ``CONSIDERED``, ``WANTED`` and ``KEPT``."""

    @staticmethod
    def of(experts_TK: Tensor) -> Replay:
        """The decision that uses every one of these experts."""
        return Replay(experts_TK, torch.full_like(experts_TK, KEPT, dtype=torch.uint8))


CONSIDERED: Final = 1
"""Weights were normalised over it, and it took a place in a capacity."""
WANTED: Final = 2
"""The router used it: balance counts it."""
KEPT: Final = 3
"""Admission let it pass: it is computed."""


@dataclass(frozen=True, slots=True)
class Override:
    """Interventions on routing. Absent fields change nothing."""

    mute_TE: Tensor | None = None
    """bool [T or 1, E]: experts that may not be selected."""
    k_T: Tensor | None = None
    """int64 [T or 1]: a budget of experts a token, at most the router's K."""
    replay: Replay | None = None
    """``Routing.replay`` of an earlier pass; router and admission then decide nothing."""

    def check(self, tokens: int) -> None:
        """Raise ConsiliumError for a field that does not fit a pass of ``tokens`` tokens."""
        replay = self.replay
        if replay is not None and replay.reached_TK.shape != replay.experts_TK.shape:
            raise ConsiliumError("override.replay needs a reached_TK of the shape of its experts_TK.")
        for name, value, every in (
            ("mute_TE", self.mute_TE, (1, tokens)),
            ("k_T", self.k_T, (1, tokens)),
            ("replay", None if replay is None else replay.experts_TK, (tokens,)),
        ):
            if value is not None and value.shape[0] not in every:
                one = " or one for all" if 1 in every else ""
                raise ConsiliumError(
                    f"override.{name} has {value.shape[0]} rows but the pass routes {tokens} tokens;"
                    f" give a row for each of them{one}."
                )


@dataclass(frozen=True, slots=True)
class Activations:
    """What went through the experts, in the graph and in the order of the rows."""

    input_RD: Tensor
    hidden_RF: Tensor
    """Before the last matrix."""
    output_RD: Tensor
    """Unweighted."""


class Observer(Protocol):
    """Sees values that live inside a layer, such as what GPTQ, REAP or activation x gradient need."""

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None: ...

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        """Which rows the experts had, and what went through them."""
        ...


@final
@dataclass(frozen=True, slots=True)
class LayerObserver:
    """An observer told which layer speaks."""

    observer: Observer
    layer: int

    def routing(self, routing: Routing, tokens: Tokens) -> None:
        self.observer.routing(self.layer, routing, tokens)

    def rows(self, rows: Rows, activations: Activations) -> None:
        self.observer.rows(self.layer, rows, activations)


Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor, mostly of counts, over all ranks of a step. Every rank asks in the same order."""


def alone(values: Tensor) -> Tensor:
    """The sum over one rank."""
    return values


@final
@dataclass(frozen=True, slots=True)
class Chosen:
    """Where the tokens of a layer went."""

    experts_TK: Tensor
    """int64; -1 where a copy went nowhere."""
    weights_TK: Tensor
    """float32."""
    second_T: Tensor | None = None
    """int64: the expert that was closest to being used, in whatever group it is; -1 where all were."""
    margin_T: Tensor | None = None
    """float32: by how much what was compared is lower than that of the last one used; 0 where all were.

    Below 0 where a group was closed to a better one.
    """


@final
@dataclass(frozen=True, slots=True)
class Counted:
    """What the router of a layer chose, in integers that add up over micro-batches and ranks."""

    wanted_E: Tensor
    """int64 copies of each expert before admission."""
    tokens: Tensor
    """int64 scalar: valid tokens."""
    sent_N: Tensor | None = None
    """int64 tokens that reach each device, where a loss asks."""

    def __add__(self, other: Counted) -> Counted:
        sent_N = None if self.sent_N is None or other.sent_N is None else self.sent_N + other.sent_N
        return Counted(self.wanted_E + other.wanted_E, self.tokens + other.tokens, sent_N)

    def over(self, reduce: Reduce) -> Counted:
        """The sum over all ranks, asked for once."""
        parts = [self.wanted_E, self.tokens[None], *([] if self.sent_N is None else [self.sent_N])]
        wanted_E, tokens, *sent = reduce(torch.cat(parts)).split([len(part) for part in parts])
        return Counted(wanted_E, tokens[0], sent[0] if sent else None)


@dataclass(frozen=True, slots=True)
class Average:
    """What a micro-batch of the optimizer step holds on average, over all of them and all ranks.

    A loss that is a mean over tokens or sequences divides by these, so that micro-batches of different sizes
    add up to the mean over the step.
    """

    tokens: float
    """Valid ones."""
    documents: float
    rows: float
    """With a valid token."""


class Margins(Protocol):
    """By how much tokens of a step prefer each expert to their own limit; sums are those of more tokens."""

    def __add__(self, other: Self) -> Self: ...

    def beyond(self, rank: int, reduce: Reduce) -> Tensor:
        """float32 [E]: of each expert, the (rank + 1)-th highest margin on all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Taken:
    """What an optimizer step tells the balance of a layer, without padding, evaluation or recomputation."""

    wanted_E: Tensor
    """int64 copies that the router chose in all micro-batches, on all ranks.

    Counts after drops would not do: a capacity cuts every wanted expert to one load, and the mean with it.
    """
    dropped_fraction: float = 0.0
    """Of the same, in [0, 1]."""
    margins: Margins | None = None
    """Of all micro-batches on this rank; what they sum goes through ``reduce``."""
    progress: float = 0.0
    """Share of the run's steps that were done before."""
    reduce: Reduce = alone


@dataclass(frozen=True, slots=True)
class LayerMode:
    """How a pass runs in one layer. The stages read this and nothing else of the pass."""

    training: bool = False
    generator: torch.Generator | None = None
    override: Override = Override()
    observer: LayerObserver | None = None
    earlier: Counted | None = None
    whole: Counted | None = None
    average: Average | None = None
    reduce: Reduce = alone
    counts_only: bool = False


@dataclass(frozen=True, slots=True)
class Mode:
    """How a pass runs: noise and drops only in training; overrides and observers in either."""

    training: bool = False
    generator: torch.Generator | None = None
    override: Override | Mapping[int, Override] | None = None
    """For every MoE layer, or by the index of its block (``Model.moe_layers``); the others stay free."""
    observer: Observer | None = None
    earlier: Mapping[int, Counted] | None = None
    """By index of the MoE layer: what this rank chose in earlier micro-batches of the optimizer step."""
    whole: Mapping[int, Counted] | None = None
    """The same of the whole step, over all ranks; None where this pass is all that a rank does in it."""
    average: Mapping[int, Average] | None = None
    """By index of the MoE layer; None for what this micro-batch holds."""
    reduce: Reduce = alone
    """How counts of a step meet those of other ranks."""
    counts_only: bool = False
    """Reports hold loads alone, as a step of decoding needs them, and no losses."""

    def at(self, layer: int) -> LayerMode:
        """The mode as one layer reads it."""
        override = self.override.get(layer) if isinstance(self.override, Mapping) else self.override
        return LayerMode(
            training=self.training,
            generator=self.generator,
            override=override or Override(),
            observer=None if self.observer is None else LayerObserver(self.observer, layer),
            earlier=None if self.earlier is None else self.earlier.get(layer),
            whole=None if self.whole is None else self.whole.get(layer),
            average=None if self.average is None else self.average.get(layer),
            reduce=self.reduce,
            counts_only=self.counts_only,
        )


@dataclass(frozen=True, slots=True)
class Routing:
    """A router's decision. Which copies are used is said by ``keep_TK`` alone; padding keeps nothing.

    Every copy kept is wanted, and every copy wanted is considered.
    """

    logits_TE: Tensor
    """float32 after transforms and noise: what scores were made of."""
    scores_TE: Tensor
    """float32, without selection bias."""
    experts_TK: Tensor
    """int64, in falling order of preference; ids at positions not kept are valid but unused."""
    weights_TK: Tensor
    """float32 with gradient; zero where not wanted."""
    considered_TK: Tensor
    """bool: over which weights are normalised, and which take a place in a capacity."""
    wanted_TK: Tensor
    """bool: what the router uses, before admission; losses and the balance bias read it."""
    keep_TK: Tensor
    """bool: what is used."""
    clean_TE: Tensor
    """float32 logits before learned noise and transforms; jitter is already in the input.

    Where two gates decide one after the other, logits are the logarithms of joint probabilities.
    """
    chance_TE: Tensor | None = None
    """float32 with gradient, where noise is learned: each expert's smooth chance to be chosen.

    Its sum over valid tokens is the load whose variation the load loss measures.
    """
    weight_on_input: bool = False
    values_TE: Tensor | None = None
    """float32 without gradient: what selection compared, before groups and overrides."""

    @property
    def chosen(self) -> Chosen:
        experts_TK = self.experts_TK.masked_fill(~self.keep_TK, -1)
        if self.values_TE is None:
            return Chosen(experts_TK, self.weights_TK)
        last_T = self.values_TE.gather(1, self.experts_TK).masked_fill(~self.keep_TK, torch.inf).amin(1)
        used_TE = torch.zeros_like(self.values_TE, dtype=torch.uint8).scatter_add(
            1, self.experts_TK, self.keep_TK.to(torch.uint8)
        )
        value_T, second_T = self.values_TE.masked_fill(used_TE > 0, -torch.inf).max(1)
        is_one_T = (value_T > -torch.inf) & (last_T < torch.inf)
        return Chosen(
            experts_TK,
            self.weights_TK,
            second_T.masked_fill(~is_one_T, -1),
            (last_T - value_T).masked_fill(~is_one_T, 0),
        )

    @staticmethod
    def joined(parts: Sequence[Routing]) -> Routing:
        """One decision over the tokens of several, which one router made."""
        values = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Routing)}
        tensors = {
            name: torch.cat(of) for name, of in values.items() if all(isinstance(x, Tensor) for x in of)
        }
        return replace(parts[0], **tensors)

    def load_E(self) -> Tensor:
        """int64 [E] kept copies an expert."""
        return occurrences(self.experts_TK, self.logits_TE.shape[1], self.keep_TK)

    def wanted_E(self) -> Tensor:
        """int64 [E] copies an expert before admission."""
        return occurrences(self.experts_TK, self.logits_TE.shape[1], self.wanted_TK)

    def replay(self) -> Override:
        """The override that repeats this decision: same experts, drops and losses, live scores.

        A whole pass repeats with ``Mode(override={layer: routing.replay(), ...})`` and the same noise.
        """
        steps = (self.considered_TK, self.wanted_TK, self.keep_TK)
        return Override(replay=Replay(self.experts_TK, torch.stack(steps).sum(dim=0, dtype=torch.uint8)))


@dataclass(frozen=True, slots=True)
class Report:
    """What one layer says about its routing in one pass: values, so that recomputation cannot count twice."""

    layer: int
    losses: Mapping[str, Tensor]
    """Named balance losses, coefficients included, float32 scalars with gradient."""
    load_E: Tensor
    """int64 kept copies an expert."""
    wanted_E: Tensor
    """int64 copies that the router chose before admission; their difference from the load was dropped."""
    tokens: Tensor
    """int64 scalar: valid tokens."""
    entropy: Tensor | None
    """float32 scalar, no gradient: mean over valid tokens of the entropy of normalised scores, in nats.

    Absent where the pass asked for counts only.
    """
    sent_N: Tensor | None = None
    """int64 tokens that reach each device, where a loss over the step counts them."""
    margins: Margins | None = None
    """In training, where the bias is moved by them."""

    @property
    def counted(self) -> Counted:
        return Counted(self.wanted_E, self.tokens, self.sent_N)

    @property
    def dropped(self) -> Tensor:
        return self.wanted_E.sum() - self.load_E.sum()

    def of_nothing(self) -> Report:
        """The same layer after no tokens: of a pass that ran for other processes alone."""
        none = {name: torch.zeros_like(getattr(self, name)) for name in ("load_E", "wanted_E", "tokens")}
        return replace(self, sent_N=None, margins=None, **none)
