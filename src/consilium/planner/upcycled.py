"""The configuration of a sparse model made out of a trained one: its cost is known without weights."""

from __future__ import annotations

import dataclasses
from typing import assert_never

from consilium.config.balance import Balance, SwitchLoss
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, MoE, NoShared, Shared, SigmoidGated
from consilium.config.router import (
    LinearGate,
    MLPGate,
    Normalised,
    Projection,
    Raw,
    Router,
    Softmax,
    SoftmaxOfSelected,
    Standardise,
    TopK,
    Transform,
    Weight,
)
from consilium.config.upcycling import (
    BranchTrainMix,
    Carve,
    ClusterSplit,
    Copy,
    Drop,
    Embeddings,
    Expand,
    GraphSplit,
    HiddenStates,
    InnerSplit,
    InterSplit,
    Latent,
    Qwen,
    RandomSplit,
    Split,
    Upcycling,
    VirtualGroup,
)
from consilium.errors import ConsiliumError
from consilium.planner.latent import with_latent_attention

FLAT = 3e-6
"""A spread of logits for which weights are equal to within float32's resolution."""
_APART = 1e-2
_ALL = 1e-6
"""The same where all experts are chosen, so that nothing hangs on an order."""
_SIDES = 10.0
"""How far copies of experts are apart, over what is between experts."""


def upcycled(model: Model, asked: Upcycling) -> Model:
    """Return what ``asked`` makes of ``model``.

    Raises ConsiliumError in one sentence for a model that is not dense (expand: not sparse), for sizes that
    do not divide and for more experts chosen than there are.
    """
    if isinstance(asked.method, Expand):
        return _expanded(model, asked)
    if isinstance(asked.method, Latent):
        return with_latent_attention(model, asked.method)
    if model.moe is not None or model.dense is None:
        raise ConsiliumError(
            f"upcycle: the {model.family} model has experts already; --method expand makes more of them, and"
            " the other methods take a dense model."
        )
    if model.mtp.depth:
        raise ConsiliumError(
            f"upcycle: the {model.family} model has modules that predict further tokens, which --method"
            f" {asked.method.kind} does not cut; take a model trained without them (mtp.depth 0)."
        )
    moe = _moe(model.dense, asked)
    kept = model.dense if asked.dense_first or asked.moe_every > 1 else None
    made = dataclasses.replace(
        model,
        family=_family(asked),
        dense=kept,
        moe=moe,
        dense_first=asked.dense_first,
        moe_every=asked.moe_every,
    )
    if not made.moe_layers:
        raise ConsiliumError(
            f"upcycle: with dense_first {asked.dense_first} and moe_every {asked.moe_every} none of the"
            f" {model.layers} layers gets experts; lower them."
        )
    return made


def slices(dense: FeedForward, asked: Upcycling) -> int:
    """Parts that one copy of the network is cut into. Raises ConsiliumError where they do not divide it."""
    match asked.method:
        case VirtualGroup(granularity=parts) | Qwen(granularity=parts):
            pass
        case Copy() | Drop() | BranchTrainMix() | Expand():
            parts = 1
        case _:
            parts = asked.experts + asked.shared
    if dense.width % parts:
        near = next(n for n in range(parts, 0, -1) if dense.width % n == 0)
        raise ConsiliumError(
            f"upcycle: {dense.width} hidden neurons are not divisible into {parts} parts of equal size;"
            f" choose a number that divides them, such as {near}."
        )
    return parts


def factor(asked: Upcycling) -> float:
    """What the outputs of routed experts are multiplied by, put into their matrices.

    Of copies it makes the output that of the network while the logits of all experts are equal.
    """
    match asked.method:
        case Copy() | Drop() | BranchTrainMix() | Expand():
            size = 1.0
        case VirtualGroup(granularity=shards) | Qwen(granularity=shards):
            size = float(shards)
        case _:
            ratio = asked.experts / asked.top_k
            size = {"sum": float(asked.top_k), "ratio": ratio, "none": 1.0}[asked.scale]
    return size / _sum_of_weights(asked) * (0.5 if _has_whole(asked) else 1.0)


