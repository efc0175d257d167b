"""Any small model of each architecture that a folder can have, drawn."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from consilium.checkpoint.hf.architecture import Architecture
from consilium.config.attention import GQA, MLA, Rope, Unscaled, Yarn
from consilium.config.balance import Balance, SignBias
from consilium.config.feed_forward import FeedForward
from consilium.config.model import MTP, Model
from consilium.config.moe import AlwaysOn, MoE, NoShared, SigmoidGated
from consilium.config.router import (
    Groups,
    LearnedNoise,
    LinearGate,
    MLPGate,
    Normalised,
    Raw,
    Router,
    Sigmoid,
    SoftmaxOfSelected,
    Standardise,
    TopK,
    TwoLevel,
)

KINDS: tuple[Architecture, ...] = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "grok-1",
    "skywork_moe",
    "llama_moe",
)
SQUARE = {"olmoe", "deepseek", "grok-1", "skywork_moe", "llama_moe"}
"""Their code divides the hidden size among the heads."""
FIXED_THETA = {"grok-1", "llama_moe"}
UNSCALED = FIXED_THETA | {"deepseek", "skywork_moe"}
SCHEDULED = {"qwen2_moe", "qwen3_moe"}
DENSE = {"llama", "mistral", "qwen2", "qwen3"}
WINDOWED = {"mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"}
BY_LAYER = {"qwen2", "qwen3", "qwen2_moe"}


@st.composite
def described(draw: st.DrawFn, kind: Architecture) -> Model:
    heads = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(2 if kind == "deepseek" else 1, 5))
    head_dim = 2 * draw(st.integers(1, 4))
    latent = kind in {"deepseek_v2", "deepseek_v3"}
    free, length = heads * draw(st.integers(1, 6)), draw(st.integers(1, 2000))
    windows = {} if latent else draw(_windows(kind, layers, length))
    return Model(
        family="drawn",
        vocab_size=draw(st.integers(1, 50)),
        hidden_size=heads * head_dim if kind in SQUARE else free,
        layers=layers,
        attention=draw(_latent(kind, heads)) if latent else draw(_grouped(kind, heads, head_dim, windows)),
        moe=None if kind in DENSE else draw(_experts(kind)),
        tied=draw(st.booleans()),
        max_length=max(2, length),
        **_around(kind),
        **draw(_schedule(kind, layers)),
    )


def _around(kind: Architecture) -> dict[str, Any]:
    return {"norms": "around", "embedding_scale": 4.5, "logit_scale": 0.5} if kind == "grok-1" else {}


@st.composite
def _schedule(draw: st.DrawFn, kind: Architecture, layers: int) -> dict[str, Any]:
    """Which layers are dense, and multi-token prediction behind them."""
    dense = {"dense": FeedForward(width=draw(st.integers(1, 20)))}
    if kind in SCHEDULED:
        every = draw(st.integers(1, 3))
        first = draw(st.integers(0, layers - 1))
        return dense | ({"moe_every": every, "dense_first": first} if first + every <= layers else {})
    if kind in {"deepseek", "deepseek_v2", "deepseek_v3"}:
        depth = draw(st.integers(0, 2)) if kind == "deepseek_v3" else 0
        # Without a dense layer DeepSeekMoE's plainest form is Mixtral.
        least = 1 if kind == "deepseek" else 0
        first = min(max(least, draw(st.integers(0, layers - 1))), layers - 1)
        return dense | {"dense_first": first, "mtp": MTP(depth=depth)}
    return dense if kind in DENSE else {}


@st.composite
def _windows(draw: st.DrawFn, kind: Architecture, layers: int, length: int) -> dict[str, Any]:
    """Shorter than the context, and in one layer at least: others are none."""
    if kind not in WINDOWED or (kind != "mistral" and draw(st.booleans())):
        return {}
    full = draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1)) if kind in BY_LAYER else set()
    return {"window": draw(st.integers(1, max(1, length - 1))), "full_layers": tuple(sorted(full))}


@st.composite
def _grouped(draw: st.DrawFn, kind: Architecture, heads: int, head_dim: int, windows: dict[str, Any]) -> GQA:
    theta = 1e4 if kind in FIXED_THETA else draw(st.sampled_from([1e4, 1e6]))
    norms = {"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}
    bias = kind == "qwen2" or (kind == "qwen2_moe" and draw(st.booleans()))
    return GQA(
        heads=heads,
        kv_heads=1,
        head_dim=head_dim,
        qkv_bias=bias,
        qk_norm=norms.get(kind, "none"),
        softcap=draw(st.sampled_from([5.0, 30.0])) if kind == "grok-1" else None,
        scale=draw(st.sampled_from([None, 0.1])) if kind == "grok-1" else None,
        **windows,
        rope=Rope(theta=theta, scaling=Unscaled() if kind in UNSCALED else draw(_yarn(corrected=False))),
    )


@st.composite
def _yarn(draw: st.DrawFn, *, corrected: bool) -> Yarn | Unscaled:
    """``corrected``: the softmax is scaled as well, which grouped-query attention does not know."""
    if draw(st.booleans()):
        return Unscaled()
    yarn = {"factor": draw(st.sampled_from([2.0, 8.0, 40.0])), "original_length": draw(st.integers(1, 999))}
    return Yarn(**yarn, mscale=0.5, mscale_all_dim=0.707) if corrected else Yarn(**yarn)


@st.composite
def _latent(draw: st.DrawFn, kind: Architecture, heads: int) -> MLA:
    interleaved = kind == "deepseek_v2" or draw(st.booleans())
    return MLA(
        heads=heads,
        q_rank=draw(st.none() | st.integers(1, 9)),
        kv_rank=draw(st.integers(1, 9)),
        nope_dim=draw(st.integers(1, 5)),
        rope_dim=2 * draw(st.integers(1, 3)),
        v_dim=draw(st.integers(1, 5)),
        rope=Rope(interleaved=interleaved, scaling=draw(_yarn(corrected=True))),
    )


@st.composite
def _experts(draw: st.DrawFn, kind: Architecture) -> MoE:
    width, experts = draw(st.integers(1, 9)), 2 * draw(st.integers(2, 4))
    shared = draw(st.integers(1, 3))
    match kind:
        case "qwen2_moe":
            beside: Any = SigmoidGated(width=draw(st.integers(1, 9)))
        case "deepseek":
            beside = draw(st.sampled_from([NoShared(), AlwaysOn(count=shared, width=width)]))
        case "deepseek_v2" | "deepseek_v3":
            beside = AlwaysOn(count=shared, width=width)
        case _:
            beside = NoShared()
    router = draw(_router(kind, experts))
    bias = {"balance": Balance(bias=SignBias())} if kind == "deepseek_v3" else {}
    activation = "geglu" if kind == "grok-1" else "swiglu"
    return MoE(experts=experts, width=width, activation=activation, router=router, shared=beside, **bias)


@st.composite
def _router(draw: st.DrawFn, kind: Architecture, experts: int) -> Router:
    k = draw(st.integers(2, 4))
    either = draw(st.sampled_from([Raw(), Normalised()]))
    grouped = draw(st.booleans())
    match kind:
        case "deepseek_v2":
            groups = Groups(count=2, keep=2, score="max") if grouped else None
            return Router(
                select=TopK(k=k, groups=groups), weight=Raw(), scale=draw(st.sampled_from([1.0, 16.0]))
            )
        case "deepseek_v3":
            groups = Groups(count=experts // 2, keep=2, score="top2_sum") if grouped else None
            choice = {"score": Sigmoid(), "offset": "scores", "select": TopK(k=k, groups=groups)}
            return Router(**choice, weight=either, scale=draw(st.sampled_from([1.0, 2.5])))
        case "grok-1":
            return Router(select=TopK(k=k), weight=Raw())
        case "mixtral":
            return Router(select=TopK(k=k))
        case "skywork_moe":
            return Router(
                select=TopK(k=k), transforms=(Standardise(scale=draw(st.sampled_from([1.0, 2.0]))),)
            )
        case "llama_moe":
            gate = draw(st.sampled_from([LinearGate(), MLPGate()]))
            noise = LearnedNoise(floor=draw(st.sampled_from([0.0, 0.01])))
            return Router(
                projection=gate, noise=noise, select=TopK(k=k), weight=SoftmaxOfSelected(), scale=2.0
            )
        case _:
            return Router(select=TopK(k=k), weight=either)


BEYOND_ALL: dict[str, Any] = {"select": TwoLevel(groups=2), "weight": SoftmaxOfSelected()}
"""A router that no published code has."""
