"""The products of training by the native kernels: those of float64, whoever is idle, however wide and narrow.

Legend: R rows sorted by expert, E experts, O outputs and I inputs of one matrix, D hidden size, F width.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from consilium.ops.grouped import Backend, Network, choose, stacked_feed_forward
from consilium.ops.native import training
from consilium.ops.native.compile import Built, Tier
from consilium.ops.native.library import TYPES, Kernels, Sorted
from consilium.ops.native.training import multiply_sorted
from consilium.ops.weights import DenseStack
from kernels import HERE, compiled, kernels_of
from support import relative_error

KINDS = TIMES_TRANSPOSED, TIMES, OUTER = range(3)
WIDTHS = (torch.float32, torch.bfloat16)


def path_of(tier: Tier) -> str:
    kernels_of(tier)
    found = compiled(tier)
    assert isinstance(found, Built)
    return str(found.path)


def sides(kind: int, counts_E: tuple[int, ...], outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, experts = sum(counts_E), len(counts_E)
    left = torch.randn(rows, inputs if kind == TIMES_TRANSPOSED else outputs, generator=generator)
    shape = (rows, inputs) if kind == OUTER else (experts, outputs, inputs)
    return left, torch.randn(shape, generator=generator)


def multiplied(
    found: Kernels, kind: int, counts_E: tuple[int, ...], pair: tuple[Tensor, Tensor], out: Tensor
) -> Tensor:
    rows, other = pair
    outputs, inputs = (rows.shape[1], other.shape[1]) if kind == OUTER else other.shape[1:]
    ends_E = torch.tensor(counts_E).cumsum(0)
    types = (TYPES[tensor.dtype] for tensor in (rows, other, out))
    places = (tensor.data_ptr() for tensor in (ends_E, rows, other, out))
    found.sorted(Sorted(kind, len(counts_E), outputs, inputs, *types, *places))
    return out


def right(kind: int, counts_E: tuple[int, ...], rows: Tensor, other: Tensor) -> Tensor:
    """In float64, expert by expert."""
    parts = rows.double().split(counts_E)
    wide = other.double()
    match kind:
        case 0:
            return torch.cat([part @ w.t() for part, w in zip(parts, wide, strict=True)])
        case 1:
            return torch.cat([part @ w for part, w in zip(parts, wide, strict=True)])
        case _:
            return torch.stack([part.t() @ x for part, x in zip(parts, wide.split(counts_E), strict=True)])


def poisoned(kind: int, counts_E: tuple[int, ...], outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    rows = sum(counts_E)
    shapes = (rows, outputs), (rows, inputs), (len(counts_E), outputs, inputs)
    return torch.full(shapes[kind], torch.nan, dtype=dtype)


def assert_right(
    tier: Tier, kind: int, counts_E: tuple[int, ...], size: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Rows of bfloat16 are multiplied as such where the processor sums pairs of them, else widened."""
    own, others, out = dtypes
    rows, other = sides(kind, counts_E, *size)
    rows, other = rows.to(own), other.to(own if kind == OUTER else others)
    made = multiplied(
        kernels_of(tier), kind, counts_E, (rows, other), poisoned(kind, counts_E, *size, dtype=out)
    )
    pairs = own == torch.bfloat16 and tier in ("avx512bf16", "amx")
    wanted = right(kind, counts_E, rows, other.bfloat16() if pairs else other)
    assert made.isfinite().all()
    assert relative_error(made, wanted) < (4e-3 if out == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("counts_E", "size"),
    [
        ((3, 0, 7, 1), (8, 16)),
        ((63, 2, 0, 1, 17), (33, 47)),
        ((0, 100, 0), (96, 130)),
        ((1000,), (49, 17)),
        ((1, 1), (1, 1)),
        ((5, 40), (1100, 1300)),
    ],
    ids=str,
)
def test_products_are_those_of_float64(
    tier: Tier, kind: int, counts_E: tuple[int, ...], size: tuple[int, int]
) -> None:
    for own in WIDTHS:
        for others in WIDTHS:
            for out in WIDTHS:
                assert_right(tier, kind, counts_E, size, (own, others, out))


@given(
    counts_E=st.lists(st.integers(0, 40), min_size=1, max_size=5).map(tuple),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    kind=st.sampled_from(KINDS),
    dtypes=st.tuples(*[st.sampled_from(WIDTHS)] * 3),
    tier=st.sampled_from(HERE),
)
def test_any_shape(
    counts_E: tuple[int, ...],
    size: tuple[int, int],
    kind: int,
    dtypes: tuple[torch.dtype, ...],
    tier: Tier,
) -> None:
    assert_right(tier, kind, counts_E, size, dtypes)


