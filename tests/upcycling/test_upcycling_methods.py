"""What each method makes: who has which neuron, even loads, the same bits again, and what is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

from consilium.checkpoint import store
from consilium.cli.upcycle import METHODS
from consilium.config import upcycling
from consilium.config.io import from_data
from consilium.config.moe import AlwaysOn, MoE, SigmoidGated
from consilium.config.router import Normalised, Raw, Router, Sigmoid, Standardise, TopK
from consilium.config.upcycling import ClusterSplit, Drop, Expand, Qwen, Upcycling, VirtualGroup
from consilium.data.corpus import measured_corpus, whole_documents
from consilium.data.paths import path_texts
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.evaluation.bits import Reading, measure
from consilium.evaluation.walk import importances, passages, walk
from consilium.model.types import Inputs
from consilium.planner.upcycled import FLAT
from consilium.records.io import read_json
from consilium.records.upcycling import NAME, Lineage
from consilium.upcycling.run import How, run, upcycle
from support import relative_error
from upcycling.sources import LLAMA, saved, text

ALL: dict[str, dict[str, Any]] = {
    "split-random": {"method": "split-random", "experts": 4, "top_k": 2, "shared": 2},
    "split-cluster": {"method": "split-cluster", "experts": 6, "top_k": 2},
    "split-cluster by gate and angle": {
        "method": ClusterSplit(rows="gate", metric="cosine"),
        "experts": 4,
        "top_k": 2,
    },
    "split-inner": {"method": "split-inner", "experts": 4, "top_k": 2},
    "split-inter": {"method": "split-inter", "experts": 3, "top_k": 1, "shared": 1},
    "split-graph": {"method": "split-graph", "experts": 8, "top_k": 3},
    "carve": {"method": "carve", "experts": 5, "top_k": 2, "shared": 1},
    "copy": {"method": "copy", "experts": 4, "top_k": 2},
    "standardised": {"method": "copy", "experts": 4, "top_k": 2, "gate": "standardised"},
    "hidden layer in the gate": {"method": "split-random", "experts": 4, "top_k": 1, "gate": "mlp"},
    "virtual-group": {"method": VirtualGroup(granularity=3), "experts": 4, "top_k": 3},
    "qwen": {"method": Qwen(granularity=2), "experts": 3, "top_k": 2},
    "drop": {"method": "drop", "experts": 4, "top_k": 2},
}
DISJOINT = ("split-random", "split-cluster", "split-cluster by gate and angle", "split-graph", "carve")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    saved(LLAMA, folder / "dense")
    text(folder / "a.txt")
    return folder / "dense"


def made(dense: Path, out: Path, name: str, **more: Any) -> Lineage:
    upcycle(dense, out, **{"data": dense.parent / "a.txt", "calibration_tokens": 3000, **ALL[name], **more})
    return read_json(Lineage, out / NAME)


def test_every_method_of_the_configuration_is_a_method_of_the_command() -> None:
    members = get_args(get_args(upcycling.Method)[0])
    assert tuple(member.kind for member in members) == METHODS
    assert {options["method"] for options in ALL.values() if isinstance(options["method"], str)} <= set(
        METHODS
    )


@pytest.mark.parametrize("name", ALL)
def test_loads_are_even_at_the_start_and_the_same_seed_makes_the_same_bits(
    name: str, dense: Path, tmp_path: Path
) -> None:
    lineage = made(dense, tmp_path / "one", name)
    for layer in lineage.certificate.layers:
        assert min(layer.load) > 0
        assert max(layer.load) < 1.35 * sum(layer.load) / len(layer.load), layer
    assert made(dense, tmp_path / "two", name) == lineage
    one, two, other = (tmp_path / n / "model.safetensors" for n in ("one", "two", "other"))
    assert one.read_bytes() == two.read_bytes()
    made(dense, tmp_path / "other", name, seed=1)
    assert one.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("name", DISJOINT)
def test_each_neuron_is_in_one_expert_with_all_its_rows(name: str, dense: Path, tmp_path: Path) -> None:
    lineage = made(dense, tmp_path / "moe", name)
    before, after = store.load(dense).state_dict(), store.load(tmp_path / "moe").state_dict()
    factor = float(ALL[name]["top_k"])
    for layer, experts in enumerate(lineage.neurons):
        shared = list(lineage.shared[layer]) if lineage.shared else []
        assert sorted([n for expert in experts for n in expert] + shared) == list(range(48))
        up_GD, down_DF = (before[f"layers.{layer}.feed_forward.{w}.weight"] for w in ("up", "down"))
        for expert, neurons in enumerate(experts):
            both = [*neurons, *(48 + n for n in neurons)]
            assert torch.equal(after[f"layers.{layer}.moe.experts.up"][expert], up_GD[both])
            down_DS = after[f"layers.{layer}.moe.experts.down"][expert]
            assert torch.equal(down_DS, down_DF[:, list(neurons)] * factor)
        if shared:
            assert torch.equal(after[f"layers.{layer}.moe.shared.down.weight"], down_DF[:, shared])


@pytest.mark.parametrize(
    ("scale", "top_k", "factor"),
    [("sum", 2, 2.0), ("ratio", 2, 3.0), ("none", 2, 1.0), ("sum", 1, 6.0), ("ratio", 1, 36.0)],
)
def test_a_scale_is_what_down_matrices_are_multiplied_by(
    scale: str, top_k: int, factor: float, dense: Path, tmp_path: Path
) -> None:
    """A single expert is weighed by its score, a sixth, which its matrix makes up for."""
    lineage = made(dense, tmp_path / "moe", "split-cluster", scale=scale, top_k=top_k)
    before, after = store.load(dense).state_dict(), store.load(tmp_path / "moe").state_dict()
    for layer, neurons in enumerate(lineage.neurons):
        down_DES = before[f"layers.{layer}.feed_forward.down.weight"][:, torch.tensor(neurons)]
        down_EDS = after[f"layers.{layer}.moe.experts.down"]
        assert torch.equal(down_EDS, down_DES.transpose(0, 1) * factor)


def test_importance_is_activation_times_gradient(dense: Path) -> None:
    """Against one backward pass through the whole model, in which the activations are leaves."""
    source, model = store.open_folder(dense), store.load(dense).eval()
    corpus = measured_corpus(whole_documents(path_texts(dense.parent / "a.txt")), Tokenizer.load(dense))
    read = passages(corpus, Reading(64, limit_tokens=500))
    visits = list(walk(source, read))
    before = {visit.layer: visit.before for visit in visits} | {2: visits[-1].after}
    found = {block.layer: part for block, part in importances(source, read, before)}
    expected = {layer: list[torch.Tensor]() for layer in (0, 1)}
    for passage in read:
        hiddens = whole_pass(model, passage)
        for layer, hidden_BSF in hiddens.items():
            assert hidden_BSF.grad is not None
            expected[layer].append(passage.tokens((hidden_BSF * hidden_BSF.grad).abs().detach()))
    for layer, parts in expected.items():
        assert relative_error(found[layer], torch.cat(parts)) < 1e-4
    last = model.hidden(read[0].inputs).final_BSD
    assert relative_error(model.norm(visits[-1].after[0]), last) < 1e-6


def whole_pass(model: Any, passage: Any) -> dict[int, torch.Tensor]:
    """Activations of each network, with the gradient of the summed loss."""
    hiddens: dict[int, torch.Tensor] = {}

    def kept(layer: int) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            inputs[0].retain_grad()
            hiddens[layer] = inputs[0]

        return hook

    handles = [
        block.feed_forward.down.register_forward_pre_hook(kept(i)) for i, block in enumerate(model.layers)
    ]
    logits_BSV = model(Inputs(passage.inputs.ids_BS, valid_BS=passage.inputs.valid_BS)).logits
    loss = F.cross_entropy(
        logits_BSV.flatten(0, 1), passage.targets_BS.flatten(), ignore_index=-1, reduction="sum"
    )
    loss.backward()
    for handle in handles:
        handle.remove()
    return hiddens


def test_an_expert_of_inner_sharing_has_what_matters_most_to_its_cluster(dense: Path, tmp_path: Path) -> None:
    lineage = made(dense, tmp_path / "moe", "split-inner")
    experts = lineage.neurons[0]
    assert {len(expert) for expert in experts} == {12}
    assert len({n for expert in experts for n in expert}) < 48, "experts share neurons"
    inter = made(dense, tmp_path / "inter", "split-inter")
    for experts, shared in zip(inter.neurons, inter.shared, strict=True):
        assert len(shared) == 12
        assert not set(shared) & {n for expert in experts for n in expert}


def test_a_share_of_the_neurons_is_drawn_anew_and_the_others_stay(dense: Path, tmp_path: Path) -> None:
    made(dense, tmp_path / "moe", "drop", method=Drop(fresh=0.25), seed=3)
    before, after = store.load(dense).state_dict(), store.load(tmp_path / "moe").state_dict()
    up_GD, up_EGD = before["layers.1.feed_forward.up.weight"], after["layers.1.moe.experts.up"]
    same_EG = (up_EGD == up_GD).all(dim=2)
    same_ES = same_EG[:, :48]
    assert torch.equal(same_ES, same_EG[:, 48:]), "gate, up and down of a neuron go together"
    down_DF, down_EDS = before["layers.1.feed_forward.down.weight"], after["layers.1.moe.experts.down"]
    assert torch.equal(same_ES, (down_EDS == down_DF).all(dim=1))
    assert (same_ES.sum(1) == 36).all()
    assert len({tuple(row.tolist()) for row in same_ES}) == 4, "each expert has others"
    for dense_FD, made_ESD in zip(up_GD.chunk(2), up_EGD.chunk(2, dim=1), strict=True):
        fresh = made_ESD[~same_ES]
        assert abs(float(fresh.std() / dense_FD.std()) - 1) < 0.1, "of its own matrix, gate or up"


@pytest.mark.parametrize("fresh", [0.0, 0.25, 0.5])
def test_copies_of_qwen_are_shuffled_cut_and_drawn_anew_in_part(
    fresh: float, dense: Path, tmp_path: Path
) -> None:
    method = Qwen(granularity=2, fresh=fresh)
    lineage = made(dense, tmp_path / "moe", "qwen", method=method, experts=3)
    before, after = store.load(dense).state_dict(), store.load(tmp_path / "moe").state_dict()
    for layer, experts in enumerate(lineage.neurons):
        copies = [[*one, *other] for one, other in zip(experts[::2], experts[1::2], strict=True)]
        assert all(sorted(neurons) == list(range(48)) for neurons in copies)
        parts = {frozenset(neurons) for neurons in experts}
        assert len(parts) == 6, "each copy in an order of its own"
        assert not {frozenset(range(24)), frozenset(range(24, 48))} & parts
        neurons_ES = torch.tensor(experts)
        up_FGD = before[f"layers.{layer}.feed_forward.up.weight"].view(2, 48, -1).transpose(0, 1)
        up_EGSD = after[f"layers.{layer}.moe.experts.up"].view(6, 2, 24, -1)
        same_ES = (up_EGSD.transpose(1, 2) == up_FGD[neurons_ES]).flatten(2).all(2)
        assert same_ES.sum(1).tolist() == [24 - round(24 * fresh)] * 6
        assert len({tuple(row.tolist()) for row in same_ES}) == (6 if fresh else 1), "each has others"
        down_EDS = before[f"layers.{layer}.feed_forward.down.weight"].T[neurons_ES].transpose(1, 2)
        found_EDS = after[f"layers.{layer}.moe.experts.down"]
        assert torch.equal((found_EDS == down_EDS).all(1), same_ES)


def test_the_whole_network_is_a_shared_expert_behind_a_half_open_gate(dense: Path, tmp_path: Path) -> None:
    made(dense, tmp_path / "qwen", "qwen")
    made(dense, tmp_path / "copy", "copy", shared=1)
    made(dense, tmp_path / "split", "split-random")
    for name in ("qwen", "copy"):
        model = store.load(tmp_path / name)
        assert isinstance(model.config.moe and model.config.moe.shared, SigmoidGated)
        state, before = model.state_dict(), store.load(dense).state_dict()
        gate_1D = state["layers.0.moe.shared.gate.weight"]
        assert bool(gate_1D.all()), "llama.cpp has no number for a gate of 0"
        assert float(gate_1D.norm()) < 1e-5
        assert torch.equal(
            state["layers.0.moe.shared.down.weight"], before["layers.0.feed_forward.down.weight"]
        )
    split = store.load(tmp_path / "split").config.moe
    assert split is not None
    assert split.shared == AlwaysOn(count=2, width=8)


def test_the_certificate_measures_what_evaluation_does(dense: Path, tmp_path: Path) -> None:
    found = made(dense, tmp_path / "moe", "split-random").certificate
    corpus = measured_corpus(whole_documents(path_texts(dense.parent / "a.txt")), Tokenizer.load(dense))
    reading = Reading(256, limit_tokens=3000)
    for folder, bits in ((dense, found.bits_per_byte_before), (tmp_path / "moe", found.bits_per_byte_after)):
        model = store.load(folder, dtype="float32").eval()
        measured = measure(model, corpus, reading)
        assert measured.bits_per_byte == pytest.approx(bits, rel=1e-5)
        assert measured.tokens == found.tokens
    assert found.promise is None
    assert found.kept
    assert found.relative > 0.01


def test_experts_of_a_sparse_model_are_repeated(dense: Path, tmp_path: Path) -> None:
    made(dense, tmp_path / "moe", "split-random")
    options = {"data": dense.parent / "a.txt", "method": Expand(), "experts": 8, "top_k": 4}
    found = upcycle(tmp_path / "moe", tmp_path / "more", **options)
    before, after = store.load(tmp_path / "moe").state_dict(), store.load(tmp_path / "more").state_dict()
    for name in ("experts.up", "experts.down"):
        stack = f"layers.1.moe.{name}"
        assert torch.equal(after[stack], before[stack].repeat(2, 1, 1))
    assert torch.equal(after["layers.1.moe.shared.up.weight"], before["layers.1.moe.shared.up.weight"])
    rows_ED, more_ED = (state["layers.1.moe.router.projection.weight"] for state in (before, after))
    assert torch.equal(more_ED[:4], rows_ED)
    assert 0 < relative_error(more_ED[4:], rows_ED) < 1e-4
    # Twice the experts, twice as many chosen: each with its double, at half the weight.
    assert found.promise == 1e-5
    assert found.relative < 1e-5


def test_one_copy_of_each_expert_is_chosen_where_no_more_are(dense: Path, tmp_path: Path) -> None:
    """A direction decides which, for as many tokens each; of equal rows both would be chosen for two."""
    made(dense, tmp_path / "moe", "copy", spread=1.0)
    options = {"data": dense.parent / "a.txt", "method": Expand(), "top_k": 2}
    for copies in (2, 3):
        found = upcycle(tmp_path / "moe", tmp_path / f"more-{copies}", experts=4 * copies, **options)
        assert found.promise is None
        assert found.relative < 1e-5, "copies of one network, whoever is chosen"
        for layer in found.layers:  # of what each expert had, its copies have as much each
            shares_MN = torch.tensor(layer.load).view(copies, 4) / torch.tensor(layer.load).view(
                copies, 4
            ).sum(0)
            assert shares_MN.max() < 1.35 / copies, layer
    made(dense, tmp_path / "cut", "split-cluster", spread=1.0)
    found = upcycle(tmp_path / "cut", tmp_path / "cut-more", experts=12, **options)
    together = upcycle(tmp_path / "cut", tmp_path / "alike", experts=12, **(options | {"spread": 1e-6}))
    assert found.relative < 0.25 * together.relative, "with equal rows a token uses one expert for two"


@pytest.mark.parametrize(
    ("router", "promise"),
    [
        (Router(select=TopK(k=2)), 1e-5),
        (Router(score=Sigmoid(), select=TopK(k=2), weight=Normalised()), 1e-5),
        (Router(score=Sigmoid(), select=TopK(k=2), weight=Raw()), None),
        (Router(select=TopK(k=2), transforms=(Standardise(),)), None),
    ],
    ids=["softmax", "sigmoid, normalised", "sigmoid, as it is", "standardised"],
)
def test_repeated_experts_promise_what_their_router_allows(
    router: Router, promise: float | None, dense: Path, tmp_path: Path
) -> None:
    moe = MoE(experts=4, width=16, router=router)
    saved(dataclasses.replace(LLAMA, family="mixtral", moe=moe), tmp_path / "moe")
    options = {"data": dense.parent / "a.txt", "method": Expand(), "experts": 8}
    together = upcycle(tmp_path / "moe", tmp_path / "more", top_k=4, **options)
    assert together.promise == promise
    assert together.kept
    apart = upcycle(tmp_path / "moe", tmp_path / "apart", top_k=2, **options)
    alike = upcycle(tmp_path / "moe", tmp_path / "alike", top_k=2, spread=1e-6, **options)
    assert apart.relative < 0.7 * alike.relative, "which uses one expert for two"
    for layer in apart.layers:
        shares_MN = torch.tensor(layer.load).view(2, 4) / torch.tensor(layer.load).view(2, 4).sum(0)
        assert shares_MN.max() < 0.75, layer


@pytest.mark.parametrize("gate", [FLAT, 0.1, 1.0])
def test_scores_that_are_weights_stay_what_they_were(gate: float, dense: Path, tmp_path: Path) -> None:
    """Behind flat logits a softmax over three copies of each gives every one a third of its weight."""
    made(dense, tmp_path / "moe", "copy", top_k=1, spread=gate)
    options = {"data": dense.parent / "a.txt", "method": Expand(), "experts": 12, "top_k": 1}
    found = upcycle(tmp_path / "moe", tmp_path / "more", **options)
    before, after = store.load(tmp_path / "moe").state_dict(), store.load(tmp_path / "more").state_dict()
    down = "layers.1.moe.experts.down"
    factor = float(after[down].norm() / before[down].norm() / 3**0.5)
    assert torch.allclose(after[down], factor * before[down].repeat(3, 1, 1))
    if gate == FLAT:
        assert factor == pytest.approx(3, rel=1e-3)
        assert found.relative < 1e-3
    else:
        assert 1 < factor < (2.5 if gate == 0.1 else 1.3)
        assert found.relative < 0.3


def test_what_cannot_be_repeated_is_said(dense: Path, tmp_path: Path) -> None:
    made(dense, tmp_path / "moe", "copy", gate="mlp")
    with pytest.raises(ConsiliumError, match=r"repeats the rows of a linear gate, and this model's is 'mlp'"):
        upcycle(tmp_path / "moe", tmp_path / "more", method=Expand(), experts=8, top_k=2)
    assert not (tmp_path / "more").exists()


def test_neurons_that_several_experts_have_add_up_to_no_network(dense: Path, tmp_path: Path) -> None:
    for name in ("split-inner", "split-inter"):
        found = made(dense, tmp_path / name, name, top_k=ALL[name]["experts"]).certificate
        assert found.promise is None
        assert found.relative > 0.01


def test_carved_experts_of_dead_neurons_are_loaded_alike(dense: Path, tmp_path: Path) -> None:
    """Neurons whose rows are zeros give gate rows of zeros, which tie for every token."""
    folder = tmp_path / "dead"
    model = store.load(dense)
    with torch.no_grad():
        for block in model.layers:
            block.feed_forward.up.weight.view(2, 48, -1)[:, :24] = 0
            block.feed_forward.up.weight.view(2, 48, -1)[:, 24:36] = 0.1
    store.save(model, folder, tokenizer=Tokenizer.of_bytes())
    upcycle(folder, tmp_path / "moe", method="carve", experts=4, top_k=2, data=dense.parent / "a.txt")
    for layer in read_json(Lineage, tmp_path / "moe" / NAME).certificate.layers:
        assert max(layer.load) < 1.35 * sum(layer.load) / len(layer.load), layer


def test_lineage_says_from_what_it_was_made(dense: Path, tmp_path: Path) -> None:
    lineage = made(dense, tmp_path / "moe", "copy")
    assert lineage.source == "dense"
    assert lineage.upcycling["method"] == {"kind": "copy"}
    assert lineage.upcycling["spread"] == 1e-2, "what was left to its default is on record too"
    assert (lineage.threads, lineage.torch) == (torch.get_num_threads(), str(torch.__version__))
    same = made(dense, tmp_path / "again", "copy", seed=7)
    assert same.source_sha256 == lineage.source_sha256
    assert same.text_sha256 == lineage.text_sha256
    other = dataclasses.replace(LLAMA, layers=1)
    saved(other, tmp_path / "other")
    upcycle(
        tmp_path / "other", tmp_path / "b", method="copy", experts=2, top_k=1, data=dense.parent / "a.txt"
    )
    assert json.loads((tmp_path / "b" / NAME).read_text())["source_sha256"] != lineage.source_sha256


def test_a_lineage_makes_the_same_bits_again(dense: Path, tmp_path: Path) -> None:
    lineage = made(dense, tmp_path / "moe", "carve", seed=5, spread=0.1)
    asked = from_data(Upcycling, lineage.upcycling)
    run([dense], tmp_path / "again", asked, How(dense.parent / "a.txt"))
    one, two = (tmp_path / name for name in ("moe", "again"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (one / NAME).read_bytes() == (two / NAME).read_bytes()
