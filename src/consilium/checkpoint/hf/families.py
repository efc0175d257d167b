"""The families of config.json that are read and written: their keys, and what each is where a file lacks it.

Defaults are those of transformers' classes; tests/checkpoint compares key by key. Families that transformers
lacks have those of the code published beside their weights, and their sizes have no default. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from consilium.checkpoint.hf.architecture import Architecture

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """How one ``model_type`` spells a model.

    ``layout`` names its tensors; ``recipe`` is what our configuration calls it. ``defaults`` has every key
    that is read. ``only`` has the keys with values that are computed here, the one that we write first.
    ``spellings`` are other names of keys. ``code`` says that it is published with code of its own.
    """

    layout: Architecture
    class_name: str
    recipe: str
    defaults: Values
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _ONLY)
    spellings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    code: bool = False


_REQUIRED: Final = dict.fromkeys(
    ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
)
"""Sizes without a default: what is null where a size belongs is refused by its name."""
_TRUNK: Final[dict[str, Any]] = _REQUIRED | {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 1e4,
    "original_max_position_embeddings": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "quantization_config": None,
}
_ONLY: Final[Mapping[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
}
_LOCAL: Final = {"num_experts": "num_local_experts"}
_LISTED: Final = {"num_local_experts": "num_experts"}


def _sizes(vocab: int, hidden: int, layers: int, heads: int, width: int) -> dict[str, Any]:
    return dict(zip(_REQUIRED, (vocab, hidden, layers, heads, width), strict=True))


_LLAMA: Final = _TRUNK | _sizes(32000, 4096, 32, 32, 11008) | {"max_position_embeddings": 2048}
_MISTRAL: Final = {
    **_TRUNK,
    **_sizes(32000, 4096, 32, 32, 14336),
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "layer_types": None,
}
_MIXTRAL: Final = {
    **_MISTRAL,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}
_QWEN2: Final = {
    **_TRUNK,
    **_sizes(151936, 4096, 32, 32, 22016),
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN3: Final = _QWEN2 | {"head_dim": 128}
_QWEN_MOE: Final[dict[str, Any]] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "max_position_embeddings": 32768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
_QWEN2_MOE: Final = {
    **_TRUNK,
    **_sizes(151936, 2048, 24, 16, 5632),
    **_QWEN_MOE,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "qkv_bias": True,
}
_QWEN3_MOE: Final = {
    **_TRUNK,
    **_sizes(151936, 2048, 24, 32, 6144),
    **_QWEN_MOE,
    "max_window_layers": None,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
_OLMOE: Final = {
    **_TRUNK,
    **_sizes(50304, 2048, 16, 16, 2048),
    "rms_norm_eps": 1e-5,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
}
_DEEPSEEK_MOE: Final[dict[str, Any]] = {
    "moe_intermediate_size": None,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    # Training alone reads these two, in DeepSeek's code and not in transformers.
    "aux_loss_alpha": 0.0,
    "seq_aux": True,
}
_DEEPSEEK: Final = _TRUNK | _DEEPSEEK_MOE
_MLA: Final[dict[str, Any]] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_V2: Final = {
    **_TRUNK,
    **_sizes(102400, 4096, 32, 32, 11008),
    **_DEEPSEEK_MOE,
    **_MLA,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}
_V3: Final = {
    **_TRUNK,
    **_sizes(129280, 7168, 61, 128, 18432),
    **_DEEPSEEK_MOE,
    **_MLA,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "num_nextn_predict_layers": 1,
}
_GROK: Final = {
    **_TRUNK,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "num_experts": None,
    "num_experts_per_tok": 2,
    "attn_output_multiplier": None,
    "max_attn_value": 30.0,
    "embedding_multiplier_scale": 1.0,
    "output_multiplier_scale": 1.0,
    "router_aux_loss_coef": 0.0,
}
_SKYWORK: Final = {
    **_TRUNK,
    "num_local_experts": None,
    "num_experts_per_tok": 2,
    "moe_use_logits_norm": True,
    "moe_gate_norm_std": 1.0,
    "moe_use_mixtral_gating": False,
    "moe_feature_no_mul_topk": True,
}
_LLAMA_MOE: Final = {
    **_TRUNK,
    "num_experts": None,
    "num_selects": None,
    "size_experts": None,
    "gate_network": "mlp",
    "gate_use_balance": True,
    "gate_balance_loss_weight": 1e-2,
    "gate_add_noise": True,
    "gate_noise_epsilon": 1e-2,
    "score_scale_factor": 1.0,
}
_DEEPSEEK_ONLY: Final = {**_ONLY, "moe_layer_freq": (1,), "scoring_func": ("softmax",)}
# Its own code and transformers disagree on V2 with normalised weights; no published model has them.
_V2_ONLY: Final = {**_DEEPSEEK_ONLY, "norm_topk_prob": (False,), "rope_interleave": (True,)}
# Readers that know several DeepSeek models fall back to softmax without these two.
_V3_ONLY: Final = {**_DEEPSEEK_ONLY, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
_V2_SPELLINGS: Final = {"num_experts": "n_routed_experts"}
_V3_SPELLINGS: Final = {
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}
_GROK_ONLY: Final = {
    **_ONLY,
    "hidden_act": ("gelu_pytorch_tanh", "gelu", "gelu_new"),
    "residual_moe": (False,),
    "moe_intermediate_size": (None,),
    "final_logit_softcapping": (None,),
}
_GROK_SPELLINGS: Final = {**_LISTED, "attn_logit_softcapping": "max_attn_value"}
_SKYWORK_ONLY: Final = {
    **_ONLY,
    "moe_expert_interval": (1,),
    "moe_2layer_gate": (False,),
    "moe_use_skywork_gating": (False,),
}
_LLAMA_MOE_ONLY: Final = {
    **_ONLY,
    "gate_type": ("TopKBalancedNoisyGate",),
    "calculator_type": ("UniversalCalculator",),
    "gate_use_softmax": (True,),
    "multiply_gate_scores": (True,),
    "add_weight_norm": (False,),
}
_OLMOE_ONLY: Final = {**_ONLY, "clip_qkv": (None,)}

FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family("llama", "LlamaForCausalLM", "llama", _LLAMA),
    "mistral": Family("mistral", "MistralForCausalLM", "llama", _MISTRAL),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", "qwen2", _QWEN2),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", "qwen3", _QWEN3),
    "mixtral": Family("mixtral", "MixtralForCausalLM", "mixtral", _MIXTRAL, spellings=_LOCAL),
    "qwen2_moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", "qwen-moe", _QWEN2_MOE, spellings=_LISTED),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3-moe", _QWEN3_MOE, spellings=_LISTED),
    "olmoe": Family("olmoe", "OlmoeForCausalLM", "olmoe", _OLMOE, _OLMOE_ONLY, _LISTED),
    "deepseek": Family(
        "deepseek", "DeepseekForCausalLM", "deepseek-moe", _DEEPSEEK, _DEEPSEEK_ONLY, code=True
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "deepseek-v2",
        _V2,
        _V2_ONLY,
        _V2_SPELLINGS,
        code=True,
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "deepseek-v3",
        _V3,
        _V3_ONLY,
        _V3_SPELLINGS,
        code=True,
    ),
    "grok-1": Family(
        "grok-1", "Grok1ModelForCausalLM", "grok-1", _GROK, _GROK_ONLY, _GROK_SPELLINGS, code=True
    ),
    "grok": Family("grok-1", "GrokForCausalLM", "grok-1", _GROK, _GROK_ONLY, _GROK_SPELLINGS, code=True),
    "skywork_moe": Family(
        "skywork_moe", "SkyworkMoeForCausalLM", "skywork-moe", _SKYWORK, _SKYWORK_ONLY, _LOCAL, code=True
    ),
    "llama_moe": Family(
        "llama_moe", "LlamaMoEForCausalLM", "llama-moe", _LLAMA_MOE, _LLAMA_MOE_ONLY, code=True
    ),
}
"""By ``model_type``."""
