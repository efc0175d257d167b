"""Arithmetic of one token.

Convention: a multiplication and an addition are two operations. A token multiplies once with every active
matrix (router, shared experts and head included; not the input embedding, which is a look-up), and its
queries meet the keys it may see. In a causal sequence of length L that is (L + 1) / 2 keys on average, so
attention counts heads * (key dimension + value dimension) * (L + 1) operations a layer. In a layer with a
window of W < L it is W - W (W - 1) / 2L keys, the first ones having fewer before them. MLA is counted
expanded, as it trains. Norms, softmax, activations and rotary positions are left out. The backward pass
costs twice the forward pass.
"""

from __future__ import annotations

from consilium.config.attention import GQA, MLA, Attention
from consilium.config.model import Model
from consilium.planner.parameters import decoder, mtp
from consilium.records.plan import Flops

LONGEST_CONTEXT = 4096
"""Sequence length that a plan assumes when the model allows more: the usual one of pre-training."""


def flops(model: Model, context: int | None = None) -> Flops:
    """Operations of the average token of a sequence of ``context``; without one, 4096 or the model's most."""
    length = min(LONGEST_CONTEXT, model.max_length) if context is None else context
    blocks = [attention(model.attention.at(i), length) for i in range(model.layers + model.mtp.depth)]
    forward = 2 * decoder(model).matrices + sum(blocks[: model.layers])
    head = model.vocab_size * model.hidden_size
    extra = 2 * mtp(model).matrices + sum(blocks[model.layers :]) + model.mtp.depth * 2 * head
    return Flops(forward=forward, training=3 * forward, mtp=extra, context=length)


def attention(config: Attention, context: int) -> int:
    """Operations of queries with keys and of weights with values in one block.

    They are those of the average token of ``context``.
    """
    match config:
        case GQA(heads=heads, head_dim=head_dim, window=int(window)) if window < context:
            hidden = window * (window - 1) / (2 * context)
            return round(heads * 4 * head_dim * (window - hidden))
        case GQA(heads=heads, head_dim=head_dim):
            return heads * 2 * head_dim * (context + 1)
        case MLA(heads=heads, nope_dim=nope, rope_dim=rope, v_dim=value):
            return heads * (nope + rope + value) * (context + 1)
