"""On processors without AVX512 bfloat16 is kept and float32 is multiplied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from consilium.model.decoder import Decoder
from consilium.ops.bfloat16 import is_storage
from consilium.ops.native import operators
from kernels import HERE, kernels_of
from small import DEEPSEEK, SWITCH, lively


class Products(TorchDispatchMode):
    """The dtypes of every product that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(
            word in name for word in ("aten.mm", "aten.addmm", "aten.bmm", "grouped_mm", "scaled_dot_product")
        ):
            self.seen.add((name, args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"])
def avx2(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(HERE[-1]) if request.param else None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(operators, "kernels", lambda: found)


@torch.inference_mode()
def passed(model: Decoder) -> tuple[torch.Tensor, set[torch.dtype]]:
    with Products() as products:
        logits = model(torch.arange(40).view(2, 20)).logits
    return logits, {dtype for _, dtype in products.seen}


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("config", [DEEPSEEK, SWITCH], ids=["latent", "grouped"])
def test_a_prompt_in_bfloat16_multiplies_in_float32(config: Any) -> None:
    model = lively(config).to(torch.bfloat16).eval()
    logits, dtypes = passed(model)
    assert dtypes == {torch.float32}
    wide = lively(config).eval()
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    right, _ = passed(wide)
    assert functional.cosine_similarity(logits.flatten(0, 1), right.flatten(0, 1)).median() > 0.999


def test_elsewhere_bfloat16_is_multiplied_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    for capability, storage in (("AVX2", True), ("AVX512", False), ("DEFAULT", False)):
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
        )
        assert is_storage(x) == storage
        assert not is_storage(x.float())
        assert not is_storage(x.to("meta"))
