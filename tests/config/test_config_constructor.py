"""A mistake in a constructor is told like one in a file: in one sentence of our own."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from consilium.config.feed_forward import FeedForward
from consilium.config.io import from_data, to_data
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.config.training import Training
from consilium.errors import ConsiliumError

MIXTRAL = MoE(experts=8, width=16, router=Router(select=TopK(k=2)))


GROUPED = {"kind": "top_k", "k": 1, "groups": {"count": 2, "keep": 1, "score": "max", "scoer": "max"}}
MISTAKES: dict[str, tuple[type, dict[str, object]]] = {
    "MoE: key router is missing; add it.": (MoE, {"experts": 8, "width": 16}),
    "Training: key model is missing; add it.": (Training, {}),
    "TopK: k = '0': input should be greater than 0.": (TopK, {"k": 0}),
    "FeedForward: unknown key widht. Did you mean 'width'?": (FeedForward, {"width": 1, "widht": 1}),
    "Router: unknown kind 'topk' for select. Did you mean 'top_k'?": (Router, {"select": {"kind": "topk"}}),
    "MoE: unknown key router.select.top_k.groups.scoer. Did you mean 'score'?": (
        MoE,
        {"experts": 8, "width": 16, "router": {"select": GROUPED}},
    ),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_in_a_constructor_is_one_sentence(said: str) -> None:
    cls, values = MISTAKES[said]
    with pytest.raises(ConsiliumError) as caught:
        cls(**values)
    assert str(caught.value) == said


def test_what_contradicts_itself_is_told_by_the_sentence_of_the_class() -> None:
    with pytest.raises(ConsiliumError, match=r"^moe: top-2 of 1 experts is impossible; lower k to at most 1"):
        dataclasses.replace(MIXTRAL, experts=1)


def test_a_file_is_named_where_one_was_read() -> None:
    data = to_data(MIXTRAL) | {"experts": 1}
    with pytest.raises(ConsiliumError, match=r"^run\.yaml: moe: top-2 of 1 experts"):
        from_data(MoE, data, where="run.yaml")


def test_a_checked_class_still_shows_its_signature_and_compares_by_value() -> None:
    assert list(inspect.signature(FeedForward).parameters) == ["width", "activation"]
    assert FeedForward(width=3) == FeedForward(width=3) != FeedForward(width=4)
    assert hash(TopK(k=2)) == hash(TopK(k=2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        MIXTRAL.width = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_configurations_inside_configurations_are_kept_as_they_are() -> None:
    select = TopK(k=2)
    assert Router(select=select).select is select
    assert from_data(Model, to_data(_model())) == _model()


def _model() -> Model:
    attention = {"kind": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4}
    return from_data(
        Model,
        {"family": "x", "vocab_size": 5, "hidden_size": 8, "layers": 1, "attention": attention}
        | {"moe": to_data(MIXTRAL)},
    )
