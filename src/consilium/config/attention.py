"""Attention as data: grouped-query attention and multi-head latent attention with rotary positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from consilium.config.base import Size, configuration
from consilium.errors import ConsiliumError


@configuration
class Unscaled:
    """Rotary frequencies as trained."""

    kind: Literal["none"] = "none"


@configuration
class Yarn:
    """YaRN (2309.00071) as DeepSeek-V2 and V3 use it, with both mscale corrections."""

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_length: Size
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def temperature(self, multiplier: float) -> float:
        """Attention temperature 0.1 m ln(s) + 1 of YaRN for the multiplier m."""
        return 1.0 if self.factor <= 1 else 0.1 * multiplier * math.log(self.factor) + 1.0

    @property
    def rotation_scale(self) -> float:
        """First correction: what cosine and sine are multiplied with."""
        return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)

    @property
    def softmax_scale(self) -> float:
        """Second correction: what the softmax scale 1/sqrt(d) is multiplied with, at every length."""
        return self.temperature(self.mscale_all_dim) ** 2


RopeScaling = Annotated[Unscaled | Yarn, Field(discriminator="kind")]


@configuration
class Rope:
    """Rotary position embedding. ``interleaved`` rotates pairs (2i, 2i+1), otherwise (i, i + d/2).

    ``fraction`` of each head, its first dimensions, is rotated; the rest carries no position
    (Nemotron-4: 0.5). ``repeats`` pairs in a row turn alike, so that a key shared by all heads can hold what
    several heads had of one frequency (TransMLA, 2502.07864).
    """

    theta: PositiveFloat = 10_000.0
    interleaved: bool = False
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    repeats: Size = 1
    scaling: RopeScaling = Unscaled()


@configuration
class GQA:
    """Grouped-query attention; ``kv_heads == heads`` is multi-head, ``kv_heads == 1`` multi-query.

    A query sees ``window`` tokens, itself and those before it (Mistral, 2310.06825 section 2), in every block
    but ``full_layers``, where it sees all; modules of multi-token prediction are none of these.
    """

    kind: Literal["gqa"] = "gqa"
    heads: Size
    kv_heads: Size
    head_dim: Size
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    softcap: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    window: Size | None = None
    full_layers: tuple[NonNegativeInt, ...] = ()
    rope: Rope = Rope()

    def __post_init__(self) -> None:
        if self.full_layers and self.window is None:
            raise ConsiliumError(
                "attention: full_layers names layers that see all tokens, and without a window every layer"
                " does; set attention.window or leave full_layers empty."
            )
        if self.full_layers != tuple(sorted(set(self.full_layers))):
            raise ConsiliumError(
                f"attention: full_layers {list(self.full_layers)} are not in rising order, each once;"
                " sort them."
            )
        if self.heads % self.kv_heads:
            raise ConsiliumError(
                f"attention: {self.heads} heads are not divisible by {self.kv_heads} kv_heads,"
                " and every group needs the same number of heads; choose kv_heads that divides heads."
            )
        # Rounded, since 100 times 0.58 is not 58 in binary.
        rotated = round(self.head_dim * self.rope.fraction, 6)
        if rotated % 2 or not rotated:
            raise ConsiliumError(
                f"attention: {rotated:g} of the {self.head_dim} dimensions of a head would be rotated, and"
                " rotary pairs need an even number above zero; change head_dim or rope.fraction."
            )
        if self.rope.repeats != 1:
            raise ConsiliumError(
                "attention: rope.repeats is for the shared key of latent attention; with grouped-query"
                " attention every head has each frequency once, so leave it at 1."
            )

    def at(self, layer: int) -> GQA:
        """What block ``layer`` computes, where it is the only one."""
        window = None if layer in self.full_layers else self.window
        return dataclasses.replace(self, window=window, full_layers=())

    @property
    def rotated_dim(self) -> int:
        """Dimensions of a head that carry the position."""
        return round(self.head_dim * self.rope.fraction)

    @property
    def softmax_scale(self) -> float:
        return self.scale if self.scale is not None else self.head_dim**-0.5

    @property
    def cache_width(self) -> int:
        """Cached values a token and layer."""
        return 2 * self.kv_heads * self.head_dim


@configuration
class MLA:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434 section 2.1).

    ``q_rank=None``: no query compression. ``norm_epsilon`` is that of the latents' norms, by default the
    model's. Attention made of grouped-query attention has no norm on its key/value latent, biases where that
    had them (on what reads the hidden state) and, with ``nope_dim=0``, keys that carry nothing but position.
    """

    kind: Literal["mla"] = "mla"
    heads: Size
    q_rank: Size | None
    kv_rank: Size
    nope_dim: NonNegativeInt
    rope_dim: Size
    v_dim: Size
    norm_epsilon: PositiveFloat | None = None
    kv_norm: Literal["rms", "none"] = "rms"
    qkv_bias: bool = False
    rope: Rope = Rope(interleaved=True)

    def __post_init__(self) -> None:
        if self.rope_dim % 2:
            raise ConsiliumError(
                f"attention: rope_dim {self.rope_dim} is odd, and rotary pairs need an even one."
            )
        if self.rope_dim // 2 % self.rope.repeats:
            raise ConsiliumError(
                f"attention: the {self.rope_dim // 2} rotary pairs of rope_dim are not divisible by"
                f" rope.repeats {self.rope.repeats}, and each frequency needs as many; choose a divisor."
            )
        if self.rope.fraction != 1:
            raise ConsiliumError(
                "attention: rope.fraction is for grouped-query attention; with latent attention rope_dim says"
                " how many dimensions are rotated, so leave the fraction at 1."
            )

    def at(self, layer: int) -> MLA:
        """What block ``layer`` computes: all are alike."""
        return self

    @property
    def softmax_scale(self) -> float:
        plain = (self.nope_dim + self.rope_dim) ** -0.5
        match self.rope.scaling:
            case Unscaled():
                return plain
            case Yarn() as yarn:
                return plain * yarn.softmax_scale

    @property
    def cache_width(self) -> int:
        """Cached values a token and layer: the latent after its norm and the rotated shared key."""
        return self.kv_rank + self.rope_dim

    @property
    def absorb_below(self) -> float:
        """New tokens a sequence below which absorbed attention costs less than expanding the latents."""
        wide, narrow = 2 * self.kv_rank + self.rope_dim, self.nope_dim + self.rope_dim + self.v_dim
        if wide <= narrow:
            return math.inf
        return self.kv_rank * (self.nope_dim + self.v_dim) / (wide - narrow)


Attention = Annotated[GQA | MLA, Field(discriminator="kind")]
