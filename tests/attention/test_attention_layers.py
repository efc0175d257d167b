"""Both layers against their equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention.cases import CONFIGS, built, counted, random_x, uncached
from attention.naive import Weights, causal_sight, float64_weights, naive_gqa, naive_mla
from consilium.attention.context import build_context
from consilium.attention.types import LatentPath
from consilium.config.attention import GQA, MLA, Rope
from consilium.ops import documents, sight
from support import relative_error

named_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

gqa_configs = st.builds(
    lambda group, kv_heads, pairs, **options: GQA(
        heads=group * kv_heads, kv_heads=kv_heads, head_dim=2 * pairs, **options
    ),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    pairs=st.integers(1, 4),
    qkv_bias=st.booleans(),
    qk_norm=st.sampled_from(["none", "head", "full"]),
    softcap=st.sampled_from([None, 3.0]),
    window=st.sampled_from([None, 1, 2, 4, 9]),
    scale=st.sampled_from([None, 0.9]),
    rope=st.sampled_from([Rope(), Rope(interleaved=True, theta=100.0)]),
)
partly_rotated = st.builds(
    lambda parts, fraction, interleaved: GQA(
        heads=4,
        kv_heads=2,
        head_dim=8 * parts,
        rope=Rope(theta=100.0, fraction=fraction, interleaved=interleaved),
    ),
    parts=st.integers(1, 2),
    fraction=st.sampled_from([0.25, 0.5, 0.75]),
    interleaved=st.booleans(),
)

# A norm over one value cancels its input, and its gradient is rounding: ranks start at 3.
mla_configs = st.builds(
    lambda pairs, **options: MLA(rope_dim=2 * pairs, **options),
    heads=st.integers(1, 3),
    q_rank=st.sampled_from([None, 3, 6]),
    kv_rank=st.integers(3, 9),
    nope_dim=st.integers(0, 6),
    pairs=st.integers(1, 3),
    v_dim=st.integers(1, 8),
    kv_norm=st.sampled_from(["rms", "none"]),
    qkv_bias=st.booleans(),
)


def naive(config: GQA | MLA, weights: Weights, x: Tensor, position: Tensor, seen: Tensor) -> Tensor:
    match config:
        case GQA():
            return naive_gqa(config, weights, x, position, seen)
        case MLA():
            return naive_mla(config, weights, x, position, seen)


def compared(
    config: GQA | MLA, x: Tensor, sequence: Tensor | None, valid: Tensor | None, path: LatentPath = "auto"
) -> None:
    """Values and the gradients of the input and of every weight equal the equations in float64."""
    batch, tokens, _ = x.shape
    module, position = built(config), counted(batch, tokens)
    weights = float64_weights(module)
    seen = causal_sight(batch, tokens)
    if sequence is not None:
        seen &= sequence[:, :, None] == sequence[:, None, :]
    if valid is not None:
        seen &= valid[:, None, :]
    if isinstance(config, GQA) and config.window is not None:
        seen &= position[:, None, :] > position[:, :, None] - config.window
    context = build_context(config, position, sequence_BS=sequence, valid_BS=valid)
    fast, slow = x.clone().requires_grad_(), x.double().requires_grad_()
    y = module(fast, replace(context, latent_path=path)).y_BSD
    expected = naive(config, weights, slow, position, seen)
    if valid is not None:  # what padding itself sees is nobody's concern
        y, expected = y * valid[..., None], expected * valid[..., None]
    assert relative_error(y, expected) < 1e-5
    towards = random_x(batch, tokens, seed=5)
    (y * towards).sum().backward()
    (expected * towards).sum().backward()
    same_gradients({"x": fast, **dict(module.named_parameters())}, {"x": slow, **weights})


def same_gradients(fast: Weights, slow: Weights) -> None:
    """Where tokens see only themselves, queries and keys have a gradient of exactly zero but for rounding."""
    assert fast.keys() == slow.keys()
    largest = max(float(w.grad.norm()) for w in slow.values() if w.grad is not None)
    for name, weight in slow.items():
        found, wanted = fast[name].grad, weight.grad
        assert found is not None
        assert wanted is not None
        if float(wanted.norm()) < 1e-12 * largest:
            assert float(found.norm()) < 1e-5 * largest, name
        else:
            assert relative_error(found, wanted) < 2e-5, name


@named_configs
def test_values_and_gradients_equal_the_equations(config: GQA | MLA) -> None:
    compared(config, random_x(2, 9), None, None)


@named_configs
def test_documents_and_padding_equal_the_equations(config: GQA | MLA) -> None:
    sequence = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1]])
    valid = torch.tensor([[True] * 8, [True] * 5 + [False] + [True, False]])
    compared(config, random_x(2, 8), sequence, valid)


@given(config=gqa_configs | partly_rotated, batch=st.integers(1, 3), tokens=st.integers(1, 6))
def test_grouped_query_attention_of_any_shape(config: GQA, batch: int, tokens: int) -> None:
    compared(config, random_x(batch, tokens), None, None)


@given(
    config=mla_configs,
    batch=st.integers(1, 3),
    tokens=st.integers(1, 6),
    path=st.sampled_from(["expanded", "absorbed"]),
)
def test_latent_attention_of_any_shape_on_both_paths(
    config: MLA, batch: int, tokens: int, path: LatentPath
) -> None:
    compared(config, random_x(batch, tokens), None, None, path)


@st.composite
def cut_rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Documents [B, S] that fill rows, and which tokens are no padding: that stands at both ends of a row."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    begins = torch.tensor(
        draw(
            st.lists(
                st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=batch, max_size=batch
            )
        )
    )
    ends = [draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in range(batch)]
    place = torch.arange(tokens)
    valid = torch.stack([(place >= left) & (place < tokens - right) for left, right in ends])
    return begins.long().cumsum(1), valid


@given(
    rows=cut_rows(),
    window=st.integers(1, 11),
    softcap=st.sampled_from([None, 2.0]),
    short=st.booleans(),
    stripe=st.integers(1, 10),
)
def test_a_window_equals_the_equations_in_any_documents(
    *, rows: tuple[Tensor, Tensor], window: int, softcap: float | None, short: bool, stripe: int
) -> None:
    """Also where rows count as long, and where queries come in several stripes."""
    sequence, valid = rows
    config = GQA(heads=4, kv_heads=2, head_dim=4, window=window, softcap=softcap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SHORT", sequence.shape[1] if short else 0)
        patch.setattr(sight, "STRIPE", stripe)
        compared(config, random_x(*sequence.shape), sequence, valid)
        compared(config, random_x(*sequence.shape), None, None)


@pytest.mark.parametrize("window", [9, 10, 1000])
def test_a_window_over_the_whole_text_changes_no_bit(window: int) -> None:
    config = GQA(heads=4, kv_heads=2, head_dim=6)
    plain, windowed = built(config), built(replace(config, window=window))
    assert torch.equal(uncached(windowed, random_x(2, 9)), uncached(plain, random_x(2, 9)))
    sequence = torch.arange(9).expand(2, 9) // 4
    context = build_context(config, counted(2, 9), sequence_BS=sequence)
    x = random_x(2, 9)
    assert torch.equal(windowed(x, context).y_BSD, plain(x, context).y_BSD)


def test_a_query_sees_its_window_and_nothing_before_it() -> None:
    """Of one layer: what a token holds reaches exactly as many tokens as the window has."""
    module = built(GQA(heads=2, kv_heads=1, head_dim=4, window=3))
    x, other = random_x(1, 9), random_x(1, 9)
    other[:, 2] += 1.0
    changed = (uncached(module, x) != uncached(module, other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 3, 4]


@named_configs
def test_packed_documents_are_separate_sequences(config: GQA | MLA) -> None:
    """Positions restart with each document, so a packed one computes what it would compute alone."""
    module, lengths = built(config), (3, 1, 5)
    x = random_x(1, sum(lengths))
    sequence = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]])
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = module(x, build_context(config, position, sequence_BS=sequence)).y_BSD
    alone = torch.cat([uncached(module, document) for document in x.split(lengths, 1)], 1)
    assert relative_error(packed, alone) < 1e-5


@named_configs
def test_what_padding_holds_changes_nothing(config: GQA | MLA) -> None:
    module, position = built(config), counted(2, 7)
    valid = torch.tensor([[True] * 7, [False] * 2 + [True] * 3 + [False] * 2])
    x = random_x(2, 7)
    other = torch.where(valid[..., None], x, 1e3 * random_x(2, 7, seed=3))
    context = build_context(config, position, valid_BS=valid)
    y, changed = module(x, context).y_BSD, module(other, context).y_BSD
    assert torch.equal(y[valid], changed[valid])
    assert bool(y.isfinite().all())


@named_configs
def test_padding_passes_finite_gradients_and_receives_none(config: GQA | MLA) -> None:
    module = built(config)
    valid = torch.tensor([[False, False, True, True, False]])
    x = random_x(1, 5).requires_grad_()
    y = module(x, build_context(config, counted(1, 5), valid_BS=valid)).y_BSD
    y[valid].square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad[~valid].eq(0).all())
    for weight in (x, *module.parameters()):
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all())
        assert bool(weight.grad.any())


@named_configs
def test_bfloat16_inputs_compute_in_bfloat16_on_float32_weights(config: GQA | MLA) -> None:
    module, x = built(config), random_x(2, 6)
    y = uncached(module, x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for weight in module.parameters())
    assert relative_error(y, uncached(module, x)) < 3e-2


def test_permuted_weights_turn_interleaved_into_half_split_rotation() -> None:
    """Scores are sums over pairs, so only the rows of the rotated dimensions have to move."""
    interleaved = MLA(heads=3, q_rank=6, kv_rank=8, nope_dim=4, rope_dim=6, v_dim=5)
    module = built(interleaved)
    split = torch.cat((torch.arange(0, 6, 2), torch.arange(1, 6, 2)))
    other = built(replace(interleaved, rope=Rope(interleaved=False)))
    state = {name: weight.clone() for name, weight in module.state_dict().items()}
    state["q_up.weight"] = (
        state["q_up.weight"].unflatten(0, (3, 10))[:, torch.cat((torch.arange(4), 4 + split))].flatten(0, 1)
    )
    state["kv_down.weight"] = state["kv_down.weight"][torch.cat((torch.arange(8), 8 + split))]
    assert relative_error(uncached(other, random_x(2, 9)), uncached(module, random_x(2, 9))) > 1e-2
    other.load_state_dict(state)
    assert relative_error(uncached(other, random_x(2, 9)), uncached(module, random_x(2, 9))) < 1e-5


STATES = {
    "everything": """q.weight 24 20, k.weight 12 20, v.weight 12 20, o.weight 20 24, q.bias 24, k.bias 12,
        v.bias 12, q_norm.weight 24, k_norm.weight 12""",
    "head-norm": """q.weight 24 20, k.weight 12 20, v.weight 12 20, o.weight 20 24, q_norm.weight 6,
        k_norm.weight 6""",
    "latent": "q.weight 30 20, kv_down.weight 14 20, kv_norm.weight 10, kv_up.weight 33 10, o.weight 20 15",
    "latent-compressed": """q_down.weight 7 20, q_norm.weight 7, q_up.weight 30 7, kv_down.weight 14 20,
        kv_norm.weight 10, kv_up.weight 33 10, o.weight 20 15""",
    "latent-without-norm": """q.weight 42 20, q.bias 42, kv_down.weight 18 20, kv_down.bias 18,
        kv_up.weight 33 10, o.weight 20 15""",
}


@pytest.mark.parametrize("name", STATES)
def test_state_names_and_shapes(name: str) -> None:
    state = built(CONFIGS[name]).state_dict()
    found = {" ".join(map(str, (key, *weight.shape))) for key, weight in state.items()}
    assert found == {" ".join(entry.split()) for entry in STATES[name].split(",")}