def spread(asked: Upcycling) -> float:
    """The standard deviation of a gate's logits at the start.

    Large enough by itself that scores keep the order of the logits: libraries choose by a softmax in float32,
    in which logits of ``FLAT`` fall on some thirty values, and break ties each in its own way. Of ``expand``
    it is how far copies are apart, over what is between experts (``begun`` knows the default).
    """
    flat = _ALL if isinstance(asked.method, Split) else FLAT
    return asked.spread or (flat if needs_equal_weights(asked) else _APART)


def begun(model: Model, asked: Upcycling) -> Upcycling:
    """``asked`` with the spread that it begins with on record, whatever the default will be."""
    match asked.method:
        case Latent():
            return asked
        case Expand() if asked.spread is None:
            return dataclasses.replace(asked, spread=FLAT if chosen_together(model, asked) else _SIDES)
        case _:
            return dataclasses.replace(asked, spread=spread(asked))


def chosen_together(model: Model, asked: Upcycling) -> bool:
    """Whether ``expand`` lets a token use all copies of each of its experts."""
    moe = model.moe
    assert moe is not None, "expand has a sparse source"
    return asked.top_k * moe.experts == moe.most_active * asked.experts


def weighs_copies_alike(model: Model) -> bool:
    """Whether weights of twice the experts, each twice, are half of what they were.

    Standardised logits are not what they were: their deviation counts the experts.
    """
    assert model.moe is not None, "expand has a sparse source"
    router = model.moe.router
    if any(isinstance(transform, Standardise) for transform in router.transforms):
        return False
    match router.weight:
        case Normalised() | SoftmaxOfSelected():
            return True
        case Raw():
            return isinstance(router.score, Softmax)
        case _:
            return False


def needs_equal_weights(asked: Upcycling) -> bool:
    """Whether the result equals its source only while the weights of all experts are equal."""
    match asked.method:
        case Copy() | Drop(fresh=0.0):
            return asked.top_k == 1
        case VirtualGroup(weights=weights):
            return weights == "raw"
        case RandomSplit() | ClusterSplit() | GraphSplit() | Carve():
            return asked.top_k == asked.experts and asked.scale == "sum"
        case _:
            return False


def _sum_of_weights(asked: Upcycling) -> float:
    """Of those chosen, while all logits are equal."""
    return asked.top_k / _routed(asked) if isinstance(_weight(asked), Raw) else 1.0


def _has_whole(asked: Upcycling) -> bool:
    """Whether the whole network is a shared expert."""
    return isinstance(asked.method, Qwen) or (asked.shared > 0 and not isinstance(asked.method, Split))


def _moe(dense: FeedForward, asked: Upcycling) -> MoE:
    _check(dense, asked)
    width = dense.width // slices(dense, asked)
    return MoE(
        experts=_routed(asked),
        width=width,
        activation=dense.activation,
        router=Router(
            projection=_projection(asked),
            transforms=_transforms(asked),
            select=TopK(k=asked.top_k),
            weight=_weight(asked),
        ),
        balance=Balance(losses=(SwitchLoss(),)),
        shared=_shared(dense, asked, width),
    )


def _check(dense: FeedForward, asked: Upcycling) -> None:
    method = asked.method
    if not isinstance(method, Split) and asked.shared > 1:
        raise ConsiliumError(
            f"upcycle: --shared {asked.shared} for {method.kind}, whose shared expert is the whole network;"
            " give --shared 1 or none."
        )
    if isinstance(method, InterSplit) and not asked.shared:
        raise ConsiliumError(
            "upcycle: split-inter puts neurons that most tokens need into shared experts; give --shared 1 or"
            " more, or choose split-inner."
        )
    if isinstance(method, VirtualGroup):
        _check_groups(dense, asked, method)
    if isinstance(method, BranchTrainMix):
        _check_prompts(asked, method)


