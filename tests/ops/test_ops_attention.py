from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.ops.attention import attend, attend_latent, attend_naive, attend_part, merge
from support import relative_error

sizes = st.integers(1, 5)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_mask(batch: int, queries: int, keys: int, seed: int) -> Tensor:
    """Random sight, with one query that sees nothing and one that sees everything where there is room."""
    mask = random(batch, queries, keys, seed=seed) > 0
    mask[0, -1] = True
    if queries > 1:
        mask[0, 0] = False
    return mask


def compared(inputs: list[Tensor], mask: Tensor | None, scale: float, softcap: float | None) -> None:
    """``attend`` equals its naive twin in float64, in values and in the gradient of every input."""
    fast = [x.clone().requires_grad_() for x in inputs]
    slow = [x.double().requires_grad_() for x in inputs]
    y = attend(fast[0], fast[1], fast[2], mask_BSL=mask, scale=scale, softcap=softcap)
    expected = attend_naive(slow[0], slow[1], slow[2], mask_BSL=mask, scale=scale, softcap=softcap)
    assert relative_error(y, expected) < 1e-5
    towards = random(*y.shape, seed=9)
    gradients = torch.autograd.grad((y * towards).sum(), fast)
    wanted = torch.autograd.grad((expected * towards).sum(), slow)
    # One visible key has weight 1 whatever its logit: the true gradient is rounding, so the norm is joint.
    assert relative_error(joint(gradients), joint(wanted)) < 1e-5


