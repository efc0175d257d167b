"""Products of native kernels are those of float64, and their threads serve whoever calls."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from consilium.ops.native.compile import Built, Tier
from consilium.ops.native.library import Kernels, opened
from consilium.ops.weights import Dense
from kernels import HERE, compiled, kernels_of, whole_numbers, within


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 63, 17), (9, 64, 1000), (17, 33, 96)], ids=str)
def test_products_equal_those_of_float64(tier: Tier, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    generator = torch.Generator().manual_seed(outputs)
    x_BI = torch.randn(rows, inputs, generator=generator)
    weight_OI = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias_O = torch.randn(outputs, generator=generator).to(dtype)
    matrix = Dense(weight_OI).native(bias_O)
    assert matrix is not None
    found = kernels_of(tier).product(matrix, x_BI)
    right = x_BI.double() @ weight_OI.double().T + bias_O.double()
    assert (found - right).norm() <= within(tier, weight_OI) * right.norm()


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 33, 63, 100])
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (65, 64), (130, 288), (64, 1000), (7, 513)], ids=str)
def test_rows_of_a_prompt_are_multiplied_alike(
    tier: Tier, dtype: torch.dtype, rows: int, shape: tuple[int, int]
) -> None:
    """Whole numbers that every format holds: only a wrong place or a lost value makes a difference."""
    outputs, inputs = shape
    x_BI = whole_numbers(rows, inputs, most=100)
    weight_OI = whole_numbers(outputs, inputs, most=127, seed=1).to(dtype)
    bias_O = torch.arange(outputs).float()
    matrix = Dense(weight_OI).native(bias_O)
    assert matrix is not None
    right = x_BI.double() @ weight_OI.double().T + bias_O
    for many in (False, True):
        found = kernels_of(tier).product(matrix, x_BI, many=many)
        assert (found - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(tier: Tier, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BI = torch.randn(70, 200, generator=generator)
    weight_OI = torch.randn(90, 200, generator=generator).to(dtype)
    matrix = Dense(weight_OI).native()
    assert matrix is not None
    alone = torch.cat([kernels_of(tier).product(matrix, x_BI[b : b + 1]) for b in range(70)])
    for rows in (2, 5, 16, 17, 31, 70):
        assert torch.equal(kernels_of(tier).product(matrix, x_BI[:rows].contiguous()), alone[:rows])


@pytest.mark.parametrize("tier", HERE)
def test_what_is_not_a_number_stays_in_its_row(tier: Tier) -> None:
    x_BI = torch.ones(20, 40)
    x_BI[3, 7], x_BI[18, 0] = torch.nan, torch.inf
    weight_OI = torch.ones(33, 40, dtype=torch.bfloat16)
    matrix = Dense(weight_OI).native()
    assert matrix is not None
    for many in (False, True):
        finite_B = kernels_of(tier).product(matrix, x_BI, many=many).isfinite().all(1)
        assert finite_B.logical_not().nonzero().flatten().tolist() == [3, 18]


def test_large_values_stay_finite() -> None:
    weight_OI = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    matrix = Dense(weight_OI).native()
    assert matrix is not None
    assert torch.isfinite(kernels_of(HERE[-1]).product(matrix, torch.full((2, 4096), 1e5))).all()


def test_other_formats_and_layouts_are_not_described() -> None:
    weight_OI = torch.zeros(4, 6)
    assert Dense(weight_OI).native() is not None
    for other in (weight_OI.double(), weight_OI.half(), weight_OI.T, weight_OI[:, :3], weight_OI.to("meta")):
        assert Dense(other).native() is None
    assert Dense(weight_OI).native(torch.zeros(4, dtype=torch.bfloat16)) is not None
    assert Dense(weight_OI).native(torch.zeros(4, dtype=torch.float64)) is None


@pytest.mark.parametrize("tier", HERE)
def test_a_tier_has_its_own_vectors(tier: Tier) -> None:
    assert kernels_of(tier).lanes == {"portable": 4, "avx2": 8}.get(tier, 16)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.parametrize("tier", [tier for tier in HERE if tier in ("portable", "avx2")])
def test_lower_tiers_hold_no_instruction_of_higher_ones(tier: Tier) -> None:
    kernels_of(tier)
    found = compiled(tier)
    assert isinstance(found, Built)
    text = subprocess.run(
        ["objdump", "-d", str(found.path)], capture_output=True, text=True, check=True
    ).stdout
    assert len(text) > 10_000
    assert not re.search(r"%zmm|%k[1-7]", text)
    assert bool(re.search(r"%ymm", text)) == (tier == "avx2")


def _busy(kernels: Kernels, calls: int) -> torch.Tensor:
    weight_OI = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    matrix, x_BI = Dense(weight_OI).native(), torch.ones(2, 200)
    assert matrix is not None
    return torch.stack([kernels.product(matrix, x_BI) for _ in range(calls)])


def test_threads_of_one_process_share_the_kernels() -> None:
    """Whoever comes while others compute waits for its turn, and all have the same values."""
    kernels, results = kernels_of(HERE[-1]), []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        starters = [threading.Thread(target=lambda: results.append(_busy(kernels, 50))) for _ in range(4)]
        for starter in starters:
            starter.start()
        for starter in starters:
            starter.join(60)
    finally:
        torch.set_num_threads(before)
    assert len(results) == 4
    assert all(torch.equal(result, results[0]) for result in results)


def test_regions_of_every_size_follow_each_other() -> None:
    """A thread that has met all others may read nothing that the next region already writes."""
    kernels, before = kernels_of(HERE[-1]), torch.get_num_threads()
    weight_OI, x_BI = torch.ones(70, 8), torch.ones(1, 8)
    matrix = Dense(weight_OI).native()
    assert matrix is not None
    try:
        for threads in [1, 3, 2, 4] * 1000:
            torch.set_num_threads(threads)
            assert (kernels.product(matrix, x_BI) == 8).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("before", ["assert right()", "torch.ones(3000, 3000) + 1"])
def test_a_forked_child_computes_with_threads_of_its_own(before: str) -> None:
    """Whether its parent used the kernels or torch's threads, without which torch hangs in its own."""
    kernels_of(HERE[-1])
    found = compiled(HERE[-1])
    assert isinstance(found, Built)
    script = (
        "import os, sys, torch\n"
        "from consilium.ops.native import training\n"
        "from consilium.ops.native.library import opened\n"
        "from consilium.ops.weights import Dense\n"
        f"kernels = opened({str(found.path)!r}, {found.tier!r})\n"
        "torch.set_num_threads(2)\n"
        "weight = torch.ones(500, 200)\n"
        "training.kernels = lambda: kernels\n"
        "ones, many = torch.ones(1, 200), torch.ones(64, 200)\n"
        "def right():\n"
        "    made = training.multiply_sorted(many, weight[None], torch.tensor([64]), 0, False)\n"
        "    product = kernels.product(Dense(weight).native(), ones)\n"
        "    return bool((made == 200).all() and (product == 200).all())\n"
        f"{before}\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if right() else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not right())\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_file_of_other_structures_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_of(HERE[-1])
    found = compiled(HERE[-1])
    assert isinstance(found, Built)
    monkeypatch.setattr("consilium.ops.native.library.Layer", ctypes.c_int64)
    with pytest.raises(AssertionError, match="another layout"):
        opened(found.path, found.tier)
