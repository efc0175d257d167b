from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.ops import peaks
from consilium.ops.documents import Documents
from consilium.ops.peaks import largest_logits
from support import relative_error


@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 12),
    seed=st.integers(0, 30),
    packed=st.booleans(),
    padded=st.booleans(),
    above=st.sampled_from([0.0, 0.8, 1e9]),
)
def test_the_largest_logit_is_that_of_every_pair_that_attention_sees(
    rows: int, tokens: int, seed: int, packed: bool, padded: bool, above: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q_BSHK, k_BSHK = (torch.randn(rows, tokens, 3, 4, generator=generator) for _ in range(2))
    sequence_BS = (torch.rand(rows, tokens, generator=generator) < 0.3).long().cumsum(1)
    count_B = torch.randint(1, tokens + 1, (rows,), generator=generator)
    valid_BS = torch.arange(tokens) < count_B[:, None] if padded else None
    if valid_BS is not None:  # whatever is in padding, nobody sees it
        q_BSHK[~valid_BS] = k_BSHK[~valid_BS] = 1e6
    documents = Documents.find(sequence_BS, None) if packed else None
    found_H = largest_logits(q_BSHK, k_BSHK, documents, valid_BS, scale=0.5, above=above)
    for head in range(3):
        seen = [
            0.5 * float(q_BSHK[b, i, head] @ k_BSHK[b, j, head])
            for b in range(rows)
            for i in range(tokens)
            for j in range(i + 1)
            if (not packed or sequence_BS[b, i] == sequence_BS[b, j])
            and (valid_BS is None or (valid_BS[b, i] and valid_BS[b, j]))
        ]
        if max(seen) > above:
            assert float(found_H[head]) == pytest.approx(max(seen), rel=1e-5)
        else:
            assert max(seen) - 1e-5 <= float(found_H[head])
            assert float(found_H[head]) <= above or float(found_H[head]) == pytest.approx(max(seen), rel=1e-5)


def test_stripes_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q_BSHK, k_BSHK = (torch.randn(2, 23, 2, 4, generator=generator) for _ in range(2))
    sequence_BS = (torch.rand(2, 23, generator=generator) < 0.2).long().cumsum(1)
    documents = Documents.find(sequence_BS, None)
    whole_H = largest_logits(q_BSHK, k_BSHK, documents, None, scale=1.0, above=0.0)
    monkeypatch.setattr(peaks, "STRIPE", 5)
    assert (
        relative_error(largest_logits(q_BSHK, k_BSHK, documents, None, scale=1.0, above=0.0), whole_H) < 1e-6
    )
