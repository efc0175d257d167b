from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention.cases import CONFIGS, counted
from consilium.attention.context import build_context
from consilium.errors import ConsiliumError
from consilium.ops.rope import rotary_tables

CONFIG = CONFIGS["latent"]


def test_one_document_without_padding_needs_no_mask_and_no_offsets() -> None:
    zeros, ones = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    for context in (
        build_context(CONFIG, counted(2, 5)),
        build_context(CONFIG, counted(2, 5), sequence_BS=zeros, valid_BS=ones),
        build_context(CONFIG, counted(2, 5), cached=True),
    ):
        assert context.documents is None
        assert context.seen_BSL is None


def rows_of_documents(lengths: list[list[tuple[int, int, int]]]) -> tuple[Tensor, Tensor]:
    """Rows of documents, each with padding before and behind, cut and filled to the same length."""
    width = max(sum(map(sum, row)) for row in lengths)
    sequence, valid = (
        torch.full((len(lengths), width), -1),
        torch.zeros(len(lengths), width, dtype=torch.bool),
    )
    for b, row in enumerate(lengths):
        at = 0
        for number, (before, length, behind) in enumerate(row):
            sequence[b, at : at + before + length + behind] = number
            valid[b, at + before : at + before + length] = True
            at += before + length + behind
    return sequence, valid


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    )
)
def test_a_token_sees_the_tokens_of_its_document_up_to_itself(rows: list[list[tuple[int, int, int]]]) -> None:
    sequence, valid = rows_of_documents(rows)
    context = build_context(CONFIG, counted(*sequence.shape), sequence_BS=sequence, valid_BS=valid)
    number = torch.zeros_like(sequence) if context.documents is None else context.documents.number_BS
    for b, row in enumerate(sequence.tolist()):
        for query in (q for q in range(len(row)) if valid[b, q]):
            expected = [key for key in range(query + 1) if row[key] == row[query] and valid[b, key]]
            seen = [key for key in range(query + 1) if number[b, key] == number[b, query]]
            assert seen == expected
    if context.documents is not None:
        starts = [0, *itertools.accumulate(context.documents.lengths)]
        assert starts[-1] == sequence.numel()
        assert set(range(0, sequence.numel(), sequence.shape[1])) <= set(starts)
        for start, end in itertools.pairwise(starts):
            assert len(number.flatten()[start:end].unique()) == 1


@pytest.mark.parametrize(
    ("sequence", "valid"),
    [([[0, 0, 1, 0]], None), (None, [[True, False, True]]), ([[0, 1, 1, 1]], [[True, True, False, True]])],
)
def test_a_document_in_pieces_is_refused(
    sequence: list[list[int]] | None, valid: list[list[bool]] | None
) -> None:
    given = {"sequence_BS": sequence, "valid_BS": valid}
    tensors = {name: torch.tensor(value) for name, value in given.items() if value is not None}
    width = next(iter(tensors.values())).shape[1]
    with pytest.raises(ConsiliumError, match=r"document \d of row 0 comes in pieces"):
        build_context(CONFIG, counted(1, width), **tensors)


@given(starts=st.lists(st.integers(0, 6), min_size=1, max_size=3), tokens=st.integers(1, 4))
def test_on_a_cache_a_token_sees_the_slots_up_to_its_position(starts: list[int], tokens: int) -> None:
    position = torch.tensor(starts)[:, None] + torch.arange(tokens)
    context = build_context(CONFIG, position, cached=True)
    keys = max(starts) + tokens
    assert context.keys == keys
    seen = [[[slot <= at for slot in range(keys)] for at in row] for row in position.tolist()]
    mask = (
        torch.ones(1, keys, keys, dtype=torch.bool).tril() if context.seen_BSL is None else context.seen_BSL
    )
    assert mask.expand(len(starts), -1, -1).tolist() == seen


@pytest.mark.parametrize(("name", "width"), [("latent", 4), ("head-norm", 6)])
def test_tables_rotate_what_the_layer_rotates(name: str, width: int) -> None:
    config, position = CONFIGS[name], counted(1, 4, 90)
    context = build_context(config, position)
    cos, sin = rotary_tables(config.rope, width, position)
    assert torch.equal(context.cos_BSR, cos)
    assert torch.equal(context.sin_BSR, sin)


def test_packed_documents_have_no_cache() -> None:
    with pytest.raises(AssertionError, match="one sequence a row"):
        build_context(CONFIG, counted(1, 4), sequence_BS=torch.tensor([[0, 0, 1, 1]]), cached=True)
