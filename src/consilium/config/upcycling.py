"""How a trained model becomes a sparse one, as data: a method, what it makes and how its gate begins.

Every method is a closed union member; ``consilium.planner.upcycled`` says what each makes of a configuration
and ``consilium.upcycling`` what it makes of weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, get_args

from pydantic import Field, NonNegativeInt

from consilium.config.base import Size, configuration
from consilium.config.io import replace
from consilium.errors import ConsiliumError, nearest

Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=1e-6, le=10)]
"""Of logits whose softmax float32 tells apart: of closer ones it is equal, of wider ones zero for most."""


@configuration
class RandomSplit:
    """The hidden neurons of each network, dealt at random (LLaMA-MoE, 2406.16554: independent, random)."""

    kind: Literal["split-random"] = "split-random"


@configuration
class ClusterSplit:
    """Neurons whose rows of one matrix are alike, in clusters of equal size (independent, clustering)."""

    kind: Literal["split-cluster"] = "split-cluster"
    rows: Literal["gate", "up"] = "up"
    metric: Literal["l2", "cosine"] = "l2"


@configuration
class InnerSplit:
    """Each expert has the neurons that matter most to one cluster of the tokens (sharing, inner).

    Matter: |activation * gradient|, summed. A neuron may be in several experts and in none.
    """

    kind: Literal["split-inner"] = "split-inner"


@configuration
class InterSplit:
    """As inner; neurons that matter to most clusters are always on, the shared experts (sharing, inter)."""

    kind: Literal["split-inter"] = "split-inter"


@configuration
class GraphSplit:
    """Neurons that are active together, by the leading eigenvectors of their co-activation."""

    kind: Literal["split-graph"] = "split-graph"


@configuration
class Copy:
    """Every expert is the whole network (sparse upcycling, 2212.05055; Skywork-MoE, 2406.06563)."""

    kind: Literal["copy"] = "copy"


@configuration
class VirtualGroup:
    """``experts`` copies cut into ``granularity`` shards, the shards of a copy behind equal gate rows.

    So the first choice is a whole network (Nvidia, 2410.07524). ``weights`` are softmax-then-top-k (raw) or
    top-k-then-softmax (normalised). ``scaling="cube_root"`` puts the factor on all matrices as the paper
    does, which is exact for squared ReLU alone; ``down`` is exact for every activation.
    """

    kind: Literal["virtual-group"] = "virtual-group"
    granularity: Size = 1
    weights: Literal["raw", "normalised"] = "raw"
    scaling: Literal["down", "cube_root"] = "down"


@configuration
class Qwen:
    """Copies whose neurons are shuffled, cut into ``granularity`` experts and drawn anew in part.

    The shared expert is the whole network (Qwen1.5-MoE).
    """

    kind: Literal["qwen"] = "qwen"
    granularity: Size = 1
    fresh: Share = 0.5


@configuration
class Drop:
    """Copies of which a share of the neurons is drawn anew (Drop-Upcycling, 2502.19261)."""

    kind: Literal["drop"] = "drop"
    fresh: Share = 0.5


Text = Annotated[str, Field(min_length=1)]


@configuration
class Prompts:
    """What one expert is for, and what it is not for, as examples."""

    positive: Annotated[tuple[Text, ...], Field(min_length=1)]
    negative: tuple[Text, ...] = ()


@configuration
class PromptFile:
    """What a file of prompts holds."""

    experts: tuple[Prompts, ...]
    """In the order of the sources."""


@configuration
class AtRandom:
    """Normal rows: experts say nothing of what they are for."""

    kind: Literal["random"] = "random"


@configuration
class HiddenStates:
    """What the gate gets of an expert's positive prompts, less what it gets of its negative ones.

    Means over prompts: of the mean of a prompt's tokens, or of its last one (mergekit's ``hidden_avg`` and
    ``hidden``, which take the states before the layer).
    """

    kind: Literal["hidden"] = "hidden"
    prompts: tuple[Prompts, ...]
    """One an expert, in the order of the sources."""
    of: Literal["mean", "last"] = "mean"

    def __post_init__(self) -> None:
        _refuse_alike(self.prompts)


@configuration
class Embeddings:
    """The same of the embeddings of the prompts' tokens, one direction for all layers (``cheap_embed``)."""

    kind: Literal["embedding"] = "embedding"
    prompts: tuple[Prompts, ...]

    def __post_init__(self) -> None:
        _refuse_alike(self.prompts)


Directions = Annotated[AtRandom | HiddenStates | Embeddings, Field(discriminator="kind")]


def _refuse_alike(prompts: Sequence[Prompts]) -> None:
    """Two equal rows of a gate would always tie, and the lower index be chosen."""
    for place, one in enumerate(prompts):
        if one in prompts[:place]:
            raise ConsiliumError(
                f"upcycle: the prompts of experts {prompts.index(one)} and {place} are the same, so nothing"
                " would tell the two apart; give each its own."
            )


@configuration
class BranchTrainMix:
    """Experts are the networks of several fine-tunes of one model (Branch-Train-MiX, 2403.07816).

    What is no expert is the mean of the fine-tunes, or stays as it is in the model that they began with.
    """

    kind: Literal["btx"] = "btx"
    rest: Literal["mean", "base"] = "mean"
    directions: Directions = AtRandom()


