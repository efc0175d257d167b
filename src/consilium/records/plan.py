"""What a model costs, before it is built."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from consilium.records.io import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Parameters:
    """Trained values of the model without its multi-token prediction modules, which ``mtp`` counts."""

    total: PositiveInt
    active: PositiveInt
    """What one token uses, input embedding and head included."""
    active_without_input_embedding: PositiveInt
    """The same without the input embedding; a tied embedding stays, because it is the head."""
    mtp: NonNegativeInt
    """Parameters of the multi-token prediction modules, none of them in ``total``."""
    buffers: NonNegativeInt
    """Saved values that no optimizer trains: selection biases and adaptive coefficients."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Flops:
    """Floating-point operations of one token at ``context``; a multiplication with its addition is two."""

    forward: PositiveInt
    training: PositiveInt
    """Forward and backward: three times ``forward``."""
    mtp: NonNegativeInt
    """Forward operations of the multi-token prediction modules, in neither of the above."""
    context: PositiveInt
    """Length of the sequence whose average token is counted."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Windowed:
    """Attention within a window."""

    tokens: PositiveInt
    """What a query sees, itself included."""
    layers: NonNegativeInt
    """With the window; the others see all."""
    kv_values_beyond: NonNegativeInt
    """Cached values that are still read of a token out of the window; what is cached stays."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Plan:
    """Parameters, arithmetic and memory of a model; bytes in bfloat16 unless a name says otherwise."""

    family: str
    parameters: Parameters
    flops_per_token: Flops
    kv_values_per_token: PositiveInt
    kv_bytes_per_token: PositiveInt
    weight_bytes: PositiveInt
    weight_bytes_by_dtype: dict[str, int]
    training_bytes: PositiveInt
    """float32 weights, gradients and both AdamW moments, MTP included; activations come on top."""
    window: Windowed | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Serving:
    """Memory of a model with ``batch`` sequences of ``context`` tokens each, without gradients."""

    context: PositiveInt
    batch: PositiveInt
    dtype: str
    weight_bytes: PositiveInt
    cache_bytes: PositiveInt
    activation_bytes: PositiveInt
    """One pass over all the tokens at once; reading them in pieces needs less."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Comparison:
    """One model over another: below 1 this one needs less."""

    total: float
    active: float
    forward: float
    kv_values: float
    kv_bytes_by_bits: dict[str, float]
    """Bytes of this cache at so many bits a value, over the other's at 16."""
