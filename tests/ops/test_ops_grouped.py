from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from consilium.config.feed_forward import GATED, Activation
from consilium.ops.feed_forward import activate
from consilium.ops.grouped import (
    Backend,
    Counts,
    Network,
    _possible,
    choose,
    observed_feed_forward,
    stacked_feed_forward,
)
from consilium.ops.ways import block
from consilium.ops.weights import Dense, DenseStack, Matrix
from support import relative_error

BACKENDS: tuple[Backend, ...] = get_args(Backend)
FAST: tuple[Backend, ...] = ("grouped", "padded", "loop")
COUNTS = [(3, 0, 7, 1), (0, 0, 0, 5), (4, 4, 4, 4), (1, 0, 0, 0), (0, 0, 0, 0), (63, 2, 0, 1)]
LOW = torch.bfloat16


def networks(
    x: Tensor,
    counts: Counts,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    backend: Backend | None = None,
) -> Tensor:
    return stacked_feed_forward(x, counts, DenseStack(up), DenseStack(down), activation, backend)


def problem(
    counts: tuple[int, ...], activation: Activation = "swiglu", size: int = 8, width: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, up and down with gradients, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    rows, up_rows = sum(counts), width * (2 if activation in GATED else 1)
    shapes = (rows, size), (len(counts), up_rows, size), (len(counts), size, width), (rows, size)
    x, up, down, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.requires_grad_(), up.requires_grad_(), down.requires_grad_(), grad


def naive(x: Tensor, counts: tuple[int, ...], up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """One row at a time."""
    owner = [e for e, count in enumerate(counts) for _ in range(count)]
    rows = [down[e] @ activate(up[e] @ row, activation) for e, row in zip(owner, x, strict=True)]
    return torch.stack(rows) if rows else x * 1


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().double().requires_grad_() for t in tensors)


def gradients(y: Tensor, grad: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, of, grad.to(y.dtype), materialize_grads=True)


def assert_equals_naive(
    backend: Backend | None, counts: tuple[int, ...], activation: Activation, size: int, width: int
) -> None:
    x, up, down, grad = problem(counts, activation, size, width)
    y = networks(x, counts, up, down, activation, backend)
    exact = wide(x, up, down)
    expected = naive(exact[0], counts, exact[1], exact[2], activation)
    assert relative_error(y, expected) < 1e-5
    pairs = zip(gradients(y, grad, x, up, down), gradients(expected, grad, *exact), strict=True)
    assert all(relative_error(got, wanted) < 1e-5 for got, wanted in pairs)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple),
    activation=st.sampled_from(get_args(Activation)),
    backend=st.sampled_from((*BACKENDS, None)),
    size=st.sampled_from([1, 3, 8]),
    width=st.sampled_from([1, 4, 12]),
)
def test_every_backend_equals_one_row_at_a_time_in_values_and_gradients(
    counts: tuple[int, ...], activation: Activation, backend: Backend | None, size: int, width: int
) -> None:
    assert_equals_naive(backend, counts, activation, size, width)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equality_with_aligned_shapes(backend: Backend, counts: tuple[int, ...]) -> None:
    assert_equals_naive(backend, counts, "swiglu", 8, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_idle_experts_get_gradients_of_exactly_zero(
    backend: Backend, counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, up, down, grad = problem(counts)
    networks(x.to(dtype), counts, up, down, "swiglu", backend).backward(grad.to(dtype))
    idle = [e for e, count in enumerate(counts) if not count]
    for weight in (up, down):
        assert weight.grad is not None
        assert torch.equal(weight.grad[idle], torch.zeros_like(weight[idle]))
        assert weight.grad.isfinite().all()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [(3, 0, 7, 1), (40, 30, 20, 38)], ids=str)
def test_bfloat16_rows_on_float32_masters(backend: Backend, counts: tuple[int, ...]) -> None:
    x, up, down, grad = problem(counts, size=32, width=32)
    low = x.detach().to(LOW).requires_grad_()
    y = networks(low, counts, up, down, "swiglu", backend)
    got = gradients(y, grad, low, up, down)
    exact = networks(x, counts, up, down, "swiglu", "reference")
    wanted = gradients(exact, grad, x, up, down)
    assert (y.dtype, *(g.dtype for g in got)) == (LOW, LOW, torch.float32, torch.float32)
    assert relative_error(y, exact) < 0.02
    assert all(relative_error(a, b) < 0.03 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_throughout(backend: Backend) -> None:
    counts = (5, 0, 9)
    x, up, down, grad = problem(counts)
    low = tuple(t.detach().to(LOW).requires_grad_() for t in (x, up, down))
    y = networks(low[0], counts, low[1], low[2], "swiglu", backend)
    exact = networks(x, counts, up, down, "swiglu", "reference")
    pairs = list(zip(gradients(y, grad, *low), gradients(exact, grad, x, up, down), strict=True))
    assert all(got.dtype == LOW for got, _ in pairs)
    assert relative_error(y, exact) < 0.02
    assert all(relative_error(got, wanted) < 0.03 for got, wanted in pairs)


@pytest.mark.parametrize("backend", FAST)
def test_gradients_equal_finite_differences_where_float64_is_possible(backend: Backend) -> None:
    counts = (2, 0, 1)
    x, up, down, _ = problem(counts, size=3, width=2)
    assert torch.autograd.gradcheck(
        lambda a, b, c: networks(a, counts, b, c, "geglu", backend), wide(x, up, down)
    )


@pytest.mark.parametrize("backend", FAST)
def test_an_expanded_gradient_is_as_good_as_its_copy(backend: Backend) -> None:
    counts = (3, 0, 7, 1)
    x, up, down, _ = problem(counts)
    y = networks(x, counts, up, down, "swiglu", backend)
    expanded = gradients(y.sum(), torch.ones(()), x, up, down)
    y = networks(x, counts, up, down, "swiglu", backend)
    assert all(
        torch.equal(a, b)
        for a, b in zip(expanded, gradients(y, torch.ones_like(y), x, up, down), strict=True)
    )


@pytest.mark.parametrize("backend", FAST)
def test_rows_that_are_not_contiguous(backend: Backend) -> None:
    counts = (3, 0, 7, 1)
    x, up, down, grad = problem(counts)
    y = networks(x.t().contiguous().t(), counts, up, down, "swiglu", backend)
    expected = networks(x, counts, up, down, "swiglu", "reference")
    pairs = zip(gradients(y, grad, x, up, down), gradients(expected, grad, x, up, down), strict=True)
    assert relative_error(y, expected) < 1e-6
    assert all(relative_error(got, wanted) < 1e-5 for got, wanted in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_gives_the_same_gradients(backend: Backend) -> None:
    counts = (3, 0, 7, 1)
    x, up, down, grad = problem(counts)

    def run(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return networks(a, counts, b, c, "swiglu", backend)

    plain = gradients(run(x, up, down), grad, x, up, down)
    again = gradients(checkpoint(run, x, up, down, use_reentrant=False), grad, x, up, down)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_training_saves_rows_and_pre_activations_only_and_inference_nothing(backend: Backend) -> None:
    counts = (6, 6, 6, 6)
    x, up, down, _ = problem(counts)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = networks(x, counts, up, down, "swiglu", backend)
        assert sorted(saved) == sorted([x.numel(), 24 * 32, up.numel(), down.numel()])
        with torch.no_grad():
            quiet = networks(x, counts, up, down, "swiglu", backend)
    assert len(saved) == 4
    assert torch.equal(quiet, y)
    assert not quiet.requires_grad


def test_observed_pass_gives_hidden_activations_in_the_graph() -> None:
    counts = (3, 0, 7, 1)
    x, up, down, grad = problem(counts)
    hidden, y = observed_feed_forward(x, counts, DenseStack(up), DenseStack(down), "swiglu")
    owner = [e for e, count in enumerate(counts) for _ in range(count)]
    expected = torch.stack([activate(up[e] @ row, "swiglu") for e, row in zip(owner, x, strict=True)])
    assert relative_error(hidden, expected) < 1e-6
    (grad_hidden,) = gradients(y, grad, hidden)
    assert (
        relative_error(grad_hidden, torch.stack([g @ down[e] for e, g in zip(owner, grad, strict=True)]))
        < 1e-6
    )


@pytest.mark.parametrize(
    ("backend", "counts", "size", "dtype", "taken"),
    [
        ("grouped", (4, 4), 8, torch.float32, "grouped"),
        ("grouped", (4, 4), 6, torch.float32, "loop"),
        ("grouped", (4, 4), 4, LOW, "loop"),
        ("grouped", (4, 4), 8, torch.float64, "loop"),
        ("grouped", (0, 0), 8, torch.float32, "loop"),
        ("padded", (4, 4), 6, torch.float32, "padded"),
        ("padded", (1, 0, 0, 0, 0, 0, 0, 9), 8, torch.float32, "loop"),
        ("reference", (4, 4), 6, torch.float32, "reference"),
    ],
)
def test_a_backend_that_cannot_or_would_waste_gives_way_to_the_loop(
    backend: Backend, counts: tuple[int, ...], size: int, dtype: torch.dtype, taken: Backend
) -> None:
    x, up, down, _ = problem(counts, size=size)
    assert _possible(backend, x.to(dtype), counts, Network(up, down, "swiglu")) == taken


@pytest.mark.parametrize(("rows", "chosen"), [(1 << 10, "grouped"), (1 << 15, "loop")])
def test_choice_on_a_processor_follows_the_size_of_the_pre_activations(rows: int, chosen: Backend) -> None:
    network = Network(torch.empty(2, 512, 8), torch.empty(2, 8, 256), "swiglu")
    assert choose(torch.empty(rows, 8), (rows // 2, rows // 2), network) == chosen


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="bfloat16 is fast with AVX-512 only"
)
@pytest.mark.parametrize(("counts", "chosen"), [((4, 4), "padded"), ((2, 8), "loop")])
def test_choice_in_bfloat16_follows_the_padding(counts: tuple[int, ...], chosen: Backend) -> None:
    network = Network(torch.empty(2, 512, 8), torch.empty(2, 8, 256), "swiglu")
    assert choose(torch.empty(sum(counts), 8, dtype=LOW), counts, network) == chosen


def test_counts_that_do_not_fit_the_rows_are_refused() -> None:
    x, up, down, _ = problem((3, 4))
    with pytest.raises(AssertionError, match="rows disagree"):
        networks(x, (3, 3), up, down, "swiglu")
    with pytest.raises(AssertionError, match="weights disagree"):
        networks(x, (3, 4, 0), up, down, "swiglu")


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func.overloadpacket.__name__.endswith("mm")
        return func(*args, **(kwargs or {}))


ASKED = [(x, up, down) for x in (False, True) for up in (False, True) for down in (False, True)][1:]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_backward_computes_the_gradients_that_somebody_asked_for_and_no_other(
    backend: Backend, asked: tuple[bool, bool, bool]
) -> None:
    """A product for each, and one to pass the second matrix for all but its own."""
    counts = (5, 0, 9, 2)
    *leaves, grad = problem(counts)
    every = gradients(networks(*leaves[:1], counts, *leaves[1:], "swiglu", backend), grad, *leaves)
    for leaf, wanted in zip(leaves, asked, strict=True):
        leaf.requires_grad_(wanted)
    x, up, down = leaves
    y = networks(x, counts, up, down, "swiglu", backend)
    with Products() as products:
        y.backward(grad)
    assert products.count == (sum(asked) + (asked[0] or asked[1])) * (3 if backend == "loop" else 1)
    for leaf, wanted, gradient in zip(leaves, asked, every, strict=True):
        assert torch.equal(leaf.grad, gradient) if wanted else leaf.grad is None


class Doubled:
    """A format of weights that no kernel knows: twice what it holds, and frozen."""

    def __init__(self, half_EOI: Tensor) -> None:
        self.half_EOI = half_EOI
        self.shape = tuple(half_EOI.shape)
        self.needs_gradient = False
        self.held = None

    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(Dense(2 * half_OI) for half_OI in self.half_EOI)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_weights_that_multiply_themselves_need_no_kernel(backend: Backend | None) -> None:
    counts = (3, 0, 7, 1)
    x, up, down, grad = problem(counts)
    with torch.no_grad():
        halves = Doubled(up / 2), Doubled(down / 2)
    y = stacked_feed_forward(x, counts, *halves, "swiglu", backend)
    expected = networks(x, counts, up, down, "swiglu", "reference")
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))


@given(st.integers(0, 10**6))
def test_a_block_is_at_most_15_rows_or_an_eighth_larger_and_small_ones_are_as_they_are(count: int) -> None:
    size = block(count)
    assert count <= size < count + max(16, count / 8)
    assert size == count or count > 16
    assert block(size) == size


def test_blocks_are_of_few_sizes() -> None:
    """A product is compiled for each: six an expert network, and oneDNN keeps 1024 of them."""
    assert len({block(count) for count in range(17, 4097)}) <= 64


@pytest.mark.parametrize("counts", [(17, 0, 33, 100), (0, 200, 18)], ids=str)
def test_rows_in_blocks_give_the_values_and_gradients_of_rows_alone(counts: tuple[int, ...]) -> None:
    """What lies in the spare rows of a block reaches nothing; tests poison what is not written."""
    x, up, down, grad = problem(counts, size=32, width=32)
    low = x.detach().to(LOW).requires_grad_()
    y = networks(low, counts, up, down, "swiglu", "loop")
    got = gradients(y, grad, low, up, down)
    exact = networks(x, counts, up, down, "swiglu", "reference")
    wanted = gradients(exact, grad, x, up, down)
    assert relative_error(y, exact) < 0.02
    assert all(relative_error(a, b) < 0.03 for a, b in zip(got, wanted, strict=True))
    for weight in got[1:]:
        assert weight.isfinite().all()
