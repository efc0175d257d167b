from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.cases import CONFIGS, counted
from consilium.attention.context import build_context
from consilium.ops.rope import rotary_tables

CONFIG = CONFIGS["latent"]


def test_one_document_without_padding_needs_no_mask() -> None:
    zeros, ones = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    assert build_context(CONFIG, counted(2, 5)).mask_BSL is None
    assert build_context(CONFIG, counted(2, 5), sequence_BS=zeros, valid_BS=ones).mask_BSL is None
    assert build_context(CONFIG, counted(2, 5), cached=True).mask_BSL is None


@given(
    sequence=st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=3),
    valid=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_a_token_sees_valid_tokens_of_its_document_up_to_itself(
    sequence: list[list[int]], valid: list[bool]
) -> None:
    batch = len(sequence)
    context = build_context(
        CONFIG,
        counted(batch, 5),
        sequence_BS=torch.tensor(sequence),
        valid_BS=torch.tensor(valid).expand(batch, 5),
    )
    seen = [
        [[key <= query and row[key] == row[query] and valid[key] for key in range(5)] for query in range(5)]
        for row in sequence
    ]
    mask = torch.ones(batch, 5, 5, dtype=torch.bool).tril() if context.mask_BSL is None else context.mask_BSL
    assert mask.tolist() == seen


@given(starts=st.lists(st.integers(0, 6), min_size=1, max_size=3), tokens=st.integers(1, 4))
def test_on_a_cache_a_token_sees_the_slots_up_to_its_position(starts: list[int], tokens: int) -> None:
    position = torch.tensor(starts)[:, None] + torch.arange(tokens)
    context = build_context(CONFIG, position, cached=True)
    keys = max(starts) + tokens
    assert context.keys == keys
    seen = [[[slot <= at for slot in range(keys)] for at in row] for row in position.tolist()]
    mask = (
        torch.ones(1, keys, keys, dtype=torch.bool).tril() if context.mask_BSL is None else context.mask_BSL
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
