"""Transport: permutation and inverse, against a loop, in values and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.moe.transport import Local, LocalTicket
from consilium.moe.types import Routing
from consilium.ops.rows import Rows
from moe.cases import decision as decided
from support import relative_error


def routing(count: int, experts: int, k: int, keep: float, seed: int, *, on_input: bool = False) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(count, experts, generator=generator)
    experts_TK = scores_TE.argsort(dim=1)[:, :k]
    keep_TK = torch.rand(count, k, generator=generator) < keep
    weights_TK = torch.randn(count, k, generator=generator).masked_fill(~keep_TK, 0).requires_grad_()
    return decided(scores_TE, experts_TK, keep_TK, weights_TK, weight_on_input=on_input)


def send(decision: Routing, x_TD: Tensor) -> tuple[Rows, LocalTicket]:
    return Local().dispatch(x_TD, decision).finish()


def combine(y_RD: Tensor, rows: Rows, ticket: LocalTicket) -> Tensor:
    return Local().combine(rows.outputs(y_RD), ticket).finish()


SHAPES = st.tuples(
    st.sampled_from([0, 1, 2, 7, 33]),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 10**6),
)


@given(SHAPES, st.data())
def test_rows_are_sorted_by_expert_in_token_order_and_counted(
    shape: tuple[int, int, float, int], data: st.DataObject
) -> None:
    count, experts, keep, seed = shape
    k = data.draw(st.integers(1, experts))
    decision = routing(count, experts, k, keep, seed)
    x_TD = torch.randn(count, 3)
    rows, ticket = send(decision, x_TD)
    expected = [
        (t, r)
        for e in range(experts)
        for t in range(count)
        for r in range(k)
        if decision.keep_TK[t, r] and decision.experts_TK[t, r] == e
    ]
    assert list(rows.counts_E) == decision.load_E().tolist()
    by_token = rows.by_token
    assert ticket == x_TD.dtype
    assert sum(rows.counts_E) == rows.inputs().shape[0] == len(expected)
    assert by_token.token_R.tolist() == [t for t, _ in expected]
    assert torch.equal(rows.inputs(), x_TD[by_token.token_R])
    assert rows.weight_R.tolist() == [decision.weights_TK[t, r].item() for t, r in expected]
    assert len(by_token.first_T) == count
    # The inverse: rows listed by token and then by choice.
    listed = [expected[row] for row in by_token.row_R.tolist()]
    assert listed == sorted(expected)


@given(shape=SHAPES, on_input=st.booleans())
def test_there_and_back_equals_a_loop_in_values_and_gradients(
    *, shape: tuple[int, int, float, int], on_input: bool
) -> None:
    count, experts, keep, seed = shape
    decision = routing(count, experts, max(1, experts // 2), keep, seed, on_input=on_input)
    x_TD = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    scale_E = torch.linspace(0.5, 2, experts)
    rows, ticket = send(decision, x_TD)
    expert_R = torch.repeat_interleave(torch.arange(experts), torch.tensor(rows.counts_E))
    y_TD = combine(torch.tanh(rows.inputs() * scale_E[expert_R, None]), rows, ticket)

    x, w = x_TD.detach().double().requires_grad_(), decision.weights_TK.detach().double().requires_grad_()
    out = []
    for t in range(count):
        total = 0 * x[t]
        for r in range(w.shape[1]):
            if decision.keep_TK[t, r]:
                scale = scale_E[decision.experts_TK[t, r]].double()
                inside, outside = (w[t, r], 1) if on_input else (1, w[t, r])
                total = total + outside * torch.tanh(inside * x[t] * scale)
        out.append(total)
    y = torch.stack(out) if out else x
    assert relative_error(y_TD, y) < 1e-6
    y_TD.square().sum().backward()
    y.square().sum().backward()
    assert relative_error(x_TD.grad, x.grad) < 1e-5
    assert (
        relative_error(decision.weights_TK.grad, w.grad if w.grad is not None else torch.zeros_like(w)) < 1e-5
    )


def test_sending_each_token_once_with_weight_one_is_the_identity() -> None:
    decision = routing(63, 8, 1, 1.0, seed=0)
    with torch.no_grad():
        decision.weights_TK.fill_(1.0)
    x_TD = torch.randn(63, 16)
    rows, ticket = send(decision, x_TD)
    assert torch.equal(combine(rows.inputs(), rows, ticket), x_TD)


def test_bfloat16_rows_are_added_in_float32() -> None:
    """256 + 1 + ... + 1 stays 256 when added in bfloat16."""
    k = 65
    keep_TK = torch.ones(1, k, dtype=torch.bool)
    scores_TE = torch.zeros(1, k)
    decision = decided(scores_TE, torch.arange(k)[None], keep_TK, torch.ones(1, k))
    rows, ticket = send(decision, torch.zeros(1, 1, dtype=torch.bfloat16))
    y_RD = torch.ones_like(rows.inputs())
    y_RD[0] = 256
    y_TD = combine(y_RD, rows, ticket)
    assert y_TD.dtype == torch.bfloat16
    assert y_TD.item() == 320


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_keep_the_dtypes_of_their_inputs(dtype: torch.dtype) -> None:
    decision = routing(9, 4, 2, 0.8, seed=1)
    x_TD = torch.randn(9, 4, dtype=dtype, requires_grad=True)
    rows, ticket = send(decision, x_TD)
    y_TD = combine(rows.inputs() * 2, rows, ticket)
    assert y_TD.dtype == dtype
    y_TD.sum().backward()
    assert x_TD.grad is not None
    assert decision.weights_TK.grad is not None
    assert x_TD.grad.dtype == dtype
    assert decision.weights_TK.grad.dtype == torch.float32


def test_gradients_of_both_directions_match_finite_differences() -> None:
    decision = routing(6, 4, 3, 0.7, seed=2)

    def there_and_back(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        rows, ticket = send(replace(decision, weights_TK=weights_TK), x_TD)
        return combine(rows.inputs() ** 3, rows, ticket)

    x_TD = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    weights_TK = decision.weights_TK.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(there_and_back, (x_TD, weights_TK))


def test_a_token_adds_up_the_same_bits_in_any_company() -> None:
    decision = routing(40, 8, 5, 0.9, seed=3)
    y = torch.randn(40, 5, 7, generator=torch.Generator().manual_seed(3))

    def combined(pick_T: Tensor) -> Tensor:
        names = ("scores_TE", "experts_TK", "keep_TK", "weights_TK")
        part = [getattr(decision, name)[pick_T] for name in names]
        rows, ticket = send(decided(*part), torch.zeros(len(pick_T), 7))
        expert_R = torch.zeros(len(rows.by_token.token_R), dtype=torch.int64)
        expert_R[rows.by_token.row_R] = part[2].nonzero()[:, 1]
        return combine(y[pick_T][rows.by_token.token_R, expert_R], rows, ticket)

    whole_TD = combined(torch.arange(40))
    for t in range(40):
        assert torch.equal(combined(torch.tensor([t]))[0], whole_TD[t])
