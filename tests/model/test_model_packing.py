"""Models with packed weights: which are packed, kernels and modules agree on them, and what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from consilium.checkpoint import packed as reading
from consilium.checkpoint import store
from consilium.config.model import Model
from consilium.model.build import build
from consilium.model.packing import pack, packings
from consilium.model.types import Options
from consilium.ops.native.compile import Tier
from consilium.ops.weights import PACKINGS, Packing, packed, unpacked
from kernels import HERE, round_activations
from model.test_model_native import agree, prepare
from small import DEEPSEEK, KINDS, SWITCH, lively


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_kernels_and_modules_agree(
    config: Model, packing: Packing, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The modules round activations as kernels do.

    One that differs in its last place may go the other way: 1/127 of the largest of 32, and some layers of
    these models have no more. Which do depends on how a processor's matrix products round.
    """
    model = lively(config).eval()
    pack(model, packing)
    round_activations(monkeypatch)
    agree(model, prepare(model, tier), [3, 9, 1], within=1e-2)


@pytest.mark.parametrize("packing", PACKINGS)
def test_values_are_those_of_the_packed_matrices(packing: Packing) -> None:
    model, wide = lively(DEEPSEEK).eval(), lively(DEEPSEEK).eval()
    pack(model, packing)
    with torch.no_grad():
        for name, kind in packings(wide, packing).items():
            weight = wide.get_parameter(name)
            weight.copy_(unpacked(*packed(weight, kind), weight.shape[-1]))
    ids_BS = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        found, right = model(ids_BS).logits, wide(ids_BS).logits
    assert (found - right).norm() < 1e-5 * right.norm()


def test_gates_norms_and_the_embedding_stay_as_they_are() -> None:
    names = packings(build(DEEPSEEK), "int4").keys()
    assert {"head.weight", "layers.1.moe.experts.up", "layers.1.moe.shared.down.weight"} <= names
    assert not any("norm" in name or "router" in name or "embed" in name for name in names)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_head_that_is_the_embedding_takes_eight_bits_at_both_ends(packing: Packing) -> None:
    model, wide = lively(SWITCH).eval(), lively(SWITCH).eval()
    pack(model, packing)
    assert packings(wide, packing)["embed.weight"] == "int8"
    ids_BS = torch.arange(8).view(2, 4)
    right = unpacked(*packed(wide.embed.weight.detach(), "int8"), wide.config.hidden_size)
    assert torch.equal(model.embedded(ids_BS, Options()), right[ids_BS] * wide.config.embedding_scale)
    with torch.inference_mode():
        logits = right[:5] @ right.T * wide.config.logit_scale
        assert (model.logits(right[:5]) - logits).norm() < 1e-5 * logits.norm()
    assert (model.dtype, model.to(torch.bfloat16).dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_folder_is_packed_as_it_is_read(
    config: Model, packing: Packing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", 3000)
    store.save(lively(config), tmp_path / "model")
    right = store.load(tmp_path / "model")
    pack(right, packing)
    found = store.load(tmp_path / "model", weights=packing, dtype="float32")
    assert found.state_dict().keys() == right.state_dict().keys()
    for name, values in right.state_dict().items():
        assert torch.equal(found.state_dict()[name], values), name


def test_packed_weights_are_a_part_of_the_size() -> None:
    def size(model: torch.nn.Module) -> int:
        return sum(tensor.nbytes for name, tensor in model.state_dict().items() if "experts.up" in name)

    model = build(DEEPSEEK)
    whole = size(model)
    pack(model, "int4")
    assert size(model) == whole * (4 + 16 / 32) / 32
