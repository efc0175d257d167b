"""Small models of transformers with real values everywhere, and what it says when it opens a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
DEEPSEEK_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}

_TRUNK: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QWEN2_MOE = _TRUNK | _EXPERTS | {"shared_expert_intermediate_size": 24}
_DEEPSEEK: dict[str, Any] = {
    **_TRUNK,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_V2_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
_V3_GROUPS = {"n_group": 4, "topk_group": 2}
_V3_PLAIN = {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}

CASES: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "llama": ("llama", _TRUNK | {"rope_parameters": YARN}),
        "mistral": ("mistral", _TRUNK | {"sliding_window": 11}),
        "qwen2": ("qwen2", _TRUNK | {"tie_word_embeddings": True}),
        "qwen3": ("qwen3", _TRUNK | {"head_dim": 12, "rope_parameters": YARN}),
        "mixtral": (
            "mixtral",
            _TRUNK | {"head_dim": None, "num_local_experts": 6},
        ),
        "mixtral-windowed": ("mixtral", _TRUNK | {"num_local_experts": 6, "sliding_window": 7}),
        "qwen2_moe": ("qwen2_moe", _QWEN2_MOE | {"mlp_only_layers": [0], "rope_parameters": YARN}),
        "qwen3_moe": (
            "qwen3_moe",
            _TRUNK | _EXPERTS | {"head_dim": 12, "norm_topk_prob": True, "tie_word_embeddings": True},
        ),
        "olmoe": (
            "olmoe",
            _TRUNK | {"num_experts": 6, "num_experts_per_tok": 3, "rope_parameters": YARN},
        ),
        "deepseek_v2": (
            "deepseek_v2",
            _DEEPSEEK | _V2_GROUPS | {"routed_scaling_factor": 4.0, "rope_parameters": DEEPSEEK_YARN},
        ),
        "deepseek_v3": (
            "deepseek_v3",
            _DEEPSEEK | _V3_PLAIN | _V3_GROUPS | {"rope_parameters": DEEPSEEK_YARN},
        ),
    }
)
"""One of each model type; together they have every option that the grid varies."""

GRID: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "llama-tied": ("llama", _TRUNK | {"tie_word_embeddings": True}),
        "llama-wide": ("llama", _TRUNK | {"head_dim": 12, "num_key_value_heads": 4}),
        "mistral-long": ("mistral", _TRUNK | {"sliding_window": 300, "head_dim": 12}),
        "qwen2-windowed": (
            "qwen2",
            _TRUNK | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        ),
        "qwen3-windowed": (
            "qwen3",
            _TRUNK
            | {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        "qwen2_moe-windowed": (
            "qwen2_moe",
            _QWEN2_MOE | {"use_sliding_window": True, "sliding_window": 9},
        ),
        "qwen2-yarn": ("qwen2", _TRUNK | {"rope_parameters": YARN | {"attention_factor": 1.1}}),
        "qwen3-tied": ("qwen3", _TRUNK | {"head_dim": 8, "tie_word_embeddings": True}),
        "mixtral-tied": (
            "mixtral",
            _TRUNK
            | {"num_local_experts": 5, "head_dim": 12, "tie_word_embeddings": True, "rope_parameters": YARN},
        ),
        "mixtral-all": ("mixtral", _TRUNK | {"num_local_experts": 4, "num_experts_per_tok": 4}),
        "qwen2_moe-every-other": ("qwen2_moe", _QWEN2_MOE | {"decoder_sparse_step": 2, "qkv_bias": False}),
        "qwen2_moe-tied": ("qwen2_moe", _QWEN2_MOE | {"norm_topk_prob": True, "tie_word_embeddings": True}),
        "qwen3_moe-raw": (
            "qwen3_moe",
            _TRUNK | _EXPERTS | {"decoder_sparse_step": 2, "num_experts_per_tok": 1, "rope_parameters": YARN},
        ),
        "olmoe-tied": (
            "olmoe",
            _TRUNK
            | {
                "num_experts": 7,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
                "tie_word_embeddings": True,
            },
        ),
        "deepseek_v2-lite": ("deepseek_v2", _DEEPSEEK | {"q_lora_rank": None, "tie_word_embeddings": True}),
        "deepseek_v2-sparse": ("deepseek_v2", _DEEPSEEK | {"first_k_dense_replace": 0}),
        "deepseek_v3-lite": (
            "deepseek_v3",
            _DEEPSEEK | _V3_PLAIN | {"q_lora_rank": None, "tie_word_embeddings": True},
        ),
        "deepseek_v3-halves": (
            "deepseek_v3",
            _DEEPSEEK
            | _V3_PLAIN
            | _V3_GROUPS
            | {"rope_interleave": False, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        ),
        "deepseek_v3-sparse": ("deepseek_v3", _DEEPSEEK | _V3_PLAIN | {"first_k_dense_replace": 0}),
    }
)
"""Every other value of every option, for the slow set."""


def build(name: str, seed: int = 0) -> Any:
    """The model of a case, float32, in evaluation mode, each tensor of ordinary values."""
    kind, keys = (CASES | GRID)[name]
    config = transformers.AutoConfig.for_model(kind, **keys)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return enlivened(model.float().eval(), seed)


@torch.no_grad()
def enlivened(model: Any, seed: int) -> Any:
    """Matrices that keep a vector's size, norms that are not 1, and biases of both signs.

    Embeddings are small, so that what a token says of the next is decided by all before it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("inv_freq"):
            continue
        if tensor.ndim > 1:
            gain = 3.0 if "mlp.gate." in name else 0.3 if "embed" in name else 1.0
            tensor.copy_(values * gain / tensor.shape[-1] ** 0.5)
        elif name.endswith("norm.weight"):
            tensor.copy_(1 + 0.3 * values)
        else:
            tensor.copy_(0.3 * values)
    return model


@dataclass(frozen=True, slots=True)
class Opened:
    """A folder as transformers reads it, and all that it complained of."""

    model: Any
    report: Mapping[str, Any]
    """Keys that were missing, unexpected or mismatched."""
    warnings: tuple[str, ...]


class _Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def opened(folder: Path) -> Opened:
    complaints = _Complaints()
    logger = logging.getLogger("transformers")
    logger.addHandler(complaints)
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            experts_implementation="eager",
        )
    finally:
        logger.removeHandler(complaints)
    return Opened(model.eval(), report, tuple(complaints.said))


def some_ids(rows: int, length: int, *, vocabulary: int = 97, seed: int = 1) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
