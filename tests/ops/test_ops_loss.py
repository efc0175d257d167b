from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from consilium.ops.loss import CHUNK, IGNORE, linear_cross_entropy, token_nll
from consilium.ops.weights import Dense
from support import relative_error


def inputs(
    tokens: int, vocabulary: int, size: int = 8, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(hidden, Dense(weight), targets, chunk=chunk)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    total, count = hidden.sum() * 0 + weight.sum() * 0, 0
    for h, target in zip(hidden, targets.tolist(), strict=True):
        if target >= 0:
            logits = weight @ h
            total = total + logits.logsumexp(0) - logits[target]
            count += 1
    return total, count


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


@given(
    tokens=st.sampled_from([1, 2, 7, 16]),
    vocabulary=st.sampled_from([1, 2, 63]),
    chunk=st.sampled_from([1, 3, 7, 100]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_equals_the_loop_over_tokens_in_values_and_gradients(
    tokens: int, vocabulary: int, chunk: int, ignored: float
) -> None:
    hidden, weight, targets = inputs(tokens, vocabulary, ignored=ignored)
    wide = tuple(t.detach().double().requires_grad_() for t in (hidden, weight))
    loss, count = cross_entropy(hidden, weight, targets, chunk=chunk)
    expected, expected_count = naive(*wide, targets)
    assert int(count) == expected_count
    assert loss.shape == ()
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
    # A vocabulary of one word has nothing to learn: exact zeros on one side, rounding on the other.
    if vocabulary > 1:
        pairs = zip(gradients(loss, hidden, weight), gradients(expected, *wide), strict=True)
        assert all(relative_error(got, wanted) < 1e-5 for got, wanted in pairs)


def test_float64_gradients_equal_finite_differences() -> None:
    hidden, weight, targets = inputs(5, 4)
    wide = tuple(t.detach().double().requires_grad_() for t in (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets, chunk=2)[0], wide)


def test_gradients_scale_with_what_follows_and_can_be_asked_for_twice() -> None:
    hidden, weight, targets = inputs(6, 9)
    loss, _ = cross_entropy(hidden, weight, targets, chunk=4)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    half = torch.autograd.grad(loss / 2, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, 2 * b) for a, b in zip(once, half, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(loss, hidden, weight), strict=True))


def test_ignored_tokens_get_no_gradient_and_their_content_changes_nothing() -> None:
    hidden, weight, targets = inputs(6, 9, ignored=0)
    targets[2] = IGNORE
    loss, _ = cross_entropy(hidden, weight, targets)
    grad_hidden, grad_weight = gradients(loss, hidden, weight)
    moved = hidden.detach().clone().index_fill_(0, torch.tensor([2]), 7.0).requires_grad_()
    other, _ = cross_entropy(moved, weight, targets)
    assert torch.equal(grad_hidden[2], torch.zeros(8))
    assert torch.equal(loss, other)
    assert torch.equal(grad_weight, gradients(other, weight)[0])


def test_no_tokens_at_all() -> None:
    hidden, weight, targets = inputs(0, 5)
    loss, count = cross_entropy(hidden, weight, targets)
    grad_hidden, grad_weight = gradients(loss, hidden, weight)
    assert (loss.item(), int(count), grad_hidden.shape) == (0.0, 0, (0, 8))
    assert torch.equal(grad_weight, torch.zeros(5, 8))
    with torch.no_grad():
        assert float(cross_entropy(hidden, weight, targets)[0]) == 0.0


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits_stay_finite(sign: int) -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss, _ = cross_entropy(hidden, sign * weight, torch.tensor([0, 1]))
    assert loss.item() == 2e4
    assert all(grad.isfinite().all() for grad in gradients(loss, hidden, weight))


def test_bfloat16_hidden_on_float32_masters() -> None:
    hidden, weight, targets = inputs(32, 40)
    low = hidden.detach().to(torch.bfloat16).requires_grad_()
    loss, _ = cross_entropy(low, weight, targets, chunk=5)
    expected, _ = cross_entropy(hidden, weight, targets)
    got, wanted = gradients(loss, low, weight), gradients(expected, hidden, weight)
    assert (loss.dtype, got[0].dtype, got[1].dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert relative_error(loss, expected) < 0.01
    assert all(relative_error(a, b) < 0.03 for a, b in zip(got, wanted, strict=True))


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, targets = inputs(9, 30)
    with torch.no_grad():
        quiet, count = cross_entropy(hidden, weight, targets, chunk=4)
    loss, same = cross_entropy(hidden, weight, targets, chunk=4)
    assert not quiet.requires_grad
    assert int(count) == int(same)
    assert relative_error(quiet, loss) < 1e-6


def test_recomputation_gives_the_same_gradients() -> None:
    hidden, weight, targets = inputs(9, 30)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return cross_entropy(h, w, targets, chunk=4)[0]

    plain = gradients(loss(hidden, weight), hidden, weight)
    again = gradients(checkpoint(loss, hidden, weight, use_reentrant=False), hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_token_nll_equals_torch_and_is_zero_where_ignored() -> None:
    hidden, weight, targets = inputs(12, 20)
    logits = hidden @ weight.T
    assert (
        relative_error(
            token_nll(logits, targets),
            F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none"),
        )
        < 1e-6
    )
    assert token_nll(logits.to(torch.bfloat16), targets).dtype == torch.float32
    assert torch.equal(
        token_nll(logits, targets)[targets == IGNORE], torch.zeros(int((targets == IGNORE).sum()))
    )


class Products(TorchDispatchMode):
    """Counts matrix products by the name of their operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("asked", "expected"), [("hidden", {"mm": 4}), ("weight", {"mm": 2, "addmm_": 2})])
def test_a_gradient_that_nobody_asked_for_is_not_computed(asked: str, expected: dict[str, int]) -> None:
    """Two chunks: the logits of both, and the products of the one gradient, which is the same as ever."""
    hidden, weight, targets = inputs(6, 9)
    loss, _ = cross_entropy(hidden, weight, targets, chunk=4)
    both = dict(zip(("hidden", "weight"), gradients(loss, hidden, weight), strict=True))
    leaves = {"hidden": hidden.detach().clone(), "weight": weight.detach().clone()}
    leaves[asked].requires_grad_()
    with Products() as products:
        loss, _ = cross_entropy(leaves["hidden"], leaves["weight"], targets, chunk=4)
        loss.backward()
    assert {name: products.found[name] for name in ("mm", "addmm_") if products.found[name]} == expected
    assert torch.equal(leaves[asked].grad, both[asked])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != asked)
