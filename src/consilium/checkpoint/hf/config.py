"""config.json in the keys of Hugging Face and back, without torch.

A configuration is written under the architecture that computes exactly what ours does, whatever its family
is called. The key ``consilium`` beside it holds our own, so that our reload loses nothing. Systems that no
published code computes get ``model_type: consilium``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from consilium.checkpoint.hf.architecture import CLASSES, architecture
from consilium.checkpoint.hf.generation import token_keys
from consilium.checkpoint.hf.read import from_hugging_face
from consilium.checkpoint.hf.write import network
from consilium.checkpoint.json_file import read_object
from consilium.config.attention import GQA, MLA, Attention, Rope, Unscaled, Yarn
from consilium.config.generation import GenerationDefaults
from consilium.config.io import from_data, to_data
from consilium.config.model import FanIn, Model, Normal
from consilium.errors import ConsiliumError

OWN: Final = "consilium"
NAME: Final = "config.json"


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


def to_hugging_face(
    config: Model, *, dtype: str, generation: GenerationDefaults = GenerationDefaults()
) -> dict[str, Any]:
    """Return the contents of config.json; ``dtype`` is that of the matrices."""
    found = architecture(config)
    named: dict[str, Any] = {"architectures": ["ConsiliumForCausalLM"], "model_type": OWN}
    shared = _shared(config, dtype) | token_keys(generation)
    if found is not None:
        named = {"architectures": [CLASSES[found]], "model_type": found}
        shared |= _attention(config.attention) | network(config, found)
    return named | shared | {OWN: to_data(config)}


def _shared(config: Model, dtype: str) -> dict[str, Any]:
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
