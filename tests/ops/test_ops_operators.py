"""The kernels as operators of torch: what torch asks of one, compiled graphs, tensors without values."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from consilium.ops.grouped import stacked_feed_forward
from consilium.ops.native import operators
from consilium.ops.native.operators import Held, networks, product, serve
from consilium.ops.weights import PACKINGS, Dense, DenseStack, Matrix, Packed, PackedStack, Stack, packed
from kernels import HERE, kernels_of

FORMATS = ("float32", "bfloat16", *PACKINGS)
CHECKS = ("test_autograd_registration", "test_faketensor", "test_schema", "test_aot_dispatch_dynamic")
COMPARED = 2
"""From the third on they compare arguments, which torch does not do for floats in 8 bits."""
E, D, F = 3, 40, 36


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(HERE[-1])
    monkeypatch.setattr(operators, "kernels", lambda: found)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix_in(form: str) -> Matrix:
    weight_OI = drawn(F, D)
    match form:
        case "int8" | "int4" | "uint4" | "fp8":
            return Packed(*packed(weight_OI, form), D)
        case _:
            return Dense(weight_OI.to(getattr(torch, form)))


def stacks_in(form: str) -> tuple[Stack, Stack]:
    up_EGD, down_EDF = drawn(E, 2 * F, D, seed=1), drawn(E, D, F, seed=2)
    match form:
        case "int8" | "int4" | "uint4" | "fp8":
            return PackedStack(*packed(up_EGD, form), D), PackedStack(*packed(down_EDF, form), F)
        case _:
            return DenseStack(up_EGD.to(getattr(torch, form))), DenseStack(down_EDF.to(getattr(torch, form)))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D), (40, D)], ids=str)
def test_products_are_operators(form: str, shape: tuple[int, ...]) -> None:
    held = matrix_in(form).held
    for bias_O in (None, drawn(F, seed=3)):
        arguments = drawn(*shape, seed=4), held.values, held.scales, bias_O, held.columns
        torch.library.opcheck(product, arguments, test_utils=CHECKS[: COMPARED if form == "fp8" else None])
        assert product(*arguments).shape == (*shape[:-1], F)


@pytest.mark.parametrize("form", FORMATS)
def test_networks_are_operators(form: str) -> None:
    up, down = stacks_in(form)
    arguments = drawn(7, D), (4, 0, 3), *up.held[:2], *down.held[:2], F, 0
    torch.library.opcheck(networks, arguments, test_utils=CHECKS[: COMPARED if form == "fp8" else None])


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_a_compiled_graph_holds_them(form: str) -> None:
    """In one graph, without a break."""
    matrix, x = matrix_in(form), drawn(5, D, seed=4).bfloat16()

    def doubled(x: Tensor) -> Tensor:
        return matrix.times(x) * 2

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), doubled(x))
    kinds = set[str]()

    def kept(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        kinds.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(doubled, backend=kept, fullgraph=True)(x)
    assert any("consilium.product" in kind for kind in kinds) == (form in PACKINGS)


@pytest.mark.parametrize("form", FORMATS[1:])
@torch.no_grad()
def test_tensors_without_values_pass_through(form: str) -> None:
    matrix, (up, down) = matrix_in(form), stacks_in(form)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(6, D, dtype=torch.bfloat16)
        assert matrix.times(x).shape == (6, F)
        y = stacked_feed_forward(x, (2, 0, 4), up, down, "swiglu")
    assert (y.shape, y.dtype) == ((6, D), torch.bfloat16)


@torch.no_grad()
def test_what_they_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    held, x = matrix_in("bfloat16").held, drawn(2, D)
    assert serve(x, held)
    assert not serve(x[:0], held)
    assert not serve(x.to("meta"), held)
    assert not serve(x, Held(held.values.half(), None, D))
    assert not serve(x, Held(held.values.t(), None, D))
    assert not serve(x, held, bias_O=torch.zeros(F, dtype=torch.float64))
    eight = matrix_in("int8").held
    assert eight.scales is not None
    assert not serve(x, eight._replace(scales=eight.scales.bfloat16())), "a model that was cast to bfloat16"
    with torch.enable_grad():
        assert not serve(x, held)
    monkeypatch.setattr(operators, "kernels", lambda: None)
    assert not serve(x, held)


def test_who_does_not_compile_does_not_import_the_compiler() -> None:
    """It takes 130 MB and seconds."""
    script = "import sys, consilium.engine.engine; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
