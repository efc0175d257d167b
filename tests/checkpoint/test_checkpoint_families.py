"""Foreign configurations are read whole, as transformers reads them, or refused by the name of the key."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checkpoint.keys import folder_with
from consilium.checkpoint import store
from consilium.checkpoint.hf.config import config_from_folder
from consilium.checkpoint.hf.families import FAMILIES
from consilium.checkpoint.hf.read import from_hugging_face
from consilium.config.attention import GQA
from consilium.errors import ConsiliumError
from support import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")
NATIVE = [name for name in FAMILIES if name in transformers.CONFIG_MAPPING]
TOLERANCE = 1e-5
COMPUTED = {"head_dim", "num_key_value_heads", "layer_types", "mlp_only_layers", "rope_parameters"}
"""Keys for which transformers puts a value in the place of null."""
ELSEWHERE = {
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "quantization_config",
    "aux_loss_alpha",
    "seq_aux",
    "head_dim",
    "layer_types",
    "max_window_layers",
}
"""Keys that not every class has as a field: older spellings, and what DeepSeek's own code reads."""


def theirs_by_default(kind: str) -> Any:
    return transformers.CONFIG_MAPPING[kind]()


@pytest.mark.parametrize("kind", NATIVE)
def test_every_default_is_that_of_transformers(kind: str) -> None:
    theirs = theirs_by_default(kind)
    described = theirs.to_dict()
    lacking = set()
    for key, default in FAMILIES[kind].defaults.items():
        names = [key, *(other for other, known in FAMILIES[kind].spellings.items() if known == key)]
        found = next((described[name] for name in names if name in described), lacking)
        if found is lacking:
            assert key in ELSEWHERE, key
        elif key == "sliding_window" and "use_sliding_window" in described:
            assert not described["use_sliding_window"]
        else:
            assert default == found or (default is None and key in COMPUTED), key
    assert FAMILIES[kind].defaults["rope_theta"] == described["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("kind", [kind for kind in NATIVE if kind != "deepseek_v2"])
def test_a_file_that_says_its_family_only_is_the_model_of_transformers(kind: str) -> None:
    """The other one has no number of experts there."""
    ours, theirs = from_hugging_face({"model_type": kind}, Path("config.json")), theirs_by_default(kind)
    assert (ours.vocab_size, ours.layers) == (theirs.vocab_size, theirs.num_hidden_layers)
    if isinstance(ours.attention, GQA):
        assert ours.attention.kv_heads == theirs.num_key_value_heads
        size = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert ours.attention.head_dim == size
        assert ours.attention.window == (4096 if kind == "mistral" else None)


SMALL: Mapping[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROUTED: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": None},
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "mixtral": {**SMALL, "num_local_experts": 4, "head_dim": 4},
    "qwen2_moe": {**SMALL, **ROUTED, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {**SMALL, **ROUTED},
    "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**SMALL, **LATENT},
    "deepseek_v3": {**SMALL, **LATENT},
}
GONE = "absent"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ANYWHERE: tuple[Mapping[str, Any], ...] = (
    {},
    {"rms_norm_eps": 1e-5},
    {"rms_norm_eps": GONE},
    {"rope_theta": 500.0, "rope_parameters": GONE},
    {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    {"rope_parameters": GONE},
    {"rope_parameters": None},
    {"rope_scaling": YARN},
    {"rope_scaling": YARN, "rope_theta": 500.0},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 8.0, "beta_slow": 2.0}},
    {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    {"rope_scaling": {**YARN, "mscale_all_dim": 0.5}},
    {"rope_scaling": {**YARN, "truncate": False}},
    {"rope_scaling": {**YARN, "truncate": None}},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {"rope_scaling": {**YARN, "factor": 0.5}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 8},
    {"rope_scaling": {}},
    {"partial_rotary_factor": 0.5},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"head_dim": 6},
    {"tie_word_embeddings": True},
    {"hidden_act": "gelu"},
    {"hidden_act": "swish"},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"sliding_window": 4},
    {"sliding_window": 64},
    {"use_sliding_window": True, "sliding_window": 4},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": GONE},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None},
    {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    {"sliding_window": 4, "layer_types": ["sliding_attention", "sliding_attention"], "head_dim": 4},
    {"first_k_dense_replace": 0},
    {"scale_factor": 2.0},
    {"embedding_multiplier": 12.0},
    {"my_note": "harmless", "my_number": 7, "unsloth_fixed": True, "pretraining_tp": 2},
)
MOE: tuple[Mapping[str, Any], ...] = (
    {"norm_topk_prob": None},
    {"norm_topk_prob": GONE},
    {"norm_topk_prob": True},
    {"norm_topk_prob": False},
    {"num_experts_per_tok": 1},
    {"mlp_only_layers": [0]},
    {"mlp_only_layers": [0, 1]},
    {"mlp_only_layers": [1]},
    {"decoder_sparse_step": 2},
    {"decoder_sparse_step": 3},
    {"clip_qkv": 0.5},
    {"qkv_bias": False},
)
DEEPSEEK: tuple[Mapping[str, Any], ...] = (
    {"first_k_dense_replace": 2},
    {"first_k_dense_replace": 9},
    {"first_k_dense_replace": None},
    {"first_k_dense_replace": GONE},
    {"q_lora_rank": 12},
    {"n_group": 1, "topk_group": 1},
    {"n_group": None},
    {"topk_group": 2},
    {"n_group": 4},
    {"topk_method": "group_limited_greedy"},
    {"topk_method": "greedy"},
    {"routed_scaling_factor": 1.5},
    {"routed_scaling_factor": GONE},
    {"n_shared_experts": 2},
    {"n_shared_experts": 0},
    {"rope_interleave": False},
    {"rope_interleave": None},
    {"rope_interleave": GONE},
    {"scoring_func": "softmax"},
    {"scoring_func": "sigmoid"},
    {"moe_layer_freq": 2},
    {"num_nextn_predict_layers": 0},
)
CASES = [
    (kind, change)
    for kind in NATIVE
    for change in (
        *ANYWHERE,
        *(MOE if kind not in {"llama", "mistral", "qwen2", "qwen3"} else ()),
        *(DEEPSEEK if kind.startswith("deepseek") else ()),
    )
]


def theirs(folder: Path) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, experts_implementation="eager"
        ).eval()


