"""A decoder language model as data."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from consilium.config.attention import GQA, Attention
from consilium.config.base import Size, configuration
from consilium.config.feed_forward import FeedForward
from consilium.config.moe import MoE
from consilium.config.router import Hash
from consilium.errors import ConsiliumError

MOST_LAYERS: Final = 10_000
"""Far more than any model has, so that whatever loops over layers ends soon whatever a file says."""


@configuration
class Normal:
    """Every matrix from N(0, std)."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = 0.02


@configuration
class FanIn:
    """Every matrix from a truncated normal of variance scale / fan_in (Switch, 2101.03961 section 2.4)."""

    kind: Literal["fan_in"] = "fan_in"
    scale: PositiveFloat = 0.1


Init = Annotated[Normal | FanIn, Field(discriminator="kind")]


@configuration
class MTP:
    """Multi-token prediction (DeepSeek-V3 2.2): ``depth`` extra modules, loss weight ``weight / depth``."""

    depth: NonNegativeInt = 0
    weight: NonNegativeFloat = 0.3


@configuration
class Model:
    """A decoder: embedding, ``layers`` blocks of attention and feed-forward network, norm, head.

    Block i (from 0) is an MoE block when i >= dense_first and (i - dense_first + 1) is a multiple of
    ``moe_every``; the other blocks use ``dense``. ``family`` names the recipe whose weight layout applies.

    ``norms="around"`` norms the output of each residual branch as well as its input (Grok-1).
    ``embedding_scale`` multiplies embeddings and ``logit_scale`` logits (Grok-1).
    """

    family: str
    vocab_size: Size
    hidden_size: Size
    layers: Annotated[Size, Field(le=MOST_LAYERS)]
    attention: Attention
    dense: FeedForward | None = None
    moe: MoE | None = None
    dense_first: NonNegativeInt = 0
    moe_every: Size = 1
    norms: Literal["before", "around"] = "before"
    norm_epsilon: PositiveFloat = 1e-6
    embedding_scale: PositiveFloat = 1.0
    logit_scale: PositiveFloat = 1.0
    tied: bool = False
    max_length: Size = 4096
    mtp: MTP = MTP()
    init: Init = Normal()

    def __post_init__(self) -> None:
        if self.dense is None and not all(self.is_moe(i) for i in range(self.layers)):
            raise ConsiliumError("model: some layers are dense but model.dense is missing; give its width.")
        if isinstance(self.attention, GQA) and any(i >= self.layers for i in self.attention.full_layers):
            raise ConsiliumError(
                f"model: attention.full_layers names layer {self.attention.full_layers[-1]}, and the model"
                f" has {self.layers}, counted from 0; name layers that it has."
            )
        if self.moe is not None and isinstance(self.moe.router.select, Hash):
            table = self.moe.router.select.vocab_size
            if table < self.vocab_size:
                raise ConsiliumError(
                    f"model: the hash table of moe.router.select knows {table} tokens and the vocabulary has"
                    f" {self.vocab_size}; set select.vocab_size to at least that."
                )

    def is_moe(self, layer: int) -> bool:
        """Whether block ``layer`` routes to experts.

        Multi-token prediction modules count on from ``layers``.
        """
        past = layer - self.dense_first + 1
        return self.moe is not None and past > 0 and past % self.moe_every == 0

    @property
    def windowed_layers(self) -> tuple[int, ...]:
        """Blocks whose queries see a window, without multi-token prediction modules."""
        kinds = (self.attention.at(i) for i in range(self.layers))
        return tuple(i for i, kind in enumerate(kinds) if isinstance(kind, GQA) and kind.window is not None)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Blocks that route, multi-token prediction modules included, in order."""
        return tuple(i for i in range(self.layers + self.mtp.depth) if self.is_moe(i))
