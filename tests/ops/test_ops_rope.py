from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.config.attention import GQA, MLA, Rope, Yarn
from consilium.errors import ConsiliumError
from consilium.ops.rope import frequencies, rotary_tables, rotate, rotate_naive, rotation_scale
from support import relative_error

V2 = Yarn(factor=40, original_length=4096, mscale=0.707, mscale_all_dim=0.707)
V3 = Yarn(factor=40, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
LONG = Yarn(factor=4, original_length=512, mscale=1.0, mscale_all_dim=0.0)

ropes = st.builds(
    Rope,
    theta=st.sampled_from([100.0, 10_000.0, 1e6]),
    interleaved=st.booleans(),
    scaling=st.sampled_from([Rope().scaling, V3, LONG]),
)


def latent_attention(yarn: Yarn) -> MLA:
    rope = Rope(interleaved=True, scaling=yarn)
    return MLA(heads=16, q_rank=None, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, rope=rope)


def random_heads(batch: int, tokens: int, heads: int, dim: int) -> torch.Tensor:
    return torch.randn(batch, tokens, heads, dim, generator=torch.Generator().manual_seed(dim + tokens))


@pytest.mark.parametrize(("dim", "theta"), [(2, 10_000.0), (6, 500.0), (64, 1e6)])
def test_plain_frequencies_are_powers_of_theta(dim: int, theta: float) -> None:
    expected = torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    assert relative_error(frequencies(Rope(theta=theta), dim), expected) < 1e-7


@given(rope=ropes, pairs=st.integers(1, 5), repeats=st.integers(1, 4))
def test_repeats_give_each_frequency_to_pairs_in_a_row(rope: Rope, pairs: int, repeats: int) -> None:
    once = frequencies(rope, 2 * pairs)
    found = frequencies(dataclasses.replace(rope, repeats=repeats), 2 * pairs * repeats)
    assert torch.equal(found.view(pairs, repeats), once[:, None].expand(-1, repeats))


def test_repeats_are_for_latent_attention_and_divide_its_pairs() -> None:
    with pytest.raises(ConsiliumError, match=r"rope\.repeats is for the shared key of latent attention"):
        GQA(heads=1, kv_heads=1, head_dim=8, rope=Rope(repeats=2))
    with pytest.raises(ConsiliumError, match=r"3 rotary pairs .* not divisible by rope\.repeats 2"):
        MLA(heads=1, q_rank=None, kv_rank=4, nope_dim=2, rope_dim=6, v_dim=2, rope=Rope(repeats=2))


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    """With 64 dimensions, theta 10,000 and 4,096 positions, 32 turns are at pair 10.5 and 1 turn at 22.5."""
    plain = frequencies(Rope(), 64)
    yarn = frequencies(Rope(scaling=V3), 64)
    assert torch.equal(yarn[:11], plain[:11])
    torch.testing.assert_close(yarn[23:], plain[23:] / 40, rtol=1e-6, atol=0)
    between = yarn[11:23] / plain[11:23]
    assert (between < 1).all()
    assert (between > 1 / 40).all()
    assert (between.diff() < 0).all()


@pytest.mark.parametrize("dim", [2, 4, 8, 32, 128])
@pytest.mark.parametrize("yarn", [V2, LONG, Yarn(factor=2, original_length=4)], ids=["v2", "long", "short"])
def test_yarn_equals_its_equations_pair_by_pair(yarn: Yarn, dim: int) -> None:
    rope = Rope(theta=3000.0, scaling=yarn)

    def pair_of(turns: float) -> float:
        return dim / 2 * math.log(yarn.original_length / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = max(math.floor(pair_of(yarn.beta_fast)), 0), min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    expected: list[float] = []
    for i in range(dim // 2):
        share = min(max((i - low) / (high - low if high > low else 1e-3), 0.0), 1.0)
        plain = rope.theta ** (-2 * i / dim)
        expected.append(plain * (1 - share) + plain / yarn.factor * share)
    assert relative_error(frequencies(rope, dim), torch.tensor(expected, dtype=torch.float64)) < 1e-7


def test_both_corrections_have_the_values_of_the_released_models() -> None:
    for yarn, squared, scale in ((V2, 1.589626, 0.114721), (V3, 1.873854, 0.135234)):
        assert rotation_scale(Rope(scaling=yarn)) == 1.0
        assert yarn.softmax_scale == pytest.approx(squared, abs=5e-7)
        assert latent_attention(yarn).softmax_scale == pytest.approx(scale, abs=5e-7)


def test_the_rotation_scale_multiplies_both_tables() -> None:
    position = torch.tensor([[0, 3]])
    cos, sin = rotary_tables(Rope(scaling=LONG), 8, position)
    expected = 0.1 * math.log(4) + 1
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, expected**2))


@given(rope=ropes, pairs=st.integers(1, 9), tokens=st.integers(1, 4), start=st.sampled_from([0, 99, 163_000]))
def test_rotation_equals_complex_multiplication(rope: Rope, pairs: int, tokens: int, start: int) -> None:
    x = random_heads(2, tokens, 3, 2 * pairs)
    position = torch.stack((torch.arange(tokens), start + 7 * torch.arange(tokens)))
    turned = rotate(x, *rotary_tables(rope, 2 * pairs, position), interleaved=rope.interleaved)
    assert relative_error(turned, rotate_naive(x, rope, position)) < 1e-6


@given(rope=ropes, pairs=st.integers(1, 5))
def test_the_gradient_of_a_rotation_equals_the_naive_one(rope: Rope, pairs: int) -> None:
    x = random_heads(1, 3, 2, 2 * pairs)
    position = torch.tensor([[0, 5, 5000]])
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    fast, slow = x.clone().requires_grad_(), x.double().requires_grad_()
    turned = rotate(fast, *rotary_tables(rope, 2 * pairs, position), interleaved=rope.interleaved)
    (turned * towards).sum().backward()
    (rotate_naive(slow, rope, position) * towards).sum().backward()
    assert fast.grad is not None
    assert slow.grad is not None
    assert relative_error(fast.grad, slow.grad) < 1e-6


@given(pairs=st.integers(1, 8))
def test_interleaved_rotation_is_half_split_rotation_of_permuted_dimensions(pairs: int) -> None:
    x = random_heads(2, 3, 2, 2 * pairs)
    tables = rotary_tables(Rope(), 2 * pairs, torch.tensor([[0, 1, 2], [7, 90, 5000]]))
    split = torch.cat((torch.arange(0, 2 * pairs, 2), torch.arange(1, 2 * pairs, 2)))
    assert torch.equal(
        rotate(x, *tables, interleaved=True)[..., split], rotate(x[..., split], *tables, interleaved=False)
    )


@given(distance=st.integers(0, 500), start=st.integers(1, 4000), interleaved=st.booleans())
def test_scores_depend_on_the_distance_alone(*, distance: int, start: int, interleaved: bool) -> None:
    q, k = random_heads(1, 1, 1, 16), random_heads(1, 1, 1, 16).flip(-1)

    def score(query: int, key: int) -> torch.Tensor:
        turned = [
            rotate(x, *rotary_tables(Rope(), 16, torch.tensor([[at]])), interleaved=interleaved)
            for x, at in ((q, query), (k, key))
        ]
        return (turned[0] * turned[1]).sum()

    size = float(q.norm() * k.norm())
    assert abs(float(score(distance, 0) - score(start + distance, start))) < 1e-6 * size


@given(pairs=st.integers(1, 4), rest=st.integers(1, 6), interleaved=st.booleans())
def test_what_lies_behind_the_rotated_dimensions_stays(*, pairs: int, rest: int, interleaved: bool) -> None:
    """The rotated part turns as a head of its own: frequencies come from its width, not from the head's."""
    x = random_heads(2, 3, 2, 2 * pairs + rest)
    tables = rotary_tables(Rope(theta=50.0), 2 * pairs, torch.tensor([[0, 1, 2], [7, 90, 5000]]))
    turned = rotate(x, *tables, interleaved=interleaved)
    assert torch.equal(
        turned[..., : 2 * pairs], rotate(x[..., : 2 * pairs], *tables, interleaved=interleaved)
    )
    assert torch.equal(turned[..., 2 * pairs :], x[..., 2 * pairs :])
    part = turned.bfloat16()
    assert rotate(part, *tables, interleaved=interleaved).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("head_dim", "fraction", "rotated"), [(128, 0.5, 64), (100, 0.58, 58), (80, 0.4, 32)]
)
def test_a_fraction_of_a_head_is_a_whole_number_of_pairs(
    head_dim: int, fraction: float, rotated: int
) -> None:
    config = GQA(heads=1, kv_heads=1, head_dim=head_dim, rope=Rope(fraction=fraction))
    assert config.rotated_dim == rotated


@pytest.mark.parametrize("fraction", [0.25, 0.3, 1e-9])
def test_half_pairs_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="rotary pairs need an even number above zero"):
        GQA(heads=1, kv_heads=1, head_dim=12, rope=Rope(fraction=fraction))


def test_position_zero_and_dtype_are_kept() -> None:
    x = random_heads(1, 2, 2, 8).bfloat16()
    tables = rotary_tables(Rope(), 8, torch.zeros(1, 2, dtype=torch.int64))
    turned = rotate(x, *tables, interleaved=True)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, x)
