"""Latent attention that computes what grouped-query attention does: its sizes, from a configuration alone.

Keys of all heads, side by side, are one key. Of each rotary frequency every head has one pair, so that pairs
of one frequency can be mixed and rotate as before (TransMLA, 2502.07864, section 4.2). Some of what comes of
it stays in the shared rotated key; the rest gives up its position and joins the values in the latent.
"""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA, MLA
from consilium.config.model import Model
from consilium.config.upcycling import Latent
from consilium.errors import ConsiliumError


def with_latent_attention(model: Model, method: Latent) -> Model:
    """Return ``model`` with latent attention. Raises ConsiliumError for what that cannot express."""
    config = _checked(model)
    rope_dim = method.rope_dim or widest(config)
    _check_rope_dim(config, rope_dim)
    whole = full_rank(config, rope_dim)
    if method.kv_rank is not None and method.kv_rank > whole:
        raise ConsiliumError(
            f"upcycle: method.kv_rank {method.kv_rank} is more than the {whole} dimensions that keys without"
            f" position and values have beside method.rope_dim {rope_dim}; give {whole} or less."
        )
    attention = MLA(
        heads=config.heads,
        q_rank=None,
        kv_rank=method.kv_rank or whole,
        nope_dim=config.head_dim - (config.rotated_dim if rope_dim == widest(config) else 0),
        rope_dim=rope_dim,
        v_dim=config.head_dim,
        kv_norm="none",
        qkv_bias=config.qkv_bias,
        rope=dataclasses.replace(config.rope, fraction=1.0, repeats=max(1, rope_dim // config.rotated_dim)),
    )
    return dataclasses.replace(model, attention=attention)


def widest(config: GQA) -> int:
    """Rotated dimensions of all key heads: a shared key of this width loses nothing."""
    return config.kv_heads * config.rotated_dim


def full_rank(config: GQA, rope_dim: int) -> int:
    """Dimensions of all keys that are not rotated, and of all values."""
    return 2 * config.kv_heads * config.head_dim - rope_dim


def is_whole(config: GQA, method: Latent) -> bool:
    """Whether nothing is left out, so that the result computes the same."""
    rope_dim = method.rope_dim or widest(config)
    return rope_dim == widest(config) and method.kv_rank in (None, full_rank(config, rope_dim))


def _checked(model: Model) -> GQA:
    match model.attention:
        case MLA():
            raise ConsiliumError(
                f"upcycle: the {model.family} model has latent attention already; --method mla takes one with"
                " grouped-query attention."
            )
        case GQA() as config:
            pass
    if config.qk_norm != "none":
        raise ConsiliumError(
            f"upcycle: the {model.family} model norms its queries and keys, and such a norm cannot be moved"
            " into a latent; --method mla takes a model without, such as a Llama, Mistral or Qwen2."
        )
    if config.softcap is not None:
        raise ConsiliumError(
            f"upcycle: the {model.family} model caps its attention logits, which latent attention does not;"
            " --method mla takes a model that does not."
        )
    if config.window is not None:
        raise ConsiliumError(
            f"upcycle: the {model.family} model attends within a window of {config.window} tokens, which"
            " latent attention does not; --method mla takes a model that sees all of its text."
        )
    if model.mtp.depth:
        raise ConsiliumError(
            f"upcycle: the {model.family} model has modules that predict further tokens, which --method mla"
            " does not measure; convert it without them first."
        )
    return config


def _check_rope_dim(config: GQA, rope_dim: int) -> None:
    """One width of a head several times, or a divisor of it: the pairs of every frequency count alike."""
    rotated = config.rotated_dim
    several = rope_dim % rotated == 0 and rope_dim <= widest(config)
    if several or (rope_dim < rotated and rope_dim % 2 == 0 and rotated % rope_dim == 0):
        return
    divisors = [n for n in range(2, rotated, 2) if rotated % n == 0]
    known = [*divisors, *(rotated * n for n in range(1, config.kv_heads + 1))]
    near = min(known, key=lambda n: (abs(n - rope_dim), n))
    raise ConsiliumError(
        f"upcycle: method.rope_dim {rope_dim} gives the {rotated // 2} rotary frequencies unequal parts; it"
        f" is a divisor of {rotated}, or a multiple up to {widest(config)}, such as {near}."
    )