def joint(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=sizes,
    keys=sizes,
    widths=st.sampled_from([(4, 4), (6, 4), (4, 6), (1, 1)]),
    masked=st.booleans(),
    softcap=st.sampled_from([None, 0.5, 30.0]),
)
def test_values_and_gradients_equal_the_explicit_softmax(
    *,
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    keys: int,
    widths: tuple[int, int],
    masked: bool,
    softcap: float | None,
) -> None:
    keys = keys if masked else queries
    q = random(batch, kv_heads * group, queries, widths[0], seed=1)
    k = random(batch, kv_heads, keys, widths[0], seed=2)
    v = random(batch, kv_heads, keys, widths[1], seed=3)
    mask = random_mask(batch, queries, keys, seed=4) if masked else None
    compared([q, k, v], mask, scale=1.7, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("queries", [40, 129])
def test_sizes_beyond_one_block_of_a_fused_kernel(queries: int, softcap: float | None) -> None:
    q, k, v = (
        random(2, 4, queries, 24, seed=1),
        random(2, 2, queries, 24, seed=2),
        random(2, 2, queries, 16, seed=3),
    )
    compared([q, k, v], None, scale=0.3, softcap=softcap)
    compared([q, k, v], random_mask(2, queries, queries, seed=4), scale=0.3, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_returns_zeros_and_passes_no_gradient(
    dtype: torch.dtype, width: int, softcap: float | None
) -> None:
    q, k, v = (random(1, 2, 5, w, seed=w).to(dtype).requires_grad_() for w in (8, 8, width))
    mask = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    mask[0, 2] = False
    mask[:, :, 4] = False
    y = attend(q, k, v, mask_BSL=mask, scale=0.5, softcap=softcap)
    assert torch.equal(y[:, :, 2], torch.zeros_like(y[:, :, 2]))
    gradients = torch.autograd.grad(y.float().square().sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert not gradients[0][:, :, 2].any()
    assert not gradients[1][:, :, 4].any()
    assert not gradients[2][:, :, 4].any()


def test_all_queries_blind_is_all_zeros() -> None:
    q, k, v = (random(2, 2, 3, 4, seed=i) for i in range(3))
    nothing = torch.zeros(2, 3, 3, dtype=torch.bool)
    for softcap in (None, 3.0):
        assert not attend(q, k, v, mask_BSL=nothing, scale=1.0, softcap=softcap).any()
    assert not attend_latent(q, k[:, 0], mask_BSL=nothing, scale=1.0).any()


@given(batch=st.integers(1, 3), heads=st.integers(1, 4), queries=sizes, keys=sizes, masked=st.booleans())
def test_latent_attention_equals_one_key_value_head(
    *, batch: int, heads: int, queries: int, keys: int, masked: bool
) -> None:
    keys = keys if masked else queries
    q = random(batch, heads, queries, 6, seed=1).requires_grad_()
    rows = random(batch, keys, 6, seed=2).requires_grad_()
    mask = random_mask(batch, queries, keys, seed=3) if masked else None
    y = attend_latent(q, rows, mask_BSL=mask, scale=0.8)
    slow_q, slow_rows = q.detach().double().requires_grad_(), rows.detach().double().requires_grad_()
    head = slow_rows[:, None]
    expected = attend_naive(slow_q, head, head, mask_BSL=mask, scale=0.8)
    assert relative_error(y, expected) < 1e-5
    towards = random(*y.shape, seed=9)
    gradients = torch.autograd.grad((y * towards).sum(), (q, rows))
    wanted = torch.autograd.grad((expected * towards).sum(), (slow_q, slow_rows))
    assert relative_error(joint(gradients), joint(wanted)) < 1e-5


def test_softcap_bounds_logits_before_the_mask() -> None:
    """Two visible keys of logits far above the cap weigh alike; a masked key weighs nothing."""
    q = torch.full((1, 1, 1, 1), 1000.0)
    k = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    v = torch.tensor([1.0, 2.0, 400.0]).view(1, 1, 3, 1)
    mask = torch.tensor([[[True, True, False]]])
    assert attend(q, k, v, mask_BSL=mask, scale=1.0, softcap=5.0).item() == pytest.approx(1.5)
    assert attend(q, k, v, mask_BSL=mask, scale=1.0).item() == pytest.approx(2.0)


@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=sizes,
    tiles=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    softcap=st.sampled_from([None, 2.0]),
    nested=st.booleans(),
)
def test_parts_merge_into_attention_over_all_keys_in_values_and_gradients(
    *,
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    tiles: list[int],
    softcap: float | None,
    nested: bool,
) -> None:
    """Some queries see nothing in some tiles, and one of them nothing at all."""
    q = random(batch, kv_heads * group, queries, 4, seed=1)
    k, v = random(batch, kv_heads, sum(tiles), 4, seed=2), random(batch, kv_heads, sum(tiles), 3, seed=3)
    mask = random_mask(batch, queries, sum(tiles), seed=4)
    fast, slow = ([x.double().requires_grad_() for x in (q, k, v)] for _ in range(2))
    pieces = zip(fast[1].split(tiles, 2), fast[2].split(tiles, 2), mask.split(tiles, 2), strict=True)
    parts = [attend_part(fast[0], a, b, mask_BSL=c, scale=1.3, softcap=softcap) for a, b, c in pieces]
    whole = merge([merge(parts[:2]), *parts[2:]]) if nested else merge(parts)
    expected = attend_naive(*slow, mask_BSL=mask, scale=1.3, softcap=softcap)
    assert relative_error(whole.values_BHSV, expected) < 1e-12
    seen = mask.any(-1)[:, None].expand_as(whole.lse_BHS)
    assert bool((whole.lse_BHS[~seen] == -torch.inf).all())
    alone = attend_part(*slow, mask_BSL=mask, scale=1.3, softcap=softcap)
    assert torch.allclose(whole.lse_BHS[seen], alone.lse_BHS[seen], rtol=1e-12)
    towards, upwards = random(*expected.shape, seed=9).double(), random(*seen.shape, seed=8).double()
    score = (whole.values_BHSV * towards).sum() + (whole.lse_BHS * upwards)[seen].sum()
    wanted = (expected * towards).sum() + (alone.lse_BHS * upwards)[seen].sum()
    gradients, correct = torch.autograd.grad(score, fast), torch.autograd.grad(wanted, slow)
    assert relative_error(joint(gradients), joint(correct)) < 1e-10


def test_parts_without_any_key_in_sight_stay_zero_and_pass_no_gradient() -> None:
    q, k, v = (random(1, 2, 3, 4, seed=i).requires_grad_() for i in range(3))
    blind = attend_part(q, k, v, mask_BSL=torch.zeros(1, 3, 3, dtype=torch.bool), scale=1.0)
    whole = merge([blind, blind])
    assert not whole.values_BHSV.any()
    assert bool((whole.lse_BHS == -torch.inf).all())
    gradients = torch.autograd.grad(whole.values_BHSV.sum(), (q, k, v))
    assert all(not gradient.any() for gradient in gradients)


def test_parts_of_bfloat16_are_float32_and_huge_logits_stay_finite() -> None:
    q, k, v = (random(1, 2, 3, 4, seed=i).bfloat16() for i in range(3))
    seen = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    parts = [attend_part(300 * q, 300 * k, v, mask_BSL=m, scale=1.0) for m in (seen, torch.zeros_like(seen))]
    whole = merge(parts)
    assert whole.values_BHSV.dtype == whole.lse_BHS.dtype == torch.float32
    expected = attend_naive(300 * q.double(), 300 * k.double(), v.double(), mask_BSL=seen, scale=1.0)
    assert relative_error(whole.values_BHSV, expected) < 1e-5
