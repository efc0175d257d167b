from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.ops import documents as room
from consilium.ops import sight
from consilium.ops.attention import attend_naive
from consilium.ops.documents import Documents, attend_documents
from consilium.ops.sight import Sight
from support import relative_error


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(cuts: list[list[int]], tokens: int) -> Tensor:
    """Document numbers [B, S]: a row begins a new one at each of its cuts."""
    begins = torch.zeros(len(cuts), tokens, dtype=torch.int64)
    for row, places in zip(begins, cuts, strict=True):
        row[[place for place in places if 0 < place < tokens]] = 1
    return begins.cumsum(1)


def naive(q: Tensor, k: Tensor, v: Tensor, sequence: Tensor, softcap: float | None) -> Tensor:
    """The dense mask, head by head."""
    seen = (sequence[:, :, None] == sequence[:, None, :]).tril()
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return attend_naive(*heads, mask_BSL=seen, scale=1.1, softcap=softcap).transpose(1, 2)


@given(
    cuts=st.lists(st.lists(st.integers(0, 11), max_size=5), min_size=1, max_size=3),
    tokens=st.integers(1, 12),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    softcap=st.sampled_from([None, 2.0]),
    short=st.booleans(),
)
def test_documents_equal_the_dense_mask_in_values_and_gradients(
    *, cuts: list[list[int]], tokens: int, heads: tuple[int, int], softcap: float | None, short: bool
) -> None:
    sequence = rows_of(cuts, tokens)
    q = random(len(cuts), tokens, heads[0], 4, seed=1)
    k, v = random(len(cuts), tokens, heads[1], 4, seed=2), random(len(cuts), tokens, heads[1], 3, seed=3)
    fast, slow = (
        [x.requires_grad_() for x in (q, k, v)],
        [x.detach().double().requires_grad_() for x in (q, k, v)],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "SHORT", tokens if short else 0)
        documents = Documents.find(sequence, None)
    y = attend_documents(*fast, documents, Sight(1.1, softcap))
    expected = naive(*slow, sequence, softcap)
    assert documents is None or (documents.seen_BSS is not None) == short
    assert y.shape == expected.shape
    assert relative_error(y, expected) < 1e-5
    towards = random(*y.shape, seed=4)
    found = torch.autograd.grad((y * towards).sum(), fast)
    wanted = torch.autograd.grad((expected * towards).sum(), slow)
    joined = [torch.cat([x.flatten() for x in tensors]) for tensors in (found, wanted)]
    assert relative_error(*joined) < 1e-5


@pytest.mark.parametrize(("tokens", "expected"), [(room.SHORT, 1), (room.SHORT + 1, 5)])
def test_long_rows_are_calls_a_document_and_short_ones_one_call(
    tokens: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, calls = random(2, tokens, 1, 4, seed=1), []
    for module in (room, sight):
        monkeypatch.setattr(module, "attend", lambda q, k, v, **_: calls.append(q) or v)
    attend_documents(q, q, q, Documents.find(rows_of([[20, 60, 61], []], tokens), None), Sight(1.0))
    assert len(calls) == expected