def drawn(config: Any) -> Any:
    """A model of theirs with random values everywhere."""
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not name.endswith("inv_freq"):
                values = torch.randn(tensor.shape, generator=generator)
                wide = values / max(tensor.shape[-1:], default=1) ** 0.5
                tensor.copy_(wide if tensor.ndim > 1 else 1 + 0.2 * values)
    return model


def perturbed(kind: str, change: Mapping[str, Any]) -> dict[str, Any]:
    config = transformers.CONFIG_MAPPING[kind](**SIZES[kind])
    keys = {**json.loads(config.to_json_string(use_diff=False)), **change}
    absent = {key for key, value in keys.items() if value == GONE} | {"head_dim"} - SIZES[
        kind
    ].keys() - change.keys()
    # Their constructors write into the dictionaries that they are given.
    return copy.deepcopy({key: value for key, value in keys.items() if key not in absent})


IDS = torch.randint(40, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "change"), CASES[::5], ids=lambda value: str(value)[:80])
def test_one_key_is_read_as_transformers_reads_it_or_refused_by_name(
    kind: str, change: Mapping[str, Any], tmp_path: Path
) -> None:
    assert_read_or_refused(kind, change, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "change"), CASES, ids=lambda value: str(value)[:80])
def test_every_key_is_read_as_transformers_reads_it_or_refused_by_name(
    kind: str, change: Mapping[str, Any], tmp_path: Path
) -> None:
    assert_read_or_refused(kind, change, tmp_path)


