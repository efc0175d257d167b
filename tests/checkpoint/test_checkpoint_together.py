"""A checkpoint of several processes is that of one: any topology reads what any other wrote, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from consilium.checkpoint import store
from consilium.checkpoint.store import Content, TrainingState
from consilium.config.model import Model
from consilium.disk import manifest
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.parallel.mesh import ALONE, Mesh
from consilium.parallel.topology import Topology
from consilium.training.spread import allocated, rows_of, stamped
from processes import fill, together
from small import DEEPSEEK, SWITCH, lively

CASES = {
    "DP2 EP2, published names": (Topology(data=2, expert=2), DEEPSEEK),
    "EP2, our own names": (Topology(expert=2), SWITCH),
    "two replicas": (Topology(replicas=2), DEEPSEEK),
}


def moments(model: Decoder) -> dict[str, Tensor]:
    """Of every parameter a moment that is three times its weight, and a count."""
    found = {f"{name}:moment": 3 * p.detach() for name, p in model.named_parameters()}
    return found | {f"{name}:step": torch.tensor(7.0) for name, _ in model.named_parameters()}


def doubled(model: Decoder, mesh: Mesh) -> Content:
    """What stands for an average of the weights: values of its own that lie as the model's do."""
    plain = Content.of(model)
    own = {
        name: mesh.sharding.like(tensor, 2 * mesh.sharding.part(tensor).here)
        for name, tensor in plain.weights.items()
    }
    return dataclasses.replace(plain, weights=own)


def saved(config: Model, mesh: Mesh, folder: Path) -> None:
    model = allocated(config, mesh)
    fill(model, lively(config).state_dict(), mesh)
    with mesh.sharding.local(model):
        tensors = moments(model)
    state = TrainingState(tensors, {"step": 3}, stamped(tensors, model, mesh))
    beside = {"average": doubled(model, mesh)}
    store.save(model, folder, training_state=state, beside=beside, mesh=mesh)


def assert_reads(config: Model, mesh: Mesh, folder: Path) -> None:
    expected = lively(config)
    model = allocated(config, mesh)
    store.load_weights(model, folder, mesh=mesh)
    twin = allocated(config, mesh)
    fill(twin, expected.state_dict(), mesh)
    average = doubled(model, mesh)
    for tensor in average.weights.values():
        mesh.sharding.part(tensor).here.zero_()
    store.load_weights(average, folder / "average", mesh=mesh)
    for name, theirs in twin.state_dict().items():
        expected_here = mesh.sharding.part(theirs).here
        assert torch.equal(mesh.sharding.part(model.state_dict()[name]).here, expected_here), name
        assert torch.equal(mesh.sharding.part(average.weights[name]).here, 2 * expected_here), name
    state = store.load_training_state(folder, rows=rows_of(model, mesh))
    with mesh.sharding.local(twin):
        wanted = moments(twin)
    assert state.tensors.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(state.tensors[name], wanted[name])] == []


@pytest.mark.parametrize(("topology", "config"), CASES.values(), ids=CASES)
def test_one_process_reads_what_several_wrote(topology: Topology, config: Model, tmp_path: Path) -> None:
    folder = tmp_path / "saved"

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        saved(config, mesh, folder)
        return {}

    together(topology, work)
    manifest.verify(folder)
    model, average, expected = store.load(folder), store.load(folder / "average"), lively(config)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(average.state_dict()[name], 2 * tensor), name
    state, wanted = store.load_training_state(folder), moments(expected)
    assert state.tensors.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(state.tensors[name], wanted[name])] == []
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    assert len(set(shards)) == topology.world


def test_any_topology_reads_what_another_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "saved"

    def write(mesh: Mesh) -> Mapping[str, Tensor]:
        saved(DEEPSEEK, mesh, folder)
        return {}

    def read(mesh: Mesh) -> Mapping[str, Tensor]:
        assert_reads(DEEPSEEK, mesh, folder)
        return {}

    together(Topology(data=2, expert=2), write)
    for topology in (Topology(expert=4), Topology(data=3)):
        together(topology, read)


def test_several_processes_read_what_one_wrote(tmp_path: Path) -> None:
    model = lively(DEEPSEEK)
    state = TrainingState(moments(model), {"step": 3})
    store.save(model, tmp_path / "saved", training_state=state, beside={"average": doubled(model, ALONE)})

    def read(mesh: Mesh) -> Mapping[str, Tensor]:
        assert_reads(DEEPSEEK, mesh, tmp_path / "saved")
        return {}

    together(Topology(data=2, expert=2), read)


def test_a_process_that_cannot_write_leaves_no_checkpoint_and_tells_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "saved"

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        if mesh.world.rank == 1:
            message = "no space left on the disk for a part."
            store.together.safetensors_io.write = lambda *a, **k: refuse(message)
        with pytest.raises(ConsiliumError, match="no space left on the disk for a part"):
            saved(DEEPSEEK, mesh, folder)
        return {}

    together(Topology(data=2), work)
    assert list(tmp_path.iterdir()) == []


def refuse(message: str) -> None:
    raise ConsiliumError(message)


@pytest.mark.parametrize("damage", ["gone", "twice"])
def test_parts_that_do_not_meet_are_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        saved(DEEPSEEK, mesh, folder)
        return {}

    together(Topology(data=2), work)
    state = folder / store.STATE
    index = json.loads((state / "parts.json").read_text())
    first, second = sorted(index)
    if damage == "gone":
        del index[first]
    else:
        index[second] = index[first]
    (state / "parts.json").write_text(json.dumps(index))
    with pytest.raises(ConsiliumError, match="do not hold every row of"):
        store.load_training_state(folder, verified=True)
