"""Tensor names of weights that transformers has no class for: those of the code published beside them."""

from __future__ import annotations

from typing import Final

from consilium.recipes.layout import GQA, MIXTRAL, TRUNK, Table

GROK_1: Final[Table] = {
    **TRUNK,
    "norm.weight": ("model.norm.scale",),
    "layers.{i}.attention_norm.weight": ("model.layers.{i}.pre_attn_norm.scale",),
    "layers.{i}.attention_post_norm.weight": ("model.layers.{i}.post_attn_norm.scale",),
    "layers.{i}.feed_forward_norm.weight": ("model.layers.{i}.pre_moe_norm.scale",),
    "layers.{i}.feed_forward_post_norm.weight": ("model.layers.{i}.post_moe_norm.scale",),
    **{f"layers.{{i}}.attention.{x}.weight": (f"model.layers.{{i}}.attn.{x}_proj.weight",) for x in "qkvo"},
    "layers.{i}.moe.router.projection.weight": ("model.layers.{i}.moe_block.gate.weight",),
    "layers.{i}.moe.experts.up": (
        "model.layers.{i}.moe_block.experts.{e}.linear.weight",
        "model.layers.{i}.moe_block.experts.{e}.linear_v.weight",
    ),
    "layers.{i}.moe.experts.down": ("model.layers.{i}.moe_block.experts.{e}.linear_1.weight",),
}
"""``Grok1ModelForCausalLM``, model type grok-1 (published as hpcai-tech/grok-1)."""

_GROK_LAYER: Final = "transformer.decoder_layer.{i}"
GROK: Final[Table] = {
    "embed.weight": ("transformer.in_out_embed.weight",),
    "norm.weight": ("transformer.rms_norm.weight",),
    "head.weight": ("lm_head.weight",),
    "layers.{i}.attention_norm.weight": (f"{_GROK_LAYER}.rms_norm.weight",),
    "layers.{i}.attention_post_norm.weight": (f"{_GROK_LAYER}.rms_norm_1.weight",),
    "layers.{i}.feed_forward_norm.weight": (f"{_GROK_LAYER}.rms_norm_2.weight",),
    "layers.{i}.feed_forward_post_norm.weight": (f"{_GROK_LAYER}.rms_norm_3.weight",),
    **{
        f"layers.{{i}}.attention.{ours}.weight": (f"{_GROK_LAYER}.multi_head_attention.{theirs}.weight",)
        for ours, theirs in {"q": "query", "k": "key", "v": "value", "o": "linear"}.items()
    },
    "layers.{i}.moe.router.projection.weight": (f"{_GROK_LAYER}.router.weight",),
    "layers.{i}.moe.experts.up": (
        f"{_GROK_LAYER}.moe.{{e}}.linear.weight",
        f"{_GROK_LAYER}.moe.{{e}}.linear_v.weight",
    ),
    "layers.{i}.moe.experts.down": (f"{_GROK_LAYER}.moe.{{e}}.linear_1.weight",),
}
"""``GrokForCausalLM``, the names of xAI's own file (published as keyfan/grok-1-hf); read, never written."""

SKYWORK_MOE: Final[Table] = {
    **MIXTRAL,
    "layers.{i}.moe.balance.coefficient": ("model.layers.{i}.block_sparse_moe.balance.coefficient",),
}
"""``SkyworkMoeForCausalLM``. The coefficient is state of our training; released files have none."""

LLAMA_MOE: Final[Table] = {
    **TRUNK,
    **GQA,
    "layers.{i}.moe.router.projection.weight": ("model.layers.{i}.mlp.gate.gate_network.weight",),
    "layers.{i}.moe.router.projection.hidden.weight": ("model.layers.{i}.mlp.gate.gate_network.0.weight",),
    "layers.{i}.moe.router.projection.output.weight": ("model.layers.{i}.mlp.gate.gate_network.2.weight",),
    "layers.{i}.moe.router.noise.weight": ("model.layers.{i}.mlp.gate.weight_noise.weight",),
    "layers.{i}.moe.experts.up": (
        "model.layers.{i}.mlp.calculator.experts.weight_gate.{e}",
        "model.layers.{i}.mlp.calculator.experts.weight_up.{e}",
    ),
    "layers.{i}.moe.experts.down": ("model.layers.{i}.mlp.calculator.experts.weight_down.{e}",),
}
"""``LlamaMoEForCausalLM``."""
