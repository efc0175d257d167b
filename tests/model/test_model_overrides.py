"""Interventions through the whole model, layer by layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from consilium.config.model import Model
from consilium.config.moe import Capacity, DeviceCapacity
from consilium.config.router import SampledSecond
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.model.types import Hidden, Inputs, Options
from consilium.moe.types import Activations, Mode, Override, Routing, Tokens
from consilium.ops.rows import Rows
from small import DEEPSEEK, DENSE, SWITCH, lively, random_batch

DROPPING = {
    "capacity": Capacity(factor=0.6),
    "devices": DeviceCapacity(devices=4, factor=0.7, exempt=0.0),
}


class Ignores:
    """An observer that keeps nothing."""

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        pass

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        pass


def gshard_like(admission: Capacity | DeviceCapacity) -> Decoder:
    assert SWITCH.moe is not None
    router = dataclasses.replace(SWITCH.moe.router, select=SampledSecond())
    return lively(
        dataclasses.replace(SWITCH, moe=dataclasses.replace(SWITCH.moe, router=router, admission=admission))
    )


def training_pass(model: Decoder, override: dict[int, Override] | None) -> Hidden:
    batch = random_batch(2, 40)
    inputs = Inputs(batch.ids_BS, batch.sequence_BS, batch.position_BS, batch.valid_BS)
    generator = torch.Generator().manual_seed(3)
    mode = Mode(training=True, generator=generator, override=override)
    return model.hidden(inputs, options=Options(mode, routings=True))


@pytest.mark.parametrize("admission", DROPPING.values(), ids=DROPPING)
def test_a_training_pass_is_replayed_layer_by_layer(admission: Capacity | DeviceCapacity) -> None:
    model = gshard_like(admission)
    first = training_pass(model, None)
    assert all(int(report.dropped) > 0 for report in first.reports)
    replays = {layer: routing.replay() for layer, routing in first.routings.items()}
    again = training_pass(model, replays)
    assert torch.equal(again.final_BSD, first.final_BSD)
    for one, two in zip(first.reports, again.reports, strict=True):
        assert one.layer == two.layer
        assert one.losses == two.losses
        assert torch.equal(one.load_E, two.load_E)
        assert torch.equal(one.wanted_E, two.wanted_E)


def test_an_override_by_layer_leaves_other_layers_alone() -> None:
    model = lively(SWITCH)
    first, second = model.config.moe_layers
    ids_BS = torch.arange(60).view(2, 30)
    mute_1E = torch.tensor([[False, True, True, False]])
    mode = Mode(override={second: Override(mute_TE=mute_1E)})
    plain, muted = (model(ids_BS, options=options).reports for options in (Options(), Options(mode)))
    assert first < second
    assert torch.equal(plain[first].load_E, muted[first].load_E)
    assert plain[second].load_E[1:3].any()
    assert not muted[second].load_E[1:3].any()


@pytest.mark.parametrize("config", [DENSE, DEEPSEEK], ids=["no experts", "a dense first block"])
def test_an_override_of_a_block_without_experts_is_refused(config: Model) -> None:
    options = Options(Mode(override={0: Override()}))
    with pytest.raises(ConsiliumError, match="override names layer 0, which has no experts"):
        lively(config)(torch.zeros(1, 3, dtype=torch.int64), options=options)


def test_an_observer_is_refused_where_blocks_are_recomputed() -> None:
    with pytest.raises(ConsiliumError, match="every row twice"):
        Options(Mode(observer=Ignores()), recompute=True)
    assert Options(Mode(observer=Ignores())).mode.observer is not None