@torch.no_grad()
def assert_read_or_refused(kind: str, change: Mapping[str, Any], tmp_path: Path) -> None:
    keys = perturbed(kind, change)
    folder = folder_with(keys, tmp_path)
    try:
        config_from_folder(folder)
    except ConsiliumError as error:
        said = str(error)
        names = {*change, *(inner for value in change.values() if isinstance(value, dict) for inner in value)}
        assert any(name in said for name in names), said
        return
    expected = None
    # What transformers cannot read or run has no right answer: some nulls, and sizes that it ignores.
    unanswered = Exception if None in change.values() or "head_dim" in change else ()
    with contextlib.suppress(unanswered):
        drawn(transformers.CONFIG_MAPPING[kind].from_dict(keys)).save_pretrained(folder)
        folder_with(keys, folder)
        expected = theirs(folder)(IDS).logits
    assert expected is None or relative_error(store.load(folder)(IDS).logits, expected) < TOLERANCE


@pytest.mark.parametrize("kind", NATIVE)
@torch.no_grad()
def test_a_family_is_kept_in_a_copy(kind: str, tmp_path: Path) -> None:
    drawn(transformers.CONFIG_MAPPING[kind].from_dict(perturbed(kind, {}))).save_pretrained(tmp_path / "a")
    store.save(store.load(tmp_path / "a"), tmp_path / "b")
    expected, actual = theirs(tmp_path / "a")(IDS).logits, theirs(tmp_path / "b")(IDS).logits
    assert relative_error(actual, expected) < TOLERANCE


def refusal(keys: Mapping[str, Any], folder: Path) -> str:
    with pytest.raises(ConsiliumError) as caught:
        config_from_folder(folder_with(keys, folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


FOREIGN = [
    "glm4_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "gpt_oss",
    "kimi_k2",
    "jamba",
    "phimoe",
    "dbrx",
    "minimax",
    "minimax_m2",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "granitemoe",
    "deepseek_v32",
    "llama4",
    "mistral3",
    "olmo",
    "mllama",
]


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_known_foreign_family_is_called_that(kind: str, tmp_path: Path) -> None:
    assert f"{kind} is a known family that is not computed here" in refusal({"model_type": kind}, tmp_path)


def test_no_family_of_transformers_is_called_a_slip_of_the_pen(tmp_path: Path) -> None:
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind not in FAMILIES:
            assert "Did you mean" not in refusal({"model_type": kind}, tmp_path), kind


@pytest.mark.parametrize(
    ("kind", "meant"),
    [
        ("mixtrall", "mixtral"),
        ("Mixtral", "mixtral"),
        ("qwen3moe", "qwen3_moe"),
        ("deepseek-v3", "deepseek_v3"),
        ("misrtal", "mistral"),
        ("qwen4_moe", None),
        ("deepseek_v5", None),
        ("mystery", None),
        ("", None),
    ],
)
def test_a_hint_is_for_what_is_nearly_the_word(kind: str, meant: str | None, tmp_path: Path) -> None:
    hint = re.findall(r"Did you mean '(.*)'\?", refusal({"model_type": kind}, tmp_path))
    assert hint == ([] if meant is None else [meant])


def test_code_of_its_own_is_refused_where_the_family_needs_none(tmp_path: Path) -> None:
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_mixtral.MixtralForCausalLM"}}
    assert "auto_map" in refusal(perturbed("mixtral", code), tmp_path)
    theirs = {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}
    config_from_folder(folder_with(perturbed("deepseek_v3", theirs), tmp_path))
    other = {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3Sparse"}}
    assert "auto_map" in refusal(perturbed("deepseek_v3", other), tmp_path)


def test_two_spellings_that_differ_are_refused(tmp_path: Path) -> None:
    keys = perturbed("mixtral", {"num_local_experts": 4, "num_experts": 8})
    assert "num_experts is 8 and num_local_experts 4" in refusal(keys, tmp_path)
