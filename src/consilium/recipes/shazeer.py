"""The sparsely-gated mixture of experts (Shazeer 2017, 1701.06538): noisy top-k, flat and hierarchical."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA
from consilium.config.balance import Balance, ImportanceLoss, LoadLoss
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import LearnedNoise, Router, SoftmaxOfSelected, TopK, TwoLevel
from consilium.recipes.recipe import Published, Recipe

_BALANCE = Balance(losses=(ImportanceLoss(coefficient=0.1), LoadLoss(coefficient=0.1)))


def _size(experts: int, select: TopK | TwoLevel) -> Model:
    """One block for each of the paper's layers around the experts; 512 + 1024 values wide, as they are."""
    router = Router(noise=LearnedNoise(), select=select, weight=SoftmaxOfSelected())
    return Model(
        family="shazeer",
        vocab_size=793471,
        hidden_size=512,
        layers=3,
        attention=GQA(heads=8, kv_heads=8, head_dim=64),
        dense=FeedForward(width=1024, activation="relu"),
        moe=MoE(experts=experts, width=1024, activation="relu", router=router, balance=_BALANCE),
        moe_every=2,
        max_length=512,
    )


def _tiny(select: TopK | TwoLevel) -> Model:
    small = _size(32, select)
    assert small.moe is not None
    return dataclasses.replace(
        small,
        vocab_size=4096,
        hidden_size=192,
        layers=4,
        attention=GQA(heads=6, kv_heads=6, head_dim=32),
        dense=FeedForward(width=384, activation="relu"),
        moe=dataclasses.replace(small.moe, width=192),
        max_length=1024,
    )


def _published(total: str, note: str = "") -> Published:
    return Published(total=total, note=note, skeleton="other")


_TABLE_8 = "of the 100-billion-word models, without embedding and softmax"
_TABLE_7 = "of the 1-billion-word models, without embedding and softmax"

RECIPE = Recipe(
    name="shazeer",
    title="The sparsely-gated mixture-of-experts layer",
    year=2017,
    paper="1701.06538",
    sizes={
        "131072-h": _size(131072, TwoLevel(groups=16)),
        "65536-h": _size(65536, TwoLevel(groups=16)),
        "4096-h": _size(4096, TwoLevel(groups=16)),
        "1024-h": _size(1024, TwoLevel(groups=16)),
        "256-h": _size(256, TwoLevel(groups=16)),
        "256": _size(256, TopK(k=4)),
        "32": _size(32, TopK(k=4)),
        "4": _size(4, TopK(k=4)),
        "tiny": _tiny(TopK(k=4)),
        "tiny-h": _tiny(TwoLevel(groups=8)),
    },
    published={
        "131072-h": _published("137B", _TABLE_8),
        "65536-h": _published("68.8B", _TABLE_8),
        "4096-h": _published("4.303B", _TABLE_7),
    },
    choices=(
        "each token visits 4 of up to 131,072 small experts of a single layer",
        "trainable Gaussian noise on the gate's logits, whose own gate learns how much; none in evaluation",
        "weights are a softmax over the kept experts; both gates start at zero, so that loads start equal",
        "two losses: weights (importance) and a smooth estimate of the number of tokens (load), both 0.1",
        "hierarchical sizes: a primary gate keeps 2 of 16 groups and a secondary one 2 experts in each",
    ),
    equations=(
        "noisy logits: H(x)_i = (x W_g)_i + N(0, 1) softplus((x W_noise)_i) (eq. 4)",
        "weights: G(x) = softmax(keep_top_k(H(x), k)), y = Σ_i G(x)_i FFN_i(x) (eq. 1, 3, 5)",
        "importance: L = 0.1 CV(Σ_x G(x))² (eq. 6-7)",
        "chance: P(x, i) = Φ(((x W_g)_i - kth_excluding(H(x), k, i)) / softplus((x W_noise)_i)) (eq. 9)",
        "load: L = 0.1 CV(Σ_x P(x, i))² (eq. 10-11)",
        "two levels: y = Σ_i G_primary(x)_i Σ_j G_i(x)_j FFN_ij(x) (appendix B)",
        "load of two levels: Load_ij = Load_primary_i Load_i(X_i)_j / |X_i|, X_i the tokens of group i",
    ),
    deviations=(
        "published between two LSTM layers of 512; here 3 decoder blocks, the experts in the second",
        "the sigmoid between experts and dropout of the language model is left out",
        "16 groups at every hierarchical size; the paper's largest models may have had more (not verified)",
        "the vocabulary of the 1-billion-word benchmark, 793,471, stands in every size but the tiny ones",
        "with E = k, as in size 4, a token's load is certain and the load loss is zero",
    ),
)