def _check_groups(dense: FeedForward, asked: Upcycling, method: VirtualGroup) -> None:
    if asked.top_k % method.granularity:
        raise ConsiliumError(
            f"upcycle: virtual groups of {method.granularity} shards need a --top-k that is a multiple of"
            f" {method.granularity}, so that whole networks are chosen, and {asked.top_k} is none."
        )
    if method.scaling == "cube_root" and dense.activation != "squared_relu":
        raise ConsiliumError(
            f"upcycle: a cube root on every matrix is exact for squared_relu, and this network has"
            f" {dense.activation}; leave method.scaling at 'down'."
        )


def _check_prompts(asked: Upcycling, method: BranchTrainMix) -> None:
    match method.directions:
        case HiddenStates(prompts=prompts) | Embeddings(prompts=prompts) if len(prompts) != asked.experts:
            raise ConsiliumError(
                f"upcycle: there are prompts for {len(prompts)} experts, and btx makes {asked.experts}; give"
                " prompts for each, in the order of --sources."
            )
        case _:
            pass


def _routed(asked: Upcycling) -> int:
    match asked.method:
        case VirtualGroup(granularity=shards) | Qwen(granularity=shards):
            return asked.experts * shards
        case _:
            return asked.experts


def _projection(asked: Upcycling) -> Projection:
    return MLPGate() if asked.gate == "mlp" else LinearGate()


def _transforms(asked: Upcycling) -> tuple[Transform, ...]:
    return (Standardise(),) if asked.gate == "standardised" else ()


def _weight(asked: Upcycling) -> Weight:
    """A single expert has its score, since a weight of 1 would give the gate no gradient."""
    match asked.method:
        case VirtualGroup(weights="raw"):
            return Raw()
        case _:
            return Raw() if asked.top_k == 1 else Normalised()


def _shared(dense: FeedForward, asked: Upcycling, width: int) -> Shared:
    """A whole network stands behind a sigmoid, which begins at a half."""
    if _has_whole(asked):
        return SigmoidGated(width=dense.width)
    return AlwaysOn(count=asked.shared, width=width) if asked.shared else NoShared()


def _family(asked: Upcycling) -> str:
    match asked.method:
        case RandomSplit() | ClusterSplit() | InnerSplit() | InterSplit() | GraphSplit() | Carve():
            return "llama-moe"
        case Copy() | Drop() | BranchTrainMix() | Expand():
            return "mixtral"
        case VirtualGroup():
            return "nemotron-moe"
        case Qwen():
            return "qwen-moe"
        case Latent():
            raise AssertionError("latent attention keeps the family")
        case _:
            assert_never(asked.method)


def _expanded(model: Model, asked: Upcycling) -> Model:
    if model.moe is None:
        raise ConsiliumError(
            f"upcycle: expand makes more experts of a sparse model, and this {model.family} model is dense;"
            " choose --method copy."
        )
    if asked.experts % model.moe.experts or asked.experts == model.moe.experts:
        raise ConsiliumError(
            f"upcycle: expand repeats each of {model.moe.experts} experts alike, so --experts must be a"
            f" multiple of {model.moe.experts}, such as {2 * model.moe.experts}, and {asked.experts} is none."
        )
    if not isinstance(model.moe.router.projection, LinearGate):
        raise ConsiliumError(
            f"upcycle: expand repeats the rows of a linear gate, and this model's is"
            f" {model.moe.router.projection.kind!r}; choose another model."
        )
    select = model.moe.router.select
    if not isinstance(select, TopK) or select.groups is not None:
        raise ConsiliumError(
            f"upcycle: expand needs a router that chooses the k best of all experts, and this one's select is"
            f" {select.kind!r} in groups or by another rule; choose another model."
        )
    router = dataclasses.replace(model.moe.router, select=TopK(k=asked.top_k))
    return dataclasses.replace(
        model, moe=dataclasses.replace(model.moe, experts=asked.experts, router=router)
    )
