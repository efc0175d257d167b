"""How tensors are called on disk in the Hugging Face layouts: a table a layout, data that is read both ways.

A pattern's ``{i}`` is the layer and ``{e}`` the expert. A tensor of ours is made of the tensors of its row:
stacked over ``{e}`` where that occurs, and the names of a row put together along the first axis (gate above
up). So the parts of a tensor are views of it, which a writer writes and a reader fills.

Here are the layouts of transformers and of DeepSeekMoE, which shares their parts; ``layout_remote`` has
others that only their authors' code reads, and ``layout_fused`` those that are read and never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

Row = tuple[str, ...]
Table = Mapping[str, Row]

TRUNK: Final[Table] = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "layers.{i}.attention_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.feed_forward_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
}

_DENSE: Final[Table] = {
    "layers.{i}.feed_forward.up.weight": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.feed_forward.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
}

GQA: Final[Table] = {
    f"layers.{{i}}.attention.{x}.weight": (f"model.layers.{{i}}.self_attn.{x}_proj.weight",) for x in "qkvo"
}
_QKV_BIAS: Final[Table] = {
    f"layers.{{i}}.attention.{x}.bias": (f"model.layers.{{i}}.self_attn.{x}_proj.bias",) for x in "qkv"
}
_QK_NORM: Final[Table] = {
    f"layers.{{i}}.attention.{x}_norm.weight": (f"model.layers.{{i}}.self_attn.{x}_norm.weight",)
    for x in "qk"
}

_MLA: Final[Table] = {
    f"layers.{{i}}.attention.{ours}.weight": (f"model.layers.{{i}}.self_attn.{theirs}.weight",)
    for ours, theirs in {
        "q": "q_proj",
        "q_down": "q_a_proj",
        "q_norm": "q_a_layernorm",
        "q_up": "q_b_proj",
        "kv_down": "kv_a_proj_with_mqa",
        "kv_norm": "kv_a_layernorm",
        "kv_up": "kv_b_proj",
        "o": "o_proj",
    }.items()
}

_EXPERTS: Final[Table] = {
    "layers.{i}.moe.router.projection.weight": ("model.layers.{i}.mlp.gate.weight",),
    "layers.{i}.moe.experts.up": (
        "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
        "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    ),
    "layers.{i}.moe.experts.down": ("model.layers.{i}.mlp.experts.{e}.down_proj.weight",),
}
_SHARED_EXPERTS: Final[Table] = {
    "layers.{i}.moe.shared.up.weight": (
        "model.layers.{i}.mlp.shared_experts.gate_proj.weight",
        "model.layers.{i}.mlp.shared_experts.up_proj.weight",
    ),
    "layers.{i}.moe.shared.down.weight": ("model.layers.{i}.mlp.shared_experts.down_proj.weight",),
}
_GATED_SHARED_EXPERT: Final[Table] = {
    "layers.{i}.moe.shared.gate.weight": ("model.layers.{i}.mlp.shared_expert_gate.weight",),
    "layers.{i}.moe.shared.up.weight": (
        "model.layers.{i}.mlp.shared_expert.gate_proj.weight",
        "model.layers.{i}.mlp.shared_expert.up_proj.weight",
    ),
    "layers.{i}.moe.shared.down.weight": ("model.layers.{i}.mlp.shared_expert.down_proj.weight",),
}

_MIXTRAL_MOE: Final[Table] = {
    "layers.{i}.moe.router.projection.weight": ("model.layers.{i}.block_sparse_moe.gate.weight",),
    "layers.{i}.moe.experts.up": (
        "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
        "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    ),
    "layers.{i}.moe.experts.down": ("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",),
}

_SELECTION_BIAS: Final[Table] = {
    "layers.{i}.moe.balance.bias_E": ("model.layers.{i}.mlp.gate.e_score_correction_bias",),
}

_MTP: Final[Table] = {
    "mtp.{i}.embed_norm.weight": ("model.layers.{i}.enorm.weight",),
    "mtp.{i}.hidden_norm.weight": ("model.layers.{i}.hnorm.weight",),
    "mtp.{i}.project.weight": ("model.layers.{i}.eh_proj.weight",),
    "mtp.{i}.norm.weight": ("model.layers.{i}.shared_head.norm.weight",),
}

LLAMA: Final = TRUNK | _DENSE | GQA
QWEN2: Final = LLAMA | _QKV_BIAS
QWEN3: Final = LLAMA | _QK_NORM
MIXTRAL: Final = TRUNK | GQA | _MIXTRAL_MOE
QWEN2_MOE: Final = QWEN2 | _EXPERTS | _GATED_SHARED_EXPERT
QWEN3_MOE: Final = QWEN3 | _EXPERTS
OLMOE: Final = TRUNK | GQA | _QK_NORM | _EXPERTS
DEEPSEEK: Final = LLAMA | _EXPERTS | _SHARED_EXPERTS
DEEPSEEK_V2: Final = TRUNK | _DENSE | _MLA | _EXPERTS | _SHARED_EXPERTS
DEEPSEEK_V3: Final = DEEPSEEK_V2 | _SELECTION_BIAS | _MTP
