"""Grok-1 (released code, xai-org/grok-1): four norms a block, capped attention logits, 2 of 8 experts."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Raw, Router, TopK
from consilium.recipes.layout_remote import GROK_1
from consilium.recipes.recipe import HuggingFace, Published, Recipe


def _size(layers: int, hidden: int, width: int, attention: GQA) -> Model:
    return Model(
        family="grok-1",
        vocab_size=131072,
        hidden_size=hidden,
        layers=layers,
        attention=attention,
        moe=MoE(
            experts=8,
            width=width,
            activation="geglu",
            router=Router(select=TopK(k=2), weight=Raw()),
        ),
        norms="around",
        norm_epsilon=1e-5,
        embedding_scale=78.38367176906169,
        logit_scale=0.5773502691896257,
        tied=True,
        max_length=8192,
    )


RECIPE = Recipe(
    name="grok-1",
    title="Grok-1",
    year=2024,
    paper="github.com/xai-org/grok-1",
    sizes={
        "314b": _size(64, 6144, 32768, GQA(heads=48, kv_heads=8, head_dim=128, softcap=30.0)),
        "tiny": dataclasses.replace(
            _size(4, 192, 256, GQA(heads=6, kv_heads=2, head_dim=32, softcap=30.0)),
            vocab_size=4096,
            embedding_scale=192**0.5,
            max_length=1024,
        ),
    },
    published={
        "314b": Published(
            total="314B", note="without the embedding; '25% of weights active' is said, 26.5% are computed"
        )
    },
    choices=(
        "2 of 8 experts in every layer; weights are the softmax scores, not normalised",
        "each residual branch is normed before and after: four norms a block",
        "attention logits are capped at 30 by tanh before the mask",
        "embeddings times the root of the hidden size, logits divided by the root of 3, one tied matrix",
        "experts gated by GELU in its tanh form",
    ),
    equations=(
        "router: p = softmax(W x) in float32, S = the 2 largest of 8",
        "output: y = Σ_{i in S} p_i W_down,i (gelu(W_gate,i x) * (W_up,i x))",
        "block: h = x + norm2(attention(norm1(x))), y = h + norm4(MoE(norm3(h)))",
        "attention logits: 30 tanh(q k / (30 √128)), then the mask",
    ),
    deviations=(
        "there is no paper; the source is the released code, which has neither a balance loss nor capacity",
        "the release's attention output multiplier, 1/√128, multiplies the logits: it is the softmax scale",
        "released weights are 8-bit; counts here are of parameters",
    ),
    hugging_face=HuggingFace("grok-1", "Grok1ModelForCausalLM", GROK_1),
)
