"""The numbers of every published size once more, as releases and papers print them.

A shape that is wrong changes a count and is found there; a rotary base, an epsilon or a factor is found here.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from consilium.checkpoint.hf.config import to_hugging_face
from consilium.config import io
from consilium.recipes import catalogue
from consilium.recipes.catalogue import recipe

YARN_V2 = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
YARN_V2 |= {"mscale": 0.707, "mscale_all_dim": 0.707}
YARN_V3 = YARN_V2 | {"mscale": 1.0, "mscale_all_dim": 1.0}
V2 = {"vocab_size": 102400, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
V2 |= {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V2 |= {"rope_scaling": YARN_V2, "first_k_dense_replace": 1, "norm_topk_prob": False, "n_shared_experts": 2}
V2 |= {"scoring_func": "softmax", "tie_word_embeddings": False, "num_experts_per_tok": 6}
MIXTRAL = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "num_local_experts": 8}
MIXTRAL |= {"vocab_size": 32000, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
QWEN = {"vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 128}
QWEN |= {"tie_word_embeddings": False, "router_aux_loss_coef": 0.001}
QWEN2 = QWEN | {"norm_topk_prob": False, "qkv_bias": True}
QWEN3 = QWEN | {
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "num_key_value_heads": 4,
}
LLAMA_MOE = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32000}
LLAMA_MOE |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "gate_network": "mlp", "gate_noise_epsilon": 0.01}
LLAMA_MOE |= {"gate_balance_loss_weight": 0.01, "num_attention_heads": 32}

CONFIG_JSON: dict[str, dict[str, Any]] = {
    "mixtral:8x7b": MIXTRAL
    | {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32}
    | {"max_position_embeddings": 32768, "router_aux_loss_coef": 0.02},
    "mixtral:8x22b": MIXTRAL
    | {"hidden_size": 6144, "num_hidden_layers": 56, "intermediate_size": 16384, "num_attention_heads": 48}
    | {"max_position_embeddings": 65536},
    "llama-moe:3.0b-2-16": LLAMA_MOE | {"num_experts": 16, "num_selects": 2, "score_scale_factor": 8.0},
    "llama-moe:3.5b-4-16": LLAMA_MOE | {"num_experts": 16, "num_selects": 4, "score_scale_factor": 4.0},
    "llama-moe:3.5b-2-8": LLAMA_MOE | {"num_experts": 8, "num_selects": 2, "score_scale_factor": 4.0},
    "deepseek-moe:16b": {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "deepseek-v2:236b": V2
    | {"hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "q_lora_rank": 1536}
    | {"intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160}
    | {"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    "deepseek-v2:lite": V2
    | {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None}
    | {"intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64}
    | {"topk_method": "greedy", "routed_scaling_factor": 1.0, "aux_loss_alpha": 0.001},
    "deepseek-v3:671b": V2
    | {"vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128}
    | {"q_lora_rank": 1536, "intermediate_size": 18432, "moe_intermediate_size": 2048}
    | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3}
    | {"n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    | {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1}
    | {"rope_scaling": YARN_V3},
    "qwen-moe:a2.7b": QWEN2
    | {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
    | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}
    | {"shared_expert_intermediate_size": 5632},
    "qwen-moe:57b": QWEN2
    | {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560}
    | {"shared_expert_intermediate_size": 20480},
    "qwen3-moe:30b": QWEN3
    | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768},
    "qwen3-moe:235b": QWEN3
    | {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64}
    | {"moe_intermediate_size": 1536},
    "olmoe:7b": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "grok-1:314b": {
        "vocab_size": 131072,
        "hidden_size": 6144,
        "num_hidden_layers": 64,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 32768,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "attn_output_multiplier": 0.08838834764831845,
        "max_attn_value": 30.0,
        "embedding_multiplier_scale": 78.38367176906169,
        "output_multiplier_scale": 0.5773502691896257,
        "tie_word_embeddings": True,
    },
    "skywork-moe:146b": {
        "vocab_size": 65532,
        "hidden_size": 4608,
        "num_hidden_layers": 52,
        "num_attention_heads": 36,
        "num_key_value_heads": 36,
        "intermediate_size": 12288,
        "num_experts_per_tok": 2,
        "moe_use_logits_norm": True,
        "moe_gate_norm_std": 1.0,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "qwen2:7b": {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "vocab_size": 152064, "num_key_value_heads": 4},
    "qwen2:0.5b": {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "vocab_size": 151936, "hidden_size": 896},
    "qwen2:72b": {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "hidden_size": 8192},
    "qwen3:8b": {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 128, "hidden_size": 4096},
    "qwen3:32b": {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 128, "num_key_value_heads": 8},
    "llama:7b": {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "hidden_size": 4096, "intermediate_size": 11008},
    "llama:70b": {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "hidden_size": 8192, "num_key_value_heads": 8},
}
"""What the ``config.json`` of each release says; ``initializer_range`` is a default there, see below."""

LOSS = "moe.balance.losses"
TRAINED: dict[str, dict[str, Any]] = {
    "shazeer:256": {f"{LOSS}.0.coefficient": 0.1, f"{LOSS}.1.coefficient": 0.1, "moe.router.select.k": 4},
    "shazeer:1024-h": {"moe.router.select.groups": 16, "moe.router.select.keep": 2, "moe.router.select.k": 2},
    "gshard:600b": {"layers": 36, "moe.experts": 2048, "moe_every": 2, f"{LOSS}.0.coefficient": 0.01},
    "gshard:37b": {"layers": 36, "moe.experts": 128, "moe.admission.factor": 1.0},
    "switch:c": {"moe.experts": 2048, f"{LOSS}.0.coefficient": 0.01, "moe.router.noise.epsilon": 0.01},
    "switch:xxl": {"moe.experts": 128, "moe_every": 2, "init.scale": 0.1, "moe.activation": "geglu"},
    "deepseek-moe:2b": {f"{LOSS}.0.coefficient": 0.01, "init.std": 0.006},
    "deepseek-moe:145b": {
        f"{LOSS}.0.coefficient": 0.003,
        f"{LOSS}.1.coefficient": 0.05,
        f"{LOSS}.1.devices": 4,
    },
    "deepseek-v2:236b": {f"{LOSS}.0.coefficient": 0.003, "init.std": 0.006, "moe.admission.exempt": 0.1}
    | {
        f"{LOSS}.1.coefficient": 0.05,
        f"{LOSS}.1.devices": 8,
        f"{LOSS}.2.coefficient": 0.02,
        f"{LOSS}.2.most": 3,
    },
    "deepseek-v2:236b-paper": {"moe.router.scale": 1.0, f"{LOSS}.0.coefficient": 0.003},
    "deepseek-v3:671b": {"moe.balance.bias.rate": 0.001, f"{LOSS}.0.coefficient": 1e-4, "mtp.weight": 0.3}
    | {"init.std": 0.006, f"{LOSS}.0.counts": "routed"},
    "deepseek-v3:671b-paper": {"moe.router.scale": 1.0, f"{LOSS}.0.counts": "scores"}
    | {"moe.balance.bias.rate": 0.001, f"{LOSS}.0.coefficient": 1e-4, "moe.balance.bias_until": 14.3 / 14.8},
    "qwen3-moe:235b": {f"{LOSS}.0.scope": "global", "attention.qk_norm": "head"},
    "olmoe:7b": {f"{LOSS}.1.kind": "z", f"{LOSS}.1.coefficient": 0.001, "attention.qk_norm": "full"},
    "nemotron-moe:e8g8t8": {"attention.rope.fraction": 0.5, f"{LOSS}.0.coefficient": 0.01, "moe.experts": 64},
    "nemotron-moe:e8g1t2": {"moe.activation": "squared_relu", "moe.experts": 8, "moe.router.select.k": 2},
    "latent-moe:super": {"moe.latent": 1024, "moe.router.scale": 5.0, "moe.router.select.k": 22}
    | {"moe.experts": 512, f"{LOSS}.0.coefficient": 1e-4},
    "grok-1:314b": {"norms": "around", "moe.router.weight.kind": "raw", "moe.activation": "geglu"},
    "skywork-moe:146b": {
        "moe.router.transforms.0.scale": 1.0,
        f"{LOSS}.0.momentum": 0.99,
        f"{LOSS}.0.most": 0.01,
    }
    | {f"{LOSS}.0.slope": 0.2, "moe.router.projection.bias": False},
    "skywork-moe:146b-paper": {"moe.router.projection.bias": True, "moe.router.select.k": 2},
    "expert-choice:8b-64e": {"moe.router.select.factor": 2.0, "moe.experts": 64},
    "hash:2b": {"moe.router.projection.kind": "none", "moe.router.weight.kind": "uniform"},
}
"""What the papers say that no ``config.json`` holds."""


@pytest.mark.parametrize("name", CONFIG_JSON)
def test_a_release_says_the_same_numbers(name: str) -> None:
    written = to_hugging_face(recipe(name), dtype="bfloat16")
    wanted = dict(CONFIG_JSON[name])
    scaling = wanted.pop("rope_scaling", None)
    assert {key: written[key] for key in wanted} == wanted
    if scaling is not None:
        assert {key: written["rope_scaling"][key] for key in scaling} == scaling


@pytest.mark.parametrize("name", TRAINED)
def test_a_paper_says_the_same_numbers(name: str) -> None:
    data = io.to_data(recipe(name))
    assert {key: at(data, key) for key in TRAINED[name]} == TRAINED[name]


def test_groks_multipliers_are_roots() -> None:
    model = recipe("grok-1")
    assert model.embedding_scale == pytest.approx(math.sqrt(6144), rel=1e-12)
    assert model.logit_scale == pytest.approx(1 / math.sqrt(3), rel=1e-12)


def test_every_system_with_experts_has_its_numbers_here() -> None:
    named = {name.partition(":")[0] for name in (*CONFIG_JSON, *TRAINED)}
    assert named | {"jacobs", "dense-moe"} == set(catalogue.names())


def at(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data[int(part)] if part.isdecimal() else data[part]
    return data
