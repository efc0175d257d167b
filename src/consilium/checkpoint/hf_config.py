"""config.json in the keys of Hugging Face and back, without torch.

A configuration is written under the architecture that computes exactly what ours does, whatever its family
is called. The key ``consilium`` beside it holds our own, so that our reload loses nothing. Systems that
transformers lacks get ``model_type: consilium``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from consilium.checkpoint.hf_architecture import Architecture, architecture
from consilium.checkpoint.hf_read import from_hugging_face
from consilium.checkpoint.json_file import read_object
from consilium.config.attention import GQA, MLA, Attention, Rope, Unscaled, Yarn
from consilium.config.balance import SequenceLoss, SwitchLoss
from consilium.config.io import from_data, to_data
from consilium.config.model import FanIn, Model, Normal
from consilium.config.moe import MoE
from consilium.config.router import Normalised, TopK
from consilium.errors import ConsiliumError

OWN: Final = "consilium"
NAME: Final = "config.json"
_CLASSES: Final[dict[Architecture, str]] = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def config_from_folder(folder: Path) -> Model:
    """Read the model of ``folder``: our own key where present, otherwise the keys of a known architecture.

    Raises ConsiliumError for an unknown architecture, an option that we do not compute, or contradicting
    keys.
    """
    path = folder / NAME
    data = read_object(path)
    if OWN not in data:
        return from_hugging_face(data, path)
    config = from_data(Model, data[OWN], where=f"{path}: {OWN}")
    for key, value in to_hugging_face(config, dtype="float32").items():
        if type(value) in (int, bool) and key in data and data[key] != value:
            raise ConsiliumError(
                f"{path}: {key} is {data[key]}, but the key {OWN!r} beside it says {value};"
                f" change both, or remove {OWN!r} to go by the other keys."
            )
    return config


def to_hugging_face(config: Model, *, dtype: str, end_of_text: int | None = None) -> dict[str, Any]:
    """Return the contents of config.json; ``dtype`` is that of the matrices, ``end_of_text`` a token id."""
    found = architecture(config)
    shared = _shared(config, dtype, end_of_text)
    match found:
        case None:
            specific: dict[str, Any] = {"architectures": ["ConsiliumForCausalLM"], "model_type": OWN}
        case "llama" | "mixtral" | "deepseek_v2" | "deepseek_v3":
            specific = {"architectures": [_CLASSES[found]], "model_type": found}
            specific |= _attention(config.attention) | _feed_forward(config, found)
    return specific | shared | {OWN: to_data(config)}


def generation_config(end_of_text: int | None) -> dict[str, Any]:
    """Return the contents of generation_config.json."""
    tokens = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return {"_from_model_config": True, **{key: value for key, value in tokens.items() if value is not None}}


def _shared(config: Model, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    match config.init:
        case Normal(std=std):
            spread = std
        case FanIn(scale=scale):
            spread = (scale / config.hidden_size) ** 0.5
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "initializer_range": spread,
        "hidden_act": "silu",
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        # Readers before and after transformers 5 look for different spellings; each finds its own.
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _attention(attention: Attention) -> dict[str, Any]:
    shared = {"num_attention_heads": attention.heads, "attention_bias": False, "attention_dropout": 0.0}
    match attention:
        case GQA() as gqa:
            specific: dict[str, Any] = {"num_key_value_heads": gqa.kv_heads, "head_dim": gqa.head_dim}
        case MLA() as mla:
            specific = {
                "num_key_value_heads": mla.heads,
                "q_lora_rank": mla.q_rank,
                "kv_lora_rank": mla.kv_rank,
                "qk_nope_head_dim": mla.nope_dim,
                "qk_rope_head_dim": mla.rope_dim,
                "v_head_dim": mla.v_dim,
                "rope_interleave": mla.rope.interleaved,
            }
    return shared | specific | _rope(attention.rope)


def _rope(rope: Rope) -> dict[str, Any]:
    match rope.scaling:
        case Unscaled():
            scaling: dict[str, Any] | None = None
            kind: dict[str, Any] = {"rope_type": "default"}
        case Yarn() as yarn:
            kind = {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_length,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "mscale": yarn.mscale,
                "mscale_all_dim": yarn.mscale_all_dim,
            }
            # transformers ignores mscale unless both are set; this key then says what it would have said.
            kind |= {} if yarn.mscale_all_dim and yarn.mscale else {"attention_factor": yarn.rotation_scale}
            scaling = {"type": "yarn", **kind}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": rope.theta, **kind},
    }


def _feed_forward(config: Model, found: Architecture) -> dict[str, Any]:
    dense = config.dense.width if config.dense is not None else None
    if config.moe is None:
        return {"intermediate_size": dense, "mlp_bias": False}
    if found == "mixtral":
        return _mixtral(config.moe)
    return {"intermediate_size": dense or config.moe.width, **_deepseek(config, config.moe, found)}


def _mixtral(moe: MoE) -> dict[str, Any]:
    coefficients = [loss.coefficient for loss in moe.balance.losses if isinstance(loss, SwitchLoss)]
    return {
        "intermediate_size": moe.width,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.most_active,
        "router_aux_loss_coef": sum(coefficients, start=0.0),
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "sliding_window": None,
    }


def _deepseek(config: Model, moe: MoE, found: Architecture) -> dict[str, Any]:
    assert isinstance(moe.router.select, TopK)
    groups = moe.router.select.groups
    coefficients = [loss.coefficient for loss in moe.balance.losses if isinstance(loss, SequenceLoss)]
    keys: dict[str, Any] = {
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared_width // moe.width,
        "num_experts_per_tok": moe.most_active,
        "moe_intermediate_size": moe.width,
        "first_k_dense_replace": config.dense_first,
        "moe_layer_freq": 1,
        "n_group": groups.count if groups else 1,
        "topk_group": groups.keep if groups else 1,
        "norm_topk_prob": isinstance(moe.router.weight, Normalised),
        "routed_scaling_factor": moe.router.scale,
        "aux_loss_alpha": sum(coefficients, start=0.0),
        "seq_aux": True,
    }
    if found == "deepseek_v3":
        # Without these two, readers that know several DeepSeek models fall back to softmax.
        keys |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        return keys | {"num_nextn_predict_layers": config.mtp.depth}
    return keys | {"scoring_func": "softmax", "topk_method": "group_limited_greedy" if groups else "greedy"}