@pytest.mark.parametrize("tier", HERE)
def test_a_gradient_beyond_the_caches_is_written_whole(tier: Tier) -> None:
    """Of so many values it is streamed past them; its rows are aligned to vectors, or not."""
    for size in ((4096, 1040), (3000, 1403)):
        assert_right(tier, OUTER, (3, 0, 2), size, (torch.float32,) * 3)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_hang_on_no_threads_and_no_neighbours(tier: Tier, kind: int) -> None:
    counts_E, size, found = (40, 0, 33), (130, 70), kernels_of(tier)
    pair = sides(kind, counts_E, *size)
    out = [poisoned(kind, counts_E, *size, dtype=torch.float32) for _ in range(2)]
    before = torch.get_num_threads()
    try:
        for threads, own in zip((1, 3), out, strict=True):
            torch.set_num_threads(threads)
            multiplied(found, kind, counts_E, pair, own)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*out)
    rows, other = pair[0][40:], pair[1][40:] if kind == OUTER else pair[1][2:]
    alone = multiplied(found, kind, (33,), (rows, other), poisoned(kind, (33,), *size, dtype=torch.float32))
    assert torch.equal(alone, out[0][2:] if kind == OUTER else out[0][40:])


def test_many_at_once_finish() -> None:
    found, counts_E, size = kernels_of(HERE[-1]), (40, 0, 33), (130, 70)
    pair = sides(TIMES, counts_E, *size)

    def product(_: int) -> Tensor:
        return multiplied(found, TIMES, counts_E, pair, poisoned(TIMES, counts_E, *size, dtype=torch.float32))

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(product, range(200)))
    assert all(torch.equal(each, made[0]) for each in made)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(HERE[-1])
    monkeypatch.setattr(training, "kernels", lambda: found)


