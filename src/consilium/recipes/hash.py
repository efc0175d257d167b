"""Hash layers (2106.04426): a fixed random table from the token to its expert, and no router to train."""

from __future__ import annotations

from consilium.config.attention import GQA
from consilium.config.model import Model, Normal
from consilium.config.moe import MoE
from consilium.config.router import Hash, NoGate, Router, Uniform
from consilium.recipes.recipe import Published, Recipe


def _router(vocab_size: int) -> Router:
    return Router(projection=NoGate(), select=Hash(vocab_size=vocab_size), weight=Uniform())


_2B = Model(
    family="hash",
    vocab_size=8000,
    hidden_size=1280,
    layers=9,
    attention=GQA(heads=10, kv_heads=10, head_dim=128),
    moe=MoE(experts=16, width=3412, router=_router(8000)),
    max_length=2048,
    init=Normal(std=0.006),
)

_TINY = Model(
    family="hash",
    vocab_size=4096,
    hidden_size=192,
    layers=4,
    attention=GQA(heads=6, kv_heads=6, head_dim=32),
    moe=MoE(experts=8, width=256, router=_router(4096)),
    max_length=1024,
)

RECIPE = Recipe(
    name="hash",
    title="Hash layers",
    year=2021,
    paper="2106.04426",
    sizes={"2b": _2B, "tiny": _TINY},
    published={
        "2b": Published(
            total="2.0B", active="0.2B", note="the hash baseline of DeepSeekMoE, 2401.06066 table 1"
        )
    },
    choices=(
        "a token's id alone decides its expert, by a table drawn once; context plays no part",
        "nothing to learn: no gate, no noise, no loss, no capacity; the weight of the expert is 1",
        "the load is as even as the frequencies of tokens are, which is not very even",
    ),
    equations=(
        "router: i = table[token], table uniform over the E experts",
        "output: y = FFN_i(x)",
    ),
    deviations=(
        "the paper's own models, for dialogue, are not given here",
        "size 2b is the baseline that DeepSeekMoE trained, with a hash layer in every block",
        "the paper's balanced table, dealt out by token frequency, needs a corpus; the random one needs none",
        "the feed-forward width of size 2b, 4 x 853, is inferred from the published totals",
    ),
)