@configuration
class Carve:
    """Neurons that are active for most tokens are shared, the others grouped by when they are.

    CMoE (2502.04416). The gate row of an expert is that of its most typical neuron.
    """

    kind: Literal["carve"] = "carve"
    active: Share = 0.1
    """Share of its neurons that counts as active for a token: those of largest activation."""


@configuration
class Expand:
    """A sparse model with each expert ``experts / E`` times (expert upcycling)."""

    kind: Literal["expand"] = "expand"


@configuration
class Latent:
    """Grouped-query attention becomes latent attention; the feed-forward stays (TransMLA, 2502.07864).

    All heads share one rotated key of ``rope_dim`` dimensions, the principal components of theirs; the rest
    of the keys and the values come out of ``kv_rank`` dimensions. Both by default all there are: an equal
    model with as large a cache.
    """

    kind: Literal["mla"] = "mla"
    kv_rank: Size | None = None
    rope_dim: Size | None = None


Method = Annotated[
    RandomSplit
    | ClusterSplit
    | InnerSplit
    | InterSplit
    | GraphSplit
    | Copy
    | VirtualGroup
    | Qwen
    | Drop
    | BranchTrainMix
    | Carve
    | Expand
    | Latent,
    Field(discriminator="kind"),
]
Split = RandomSplit | ClusterSplit | InnerSplit | InterSplit | GraphSplit | Carve


@configuration
class Upcycling:
    """``experts`` routed experts of which a token uses ``top_k``, beside ``shared`` ones.

    Split methods cut the network into ``experts + shared`` slices. For those that copy, ``shared=1`` keeps
    the whole network for every token, behind a sigmoid that begins at a half; the routed experts give the
    other half.

    ``scale`` is what a split's outputs are multiplied by, weights summing to 1: ``sum`` is k, so that the
    experts chosen count as they did in the network; ``ratio`` is E/k (LLaMA-MoE); ``none`` is 1. It is put
    into the down matrices.

    ``mla`` makes no experts: it takes neither ``experts`` nor ``top_k``, which the others need. A key that a
    method has no use for stays at its default.

    ``spread`` is the standard deviation of the gate's logits at the start; without one it is so small that
    the weights of the chosen are equal where equality depends on them, else so large that every library
    finds the same order (``consilium.planner.upcycled.spread``).
    """

    method: Method
    experts: NonNegativeInt = 0
    top_k: NonNegativeInt = 0
    shared: NonNegativeInt = 0
    gate: Literal["linear", "mlp", "standardised"] = "linear"
    scale: Literal["sum", "ratio", "none"] = "sum"
    spread: Spread | None = None
    dense_first: NonNegativeInt = 0
    moe_every: Size = 1
    calibration_tokens: Size = 4096
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        unread, why = _unread(self.method)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in unread and value != field.default:
                raise ConsiliumError(f"upcycle: {field.name} is {value}, but {why}; leave it out.")
        for key in ("experts", "top_k"):
            if key not in unread and not getattr(self, key):
                raise ConsiliumError(_missing(key, self.method))


def _missing(key: str, method: Method) -> str:
    if key == "experts" and isinstance(method, BranchTrainMix):
        return (
            "upcycle: btx makes an expert of each source, and there is none; give --sources MODEL MODEL, or"
            " experts=N to plan."
        )
    option = key.replace("_", "-")
    return f"upcycle: {key} is missing, and {method.kind} needs it; give --{option} N or {key}=N."


def _unread(method: Method) -> tuple[tuple[str, ...], str]:
    """Keys of an ``Upcycling`` that ``method`` has no use for, and why."""
    layers = ("dense_first", "moe_every")
    match method:
        case Latent():
            unread = ("experts", "top_k", "shared", "gate", "scale", "spread", *layers)
            return unread, "mla makes latent attention and no experts"
        case Expand():
            return ("shared", "gate", "scale", *layers), "expand keeps what its model has of it"
        case RandomSplit() | ClusterSplit() | InnerSplit() | InterSplit() | GraphSplit() | Carve():
            return (), ""
        case _:
            return ("scale",), f"{method.kind} splits no network"


_OWN: Final = frozenset(
    field.name for one in get_args(get_args(Method)[0]) for field in dataclasses.fields(one)
)
"""Keys that methods have of their own."""


def configured(values: Mapping[str, str]) -> Upcycling:
    """An ``Upcycling`` of keys and values as text: ``method`` is a name, and its own keys are below it.

    Raises ConsiliumError naming a key that is missing, and for an unknown one the nearest.
    """
    known = [field.name for field in dataclasses.fields(Upcycling)]
    for key in values:
        if key.partition(".")[0] not in known:
            hint = f" Did you mean 'method.{key}'?" if key in _OWN else nearest(key, known)
            raise ConsiliumError(f"upcycle: unknown key {key!r}.{hint}")
    if not {"method", "method.kind"} & values.keys():
        raise ConsiliumError("upcycle: method is missing; give method=NAME.")
    keyed = {"method.kind" if key == "method" else key: value for key, value in values.items()}
    return replace(Upcycling(method=Latent()), keyed, where="upcycle")