def trained(backend: Backend, dtype: torch.dtype, counts_E: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Outputs and all gradients, of rows in ``dtype`` and masters of float32."""
    generator = torch.Generator().manual_seed(0)
    size, width, experts = 40, 36, len(counts_E)
    x_RD = torch.randn(sum(counts_E), size, generator=generator).to(dtype).requires_grad_()
    up_EGD = (torch.randn(experts, 2 * width, size, generator=generator) / size**0.5).requires_grad_()
    down_EDF = (torch.randn(experts, size, width, generator=generator) / width**0.5).requires_grad_()
    stacks = DenseStack(up_EGD), DenseStack(down_EDF)
    y_RD = stacked_feed_forward(x_RD, counts_E, *stacks, "swiglu", backend)
    found = torch.autograd.grad(y_RD, (x_RD, up_EGD, down_EDF), torch.ones_like(y_RD))
    return y_RD.detach(), *found


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("counts_E", [(3, 0, 7, 1), (63, 2, 0, 1), (0, 0, 1, 0)], ids=str)
def test_gradients_are_those_of_the_loop_over_experts(dtype: torch.dtype, counts_E: tuple[int, ...]) -> None:
    made, wanted = trained("native", dtype, counts_E), trained("reference", dtype, counts_E)
    most = 1e-5 if dtype == torch.float32 else 1.5e-2
    assert [tensor.dtype for tensor in made] == [dtype, dtype, torch.float32, torch.float32]
    assert all(relative_error(got, right) < most for got, right in zip(made, wanted, strict=True))
    for grad_EOI in made[2:]:
        assert not grad_EOI[counts_E.index(0)].any(), "an idle expert learns nothing"


@pytest.mark.usefixtures("native")
def test_they_are_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[int] = []

    def noted(rows: Tensor, other: Tensor, ends_E: Tensor, kind: int, wide: bool) -> Tensor:
        kinds.append(kind)
        return multiply_sorted(rows, other, ends_E, kind, wide)

    monkeypatch.setattr(training, "multiply_sorted", noted)
    trained("native", torch.bfloat16, (3, 0, 7, 1))
    assert sorted(kinds) == [TIMES_TRANSPOSED] * 2 + [TIMES] * 2 + [OUTER] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("native")
def test_products_are_operators(kind: int) -> None:
    counts_E = (4, 0, 3)
    for wide in (False, True):
        arguments = *sides(kind, counts_E, 9, 7), torch.tensor(counts_E).cumsum(0), kind, wide
        torch.library.opcheck(multiply_sorted, arguments)
        with FakeTensorMode() as mode:
            rows, other, ends_E = (mode.from_tensor(tensor) for tensor in arguments[:3])
            made = multiply_sorted(rows.bfloat16(), other, ends_E, kind, wide)
        assert made.shape == multiply_sorted(*arguments).shape
        assert made.dtype == (torch.float32 if wide else torch.bfloat16)


@pytest.mark.parametrize(
    ("tier", "dtype", "side", "taken"),
    [
        ("avx512bf16", torch.bfloat16, 64, True),
        ("avx512bf16", torch.float32, 512, True),
        ("avx512bf16", torch.float32, 511, False),
        ("avx2", torch.bfloat16, 64, True),
        ("avx2", torch.float32, 512, True),
        ("amx", torch.bfloat16, 512, False),
        ("avx512", torch.float32, 512, False),
        ("portable", torch.float32, 512, False),
        ("avx512bf16", torch.float64, 512, False),
    ],
)
def test_they_are_taken_where_they_were_measured_to_be_faster(
    tier: Tier, dtype: torch.dtype, side: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/decisions/0003-experts-backend.md."""
    found = Kernels(None, tier, 16)
    monkeypatch.setattr(training, "kernels", lambda: found)
    monkeypatch.setattr(training, "_planned", lambda: tier)
    network = Network(torch.zeros(2, 600, 520), torch.zeros(2, 520, side), "swiglu")
    x_RD = torch.zeros(64, 520, dtype=dtype)
    assert (choose(x_RD, (0, 64), network) == "native") == taken
    few = tier == "avx2" and dtype == torch.bfloat16  # torch has only a loop for it there
    assert (choose(x_RD[:40], (10, 30), network) == "native") == few
    monkeypatch.setattr(training, "kernels", lambda: None)
    assert choose(x_RD, (0, 64), network) != "native"


def test_nothing_is_compiled_for_what_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> None:
        raise AssertionError("somebody compiled")

    monkeypatch.setattr(training, "kernels", asked)
    never = ("amx", torch.bfloat16, 600), ("avx2", torch.float32, 64), ("avx2", torch.float64, 600)
    for tier, dtype, side in never:
        monkeypatch.setattr(training, "_planned", lambda tier=tier: tier)
        network = Network(torch.zeros(1, 600, side), torch.zeros(1, side, 300), "swiglu")
        assert choose(torch.zeros(64, side, dtype=dtype), (64,), network) != "native"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are Linux's")
def test_no_memory_is_an_error_like_any_other() -> None:
    """Memory for a second copy of the rows is asked for, and may not be there."""
    script = (
        "import resource, torch\n"
        "from pathlib import Path\n"
        "from consilium.ops.native import training\n"
        "from consilium.ops.native.library import opened\n"
        f"kernels = opened(Path({path_of(HERE[-1])!r}), {HERE[-1]!r})\n"
        "training.kernels = lambda: kernels\n"
        "rows, matrix, ends = torch.zeros(30000, 1024), torch.zeros(1, 8, 1024), torch.tensor([30000])\n"
        "training.multiply_sorted(rows[:2], matrix, torch.tensor([2]), 0, False)\n"
        "here = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (here + (60 << 20), -1))\n"
        "try:\n"
        "    training.multiply_sorted(rows, matrix, ends, 0, False)\n"
        "except MemoryError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert "use smaller batches" in done.stdout, done.stderr


def test_rows_are_where_they_are_whatever_the_default_device(native: None) -> None:
    del native
    with torch.device("meta"):
        made = training.Native((3, 0, 2), wide=True).ends_E
    assert made.tolist() == [3, 3, 5]


@pytest.mark.usefixtures("native")
def test_what_they_do_not_read_takes_the_loop() -> None:
    """Matrices in float64, or of another layout."""
    x_RD = torch.randn(4, 8, dtype=torch.float64)
    up_EGD, down_EDF = torch.randn(2, 12, 8, dtype=torch.float64), torch.randn(2, 8, 6, dtype=torch.float64)
    stacks = DenseStack(up_EGD), DenseStack(down_EDF)
    made = stacked_feed_forward(x_RD, (1, 3), *stacks, "swiglu", "native")
    assert torch.equal(made, stacked_feed_forward(x_RD, (1, 3), *stacks, "swiglu", "loop"))
    turned = DenseStack(up_EGD.float().mT.contiguous().mT), DenseStack(down_EDF.float())
    assert (
        relative_error(stacked_feed_forward(x_RD.float(), (1, 3), *turned, "swiglu", "native"), made) < 1e-5
    )
