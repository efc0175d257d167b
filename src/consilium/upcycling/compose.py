"""Several models of one shape as one: experts from each, the rest their mean, prompts for what each is for.

Legend: E experts, P prompts, D hidden size, S tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, assert_never, cast, final

import torch
from torch import Tensor

from consilium.checkpoint.folders import checkpoint_in
from consilium.checkpoint.source import Source
from consilium.checkpoint.store import open_folder
from consilium.config.generation import GenerationDefaults
from consilium.config.io import to_data
from consilium.config.model import Model
from consilium.config.upcycling import AtRandom, BranchTrainMix, Directions, Embeddings, HiddenStates, Prompts
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.evaluation.walk import Passage
from consilium.model.types import Inputs
from consilium.ops.loss import IGNORE
from consilium.upcycling.rounding import rounded

_NO_VALUES: Final = ("family", "init", "max_length")
"""Keys of a configuration that change nothing of what a trained model computes; the base's stay."""


@final
@dataclass(frozen=True, slots=True)
class Mean:
    """A ``Source``: each tensor the mean of that of ``sources``, in the dtype of ``base``."""

    base: Source
    sources: tuple[Source, ...]

    @property
    def config(self) -> Model:
        return self.base.config

    @property
    def generation(self) -> GenerationDefaults:
        return self.base.generation

    @property
    def state(self) -> Mapping[str, Tensor]:
        return self.base.state

    def fill(self, name: str, target: Tensor) -> None:
        """Write our tensor ``name`` into ``target``, rounded as it will be written."""
        total = torch.zeros(target.shape)
        for source in self.sources:
            total += source.read(name, torch.float32)
        target.copy_(rounded(total / len(self.sources), self.state[name].dtype, name))

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        """The same of its rows from ``first`` on."""
        target.copy_(self.read(name, target.dtype)[first : first + target.shape[0]])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return our tensor ``name``, by default in the dtype that ``state`` says."""
        values = torch.zeros_like(self.state[name], dtype=dtype, device="cpu")
        self.fill(name, values)
        return values


@final
@dataclass(frozen=True, slots=True)
class Pointers:
    """The prompts of all experts, and how much each counts in the row of each expert."""

    passages: tuple[Passage, ...]
    weights_EP: Tensor
    of_last: bool

    def to(self, device: str) -> Pointers:
        return replace(self, passages=tuple(passage.to(device) for passage in self.passages))

    def rows(self, states: Sequence[Tensor]) -> Tensor:
        """Rows [E, D] out of a state [1, S, D] of each prompt."""
        ends_PD = torch.cat([x_BSD[:, -1] if self.of_last else x_BSD.mean(1) for x_BSD in states]).cpu()
        return self.weights_EP @ ends_PD


@final
@dataclass(frozen=True, slots=True)
class Composed:
    """The models that experts come from, by what they are called, and the prompts of each."""

    names: tuple[str, ...]
    sources: tuple[Source, ...]
    pointers: Pointers | None

    def to(self, device: str) -> Composed:
        """The same with prompts that run on ``device``."""
        return self if self.pointers is None else replace(self, pointers=self.pointers.to(device))

    def networks(self, layer: int, which: str, dtype: torch.dtype) -> Tensor:
        """The up or down matrices of one layer: [E, ...]."""
        name = f"layers.{layer}.feed_forward.{which}.weight"
        return torch.stack([source.read(name, dtype) for source in self.sources])


def composed(
    base: Source, folder: Path, tokenizer: Tokenizer, places: Sequence[Path], method: BranchTrainMix
) -> Composed:
    """Open the fine-tunes in ``places``.

    Raises ConsiliumError naming the one that has another configuration or vocabulary than ``base``, which
    lies in ``folder``.
    """
    opened: list[Source] = []
    for place in places:
        found = checkpoint_in(place)
        source = open_folder(found, check_finite=True)
        _check_configuration(place, source.config, folder, base.config)
        _check_vocabulary(place, Tokenizer.load(found), folder, tokenizer)
        opened.append(source)
    pointers = _pointers(method.directions, tokenizer, base.config.max_length)
    return Composed(tuple(place.name for place in places), tuple(opened), pointers)


def trunk(base: Source, experts: Composed, method: BranchTrainMix) -> Source:
    """What is no expert."""
    match method.rest:
        case "mean":
            return Mean(base, experts.sources)
        case "base":
            return base
        case _:
            assert_never(method.rest)


def _check_configuration(place: Path, config: Model, folder: Path, base: Model) -> None:
    same = {key: getattr(base, key) for key in _NO_VALUES}
    one, other = to_data(base), to_data(replace(config, **same))
    for key, expected, found in _differing(one, other):
        raise ConsiliumError(
            f"upcycle: {key} of {place} is {_told(found)} and of {folder} {_told(expected)}, and experts must"
            " be fine-tunes of one model; leave it out, or choose another."
        )


def _told(value: object) -> str:
    """A part that only one of two models has would fill a page."""
    return "set" if isinstance(value, dict) else repr(value)


def _differing(one: Any, other: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Keys, dotted, of which two configurations as data have other values."""
    if isinstance(one, dict) and isinstance(other, dict):
        mine, theirs = cast("dict[str, Any]", one), cast("dict[str, Any]", other)
        names = [*mine, *(name for name in theirs if name not in mine)]
        return [
            found
            for name in names
            for found in _differing(mine.get(name), theirs.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if one == other else [(key, one, other)]


def _check_vocabulary(place: Path, tokenizer: Tokenizer, folder: Path, base: Tokenizer) -> None:
    for token in sorted(base.known_ids | tokenizer.known_ids):
        if base.decode_bytes([token]) != tokenizer.decode_bytes([token]):
            raise ConsiliumError(
                f"upcycle: token {token} of {place} is {tokenizer.decode_bytes([token])!r} and of {folder}"
                f" {base.decode_bytes([token])!r}, and experts must share one vocabulary; leave it out, or"
                " choose another."
            )


def _pointers(directions: Directions, tokenizer: Tokenizer, longest: int) -> Pointers | None:
    match directions:
        case AtRandom():
            return None
        case HiddenStates(prompts=prompts, of=of):
            return _pointed(prompts, tokenizer, longest, of_last=of == "last")
        case Embeddings(prompts=prompts):
            return _pointed(prompts, tokenizer, longest, of_last=False)
        case _:
            assert_never(directions)


def _pointed(experts: Sequence[Prompts], tokenizer: Tokenizer, longest: int, *, of_last: bool) -> Pointers:
    passages: list[Passage] = []
    weights: list[tuple[int, float]] = []
    for expert, prompts in enumerate(experts):
        for sign, texts in ((1.0, prompts.positive), (-1.0, prompts.negative)):
            passages += [_passage(text, tokenizer, longest) for text in texts]
            weights += [(expert, sign / len(texts)) for _ in texts]
    weights_EP = torch.zeros(len(experts), len(passages))
    for place, (expert, weight) in enumerate(weights):
        weights_EP[expert, place] = weight
    return Pointers(tuple(passages), weights_EP, of_last)


def _passage(text: str, tokenizer: Tokenizer, longest: int) -> Passage:
    opening = [] if tokenizer.opening_id is None else [tokenizer.opening_id]
    ids = [*opening, *tokenizer.encode(text)]
    if len(ids) > longest:
        raise ConsiliumError(
            f"upcycle: the prompt {text[:40]!r} has {len(ids)} tokens and the model a context of {longest};"
            " give a shorter one."
        )
    ids_BS = torch.tensor(ids, dtype=torch.int64)[None]
    return Passage(Inputs(ids_BS), torch.full_like(ids_BS, IGNORE), 0)
