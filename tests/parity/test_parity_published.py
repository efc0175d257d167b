"""Weights that transformers lacks, in the layout of the code published beside them.

They are read, answer as their single-file reference answers, and are written under the same names and keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium.checkpoint import safetensors_io, store
from consilium.checkpoint.hf.config import config_from_folder
from consilium.errors import ConsiliumError
from parity.published import HEAD_DIM, LAYERS, PUBLISHED, VOCABULARY
from parity.theirs import some_ids
from support import relative_error

NOT_WRITTEN_AGAIN = {"lm_head.weight"}
"""A head that repeats the embedding."""
SPELT_DIFFERENTLY = {
    "grok": {"model_type", "architectures", "hidden_act"},
    "llama_moe": {"size_experts", "score_scale_factor"},
}
"""Keys that a layout has in a form which we read and write in another."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_folder_answers_as_its_reference(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]()
    model = store.load(published.write(tmp_path)).eval()
    ids_T = some_ids(1, 40, vocabulary=VOCABULARY)[0]
    with torch.no_grad():
        actual_TV = model(ids_T[None]).logits[0]
    assert relative_error(actual_TV, published.logits(ids_T)) < 1e-5


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "grok"])
def test_it_is_written_again_tensor_by_tensor_under_its_own_names(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]()
    (tmp_path / "theirs").mkdir()
    store.save(store.load(published.write(tmp_path / "theirs")), tmp_path / "ours")
    actual = safetensors_io.read(tmp_path / "ours" / "model.safetensors")
    tied = published.keys["tie_word_embeddings"]
    expected = {k: v for k, v in published.tensors.items() if not (tied and k in NOT_WRITTEN_AGAIN)}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_the_second_layout_of_grok_is_written_in_the_first(tmp_path: Path) -> None:
    published = PUBLISHED["grok"]()
    (tmp_path / "theirs").mkdir()
    store.save(store.load(published.write(tmp_path / "theirs")), tmp_path / "ours")
    actual = safetensors_io.read(tmp_path / "ours" / "model.safetensors")
    assert actual.keys() == PUBLISHED["grok-1"]().tensors.keys() - NOT_WRITTEN_AGAIN
    layer = "transformer.decoder_layer.1"
    query = published.tensors[f"{layer}.multi_head_attention.query.weight"]
    assert torch.equal(actual["model.layers.1.attn.q_proj.weight"], query)
    assert torch.equal(
        actual["model.layers.1.post_moe_norm.scale"], published.tensors[f"{layer}.rms_norm_3.weight"]
    )
    assert torch.equal(
        actual["model.layers.1.moe_block.experts.5.linear_1.weight"],
        published.tensors[f"{layer}.moe.5.linear_1.weight"],
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_key_is_written_again(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]()
    (tmp_path / "theirs").mkdir()
    store.save(store.load(published.write(tmp_path / "theirs")), tmp_path / "ours")
    written: dict[str, Any] = json.loads((tmp_path / "ours" / "config.json").read_text())
    same = published.keys.keys() - SPELT_DIFFERENTLY.get(name, set())
    wrong = {key: (written.get(key), published.keys[key]) for key in same}
    wrong = {key: pair for key, pair in wrong.items() if pair[0] != pytest.approx(pair[1])}
    assert not wrong


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_we_wrote_reads_as_the_same_model(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "foreign").mkdir()
    first = config_from_folder(published.write(tmp_path / "theirs"))
    store.save(store.load(tmp_path / "theirs"), tmp_path / "ours")
    keys = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config_from_folder(tmp_path / "ours") == first
    del keys["consilium"]
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(keys))
    assert config_from_folder(tmp_path / "foreign") == first


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deepseek", {"scoring_func": "sigmoid"}),
        ("deepseek", {"moe_layer_freq": 2}),
        ("deepseek", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("grok-1", {"hidden_act": "silu"}),
        ("grok-1", {"residual_moe": True}),
        ("grok-1", {"moe_intermediate_size": 16}),
        ("grok-1", {"final_logit_softcapping": 50.0}),
        ("skywork_moe", {"moe_2layer_gate": True}),
        ("skywork_moe", {"moe_use_skywork_gating": True}),
        ("skywork_moe", {"moe_expert_interval": 2}),
        ("skywork_moe", {"moe_feature_no_mul_topk": False}),
        ("llama_moe", {"gate_type": "SwitchBalancedGate"}),
        ("llama_moe", {"calculator_type": "SwitchDropTokenCalculator"}),
        ("llama_moe", {"gate_use_softmax": False}),
        ("llama_moe", {"multiply_gate_scores": False}),
        ("llama_moe", {"add_weight_norm": True}),
        ("llama_moe", {"size_experts": [[4, 16, 10, 10, 10, 10]] * LAYERS}),
        ("llama_moe", {"score_scale_factor": [3.0, 4.0]}),
    ],
)
def test_an_option_that_we_do_not_compute_is_refused_by_name(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(PUBLISHED[name]().keys) | change))
    with pytest.raises(ConsiliumError, match=r"config\.json: \w+ .* is not computed here"):
        config_from_folder(tmp_path)


def test_a_head_that_repeats_the_embedding_is_neither_needed_nor_a_fault(tmp_path: Path) -> None:
    published = PUBLISHED["grok-1"]()
    (tmp_path / "config.json").write_text(json.dumps(dict(published.keys)))
    tensors = {key: value for key, value in published.tensors.items() if key != "lm_head.weight"}
    safetensors_io.write(tmp_path / "model.safetensors", tensors)
    assert store.load(tmp_path).config.tied


def test_the_softmax_scale_of_grok_is_read_from_its_multiplier(tmp_path: Path) -> None:
    keys = dict(PUBLISHED["grok-1"]().keys) | {"attn_output_multiplier": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert config_from_folder(tmp_path).attention.softmax_scale == 0.25 != HEAD_DIM**-0.5
