"""Small models of every architecture that is written as GGUF; their rows fill blocks of 32."""

from __future__ import annotations

import dataclasses
from typing import Any

from consilium.config.attention import GQA, MLA, Rope, Unscaled, Yarn
from consilium.config.balance import Balance, SignBias
from consilium.config.feed_forward import FeedForward
from consilium.config.model import MTP, Model
from consilium.config.moe import AlwaysOn, MoE, NoShared, Shared, SigmoidGated
from consilium.config.router import Groups, Raw, Router, Sigmoid, TopK
from consilium.data.splits import LETTERS

BYTES = 259
"""The vocabulary of bytes and three special tokens."""
DENSE = FeedForward(width=96)
INTERLEAVED = Rope(interleaved=True)
GROUPED = GQA(heads=4, kv_heads=2, head_dim=16)
TOP_2 = Router(select=TopK(k=2))


def yarn(multiplier: float) -> Rope:
    scaling = Yarn(factor=4.0, original_length=64, mscale=multiplier, mscale_all_dim=multiplier)
    return Rope(interleaved=True, scaling=scaling)


def latent(rope: Rope, q_rank: int | None = 32) -> MLA:
    return MLA(heads=2, q_rank=q_rank, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32, rope=rope)


def llama() -> Model:
    return Model(
        family="llama",
        vocab_size=BYTES,
        hidden_size=64,
        layers=2,
        attention=GROUPED,
        dense=DENSE,
        max_length=256,
        tied=True,
    )


def mixtral(*, scaled: bool = False) -> Model:
    scaling = Yarn(factor=4.0, original_length=64) if scaled else Unscaled()
    attention = GQA(heads=4, kv_heads=2, head_dim=16, rope=Rope(theta=1e6, scaling=scaling))
    moe = MoE(experts=4, width=96, router=TOP_2)
    return Model(
        family="mixtral",
        vocab_size=BYTES,
        hidden_size=64,
        layers=2,
        attention=attention,
        moe=moe,
        max_length=256,
    )


def qwen3(*, tied: bool = False, router: Router = TOP_2, dense_first: int = 0) -> Model:
    attention = GQA(heads=4, kv_heads=2, head_dim=32, qk_norm="head", rope=Rope(theta=1e6))
    return Model(
        family="qwen3-moe",
        vocab_size=BYTES,
        hidden_size=64,
        layers=2,
        attention=attention,
        dense=DENSE,
        dense_first=dense_first,
        moe=MoE(experts=8, width=32, router=router),
        max_length=256,
        tied=tied,
    )


def dense(family: str, attention: GQA) -> Model:
    return dataclasses.replace(llama(), family=family, attention=attention, tied=False)


def softmax(family: str, attention: GQA, shared: Shared = NoShared()) -> Model:
    """Raw weights of a softmax over all experts, as Qwen2-MoE, OLMoE and DeepSeekMoE have them."""
    router = Router(select=TopK(k=2), weight=Raw())
    moe = MoE(experts=8, width=32, router=router, shared=shared)
    return dataclasses.replace(llama(), family=family, attention=attention, dense=None, moe=moe, tied=False)


def deepseek_moe() -> Model:
    plain = softmax("deepseek-moe", GROUPED, AlwaysOn(count=2, width=32))
    return dataclasses.replace(plain, dense=DENSE, dense_first=1)


def deepseek_v2(
    *, q_rank: int | None = 32, layers: int = 3, groups: Groups | None = None, multiplier: float = 0.707
) -> Model:
    router = Router(select=TopK(k=2, groups=groups), weight=Raw(), scale=16.0)
    return Model(
        family="deepseek-v2",
        vocab_size=BYTES,
        hidden_size=64,
        layers=layers,
        attention=latent(yarn(multiplier), q_rank),
        dense=DENSE,
        dense_first=1,
        moe=MoE(experts=8, width=32, router=router, shared=AlwaysOn(count=2, width=32)),
        max_length=256,
    )


def deepseek_v3(*, rope: Rope = INTERLEAVED, depth: int = 1) -> Model:
    groups = Groups(count=4, keep=2, score="top2_sum")
    router = Router(score=Sigmoid(), offset="scores", select=TopK(k=2, groups=groups), scale=2.5)
    balance = Balance(bias=SignBias())
    moe = MoE(experts=8, width=32, router=router, balance=balance, shared=AlwaysOn(count=1, width=32))
    return Model(
        family="deepseek-v3",
        vocab_size=BYTES,
        hidden_size=64,
        layers=3,
        attention=latent(rope),
        dense=DENSE,
        dense_first=1,
        moe=moe,
        max_length=256,
        mtp=MTP(depth=depth),
    )


CASES = {
    "llama": llama(),
    "mixtral": mixtral(),
    "mixtral-yarn": mixtral(scaled=True),
    "qwen2": dense("qwen2", dataclasses.replace(GROUPED, qkv_bias=True)),
    "qwen3": dense("qwen3", dataclasses.replace(GROUPED, qk_norm="head")),
    "qwen2_moe": softmax("qwen-moe", dataclasses.replace(GROUPED, qkv_bias=True), SigmoidGated(width=64)),
    "olmoe": softmax("olmoe", dataclasses.replace(GROUPED, kv_heads=4, qk_norm="full")),
    "deepseek": deepseek_moe(),
    "qwen3_moe": qwen3(),
    "qwen3_moe-tied": qwen3(tied=True),
    "deepseek_v2": deepseek_v2(),
    "deepseek_v2-lite": deepseek_v2(q_rank=None),
    "deepseek_v2-27": deepseek_v2(q_rank=None, layers=27),
    "deepseek_v3": deepseek_v3(),
    "deepseek_v3-yarn": deepseek_v3(rope=yarn(1.0)),
    "deepseek_v3-halves": deepseek_v3(rope=Rope(interleaved=False)),
}


def split_with(*patterns: str, digits: bool = False) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    steps += [{"type": "Digits", "individual_digits": True}] if digits else []
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, last]}


DEEPSEEK_LLM = split_with(
    "[\r\n]",
    LETTERS + "À-ÖØ-öø-ƺ]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    digits=True,
)
"""How DeepSeek-V2 cuts text, with the Latin letters of its class alone."""
