"""Folders as authors of weights that transformers lacks publish them, written name by name.

None of our tables is used. Beside each tensor on disk goes its place in the single-file reference, so that
the reference answers for the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from reference import deepseek_moe, grok_1, llama_moe, skywork_moe

VOCABULARY, HIDDEN, LAYERS, EXPERTS, WIDTH = 40, 24, 2, 6, 10
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
Reference = Callable[..., tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Published:
    """One folder: its config.json, its tensors, and what the reference needs to answer for it."""

    keys: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    hyper: Mapping[str, Any]
    reference: Reference

    def write(self, folder: Path) -> Path:
        (folder / "config.json").write_text(json.dumps(dict(self.keys)))
        safetensors.torch.save_file(dict(self.tensors), folder / "model.safetensors")
        return folder

    def logits(self, ids_T: Tensor) -> Tensor:
        """[T, V] of one document, in float64."""
        weights = {name: value.double() for name, value in self.weights.items()}
        logits_TV, _ = self.reference(weights, self.hyper, [(ids_T, torch.full_like(ids_T, -1))])
        return logits_TV


class Writer:
    """Draws each tensor once and files it under both names."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def drawn(self, name: str, *shape: int, gain: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator)
        self.tensors[name] = 1 + 0.3 * values if len(shape) == 1 else gain * values / shape[-1] ** 0.5
        return self.tensors[name]

    def both(self, ours: str, theirs: str, *shape: int, gain: float = 1.0) -> None:
        self.weights[ours] = self.drawn(theirs, *shape, gain=gain)

    def attention(self, i: int, names: Mapping[str, str]) -> None:
        """``names`` of query, key, value and output projections by our letters."""
        for letter, name in names.items():
            wide = HEADS * HEAD_DIM if letter in "qo" else KV_HEADS * HEAD_DIM
            self.both(f"layers.{i}.attention.{letter}.weight", name, wide, HIDDEN)

    def network(self, ours: str, names: Sequence[str], width: int) -> None:
        """Gate, up and down of one feed-forward network; ``ours`` ends where up or down follow."""
        gate, up, down = names
        both = [self.drawn(gate, width, HIDDEN), self.drawn(up, width, HIDDEN)]
        self.weights[f"{ours}.up.weight"] = torch.cat(both)
        self.weights[f"{ours}.down.weight"] = self.drawn(down, HIDDEN, width)

    def experts(self, i: int, names: Callable[[int], Sequence[str]]) -> None:
        ups, downs = [], []
        for e in range(EXPERTS):
            gate, up, down = names(e)
            ups.append(torch.cat([self.drawn(gate, WIDTH, HIDDEN), self.drawn(up, WIDTH, HIDDEN)]))
            downs.append(self.drawn(down, HIDDEN, WIDTH))
        self.weights[f"layers.{i}.moe.experts.up"] = torch.stack(ups)
        self.weights[f"layers.{i}.moe.experts.down"] = torch.stack(downs)

    def usual_trunk(self) -> None:
        """Embedding, head, norms and attention as Llama's descendants call them."""
        self.both("embed.weight", "model.embed_tokens.weight", VOCABULARY, HIDDEN)
        self.both("head.weight", "lm_head.weight", VOCABULARY, HIDDEN)
        self.both("norm.weight", "model.norm.weight", HIDDEN)
        for i in range(LAYERS):
            at = f"model.layers.{i}"
            self.both(f"layers.{i}.attention_norm.weight", f"{at}.input_layernorm.weight", HIDDEN)
            self.both(f"layers.{i}.feed_forward_norm.weight", f"{at}.post_attention_layernorm.weight", HIDDEN)
            self.attention(i, {x: f"{at}.self_attn.{x}_proj.weight" for x in "qkvo"})


TRUNK_KEYS = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}
HYPER = {
    "layers": LAYERS,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "experts": EXPERTS,
    "theta": 1e4,
    "norm_epsilon": 1e-6,
}


def deepseek() -> Published:
    """DeepSeekMoE-16B's layout (``DeepseekForCausalLM``), its first layer dense."""
    writer = Writer()
    writer.usual_trunk()
    names = ("gate_proj", "up_proj", "down_proj")
    dense = [f"model.layers.0.mlp.{x}.weight" for x in names]
    writer.network("layers.0.feed_forward", dense, 2 * WIDTH)
    mlp = "model.layers.1.mlp"
    writer.both("layers.1.moe.router.projection.weight", f"{mlp}.gate.weight", EXPERTS, HIDDEN, gain=3)
    writer.experts(1, lambda e: [f"{mlp}.experts.{e}.{x}.weight" for x in names])
    shared = [f"{mlp}.shared_experts.{x}.weight" for x in names]
    writer.network("layers.1.moe.shared", shared, 2 * WIDTH)
    keys = TRUNK_KEYS | {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "intermediate_size": 2 * WIDTH,
        "moe_intermediate_size": WIDTH,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
    }
    hyper = HYPER | {"dense_first": 1, "k": 3, "switch_loss": 0.001}
    return Published(keys, writer.tensors, writer.weights, hyper, deepseek_moe.model)


GROK_KEYS: Mapping[str, Any] = TRUNK_KEYS | {
    "intermediate_size": WIDTH,
    "num_experts_per_tok": 2,
    "attn_output_multiplier": HEAD_DIM**-0.5,
    "embedding_multiplier_scale": 4.5,
    "output_multiplier_scale": 0.577,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
GROK_HYPER = HYPER | {
    "norm_epsilon": 1e-5,
    "k": 2,
    "softcap": 2.0,
    "embedding_scale": 4.5,
    "logit_scale": 0.577,
}


def grok_1_of_hpcai() -> Published:
    """``Grok1ModelForCausalLM``: no ``model_type``, and a head that repeats the embedding."""
    writer = Writer()
    writer.both("embed.weight", "model.embed_tokens.weight", VOCABULARY, HIDDEN)
    writer.both("norm.weight", "model.norm.scale", HIDDEN)
    for i in range(LAYERS):
        at, ours = f"model.layers.{i}", f"layers.{i}"
        writer.attention(i, {x: f"{at}.attn.{x}_proj.weight" for x in "qkvo"})
        for name, norm in GROK_NORMS.items():
            writer.both(f"{ours}.{name}.weight", f"{at}.{norm}.scale", HIDDEN)
        gate = f"{at}.moe_block.gate.weight"
        writer.both(f"{ours}.moe.router.projection.weight", gate, EXPERTS, HIDDEN, gain=3)
        block = f"{at}.moe_block.experts"
        writer.experts(
            i, lambda e, block=block: [f"{block}.{e}.{x}.weight" for x in ("linear", "linear_v", "linear_1")]
        )
    tensors = writer.tensors | {"lm_head.weight": writer.weights["embed.weight"].clone()}
    named = {"architectures": ["Grok1ModelForCausalLM"], "num_experts": EXPERTS, "max_attn_value": 2.0}
    return Published({**GROK_KEYS, **named}, tensors, writer.weights, GROK_HYPER, grok_1.model)


GROK_NORMS = {
    "attention_norm": "pre_attn_norm",
    "attention_post_norm": "post_attn_norm",
    "feed_forward_norm": "pre_moe_norm",
    "feed_forward_post_norm": "post_moe_norm",
}


def grok_1_of_keyfan() -> Published:
    """``GrokForCausalLM``: xAI's own names, another key for the experts, and 30 as the cap of its code."""
    writer = Writer()
    writer.both("embed.weight", "transformer.in_out_embed.weight", VOCABULARY, HIDDEN)
    writer.both("norm.weight", "transformer.rms_norm.weight", HIDDEN)
    for i in range(LAYERS):
        at, ours = f"transformer.decoder_layer.{i}", f"layers.{i}"
        words = {"q": "query", "k": "key", "v": "value", "o": "linear"}
        writer.attention(i, {x: f"{at}.multi_head_attention.{word}.weight" for x, word in words.items()})
        for name, norm in zip(
            GROK_NORMS, ("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3"), strict=True
        ):
            writer.both(f"{ours}.{name}.weight", f"{at}.{norm}.weight", HIDDEN)
        writer.both(f"{ours}.moe.router.projection.weight", f"{at}.router.weight", EXPERTS, HIDDEN, gain=3)
        writer.experts(
            i,
            lambda e, at=at: [f"{at}.moe.{e}.{x}.weight" for x in ("linear", "linear_v", "linear_1")],
        )
    tensors = writer.tensors | {"lm_head.weight": writer.weights["embed.weight"].clone()}
    named = {"architectures": ["GrokForCausalLM"], "model_type": "grok", "num_local_experts": EXPERTS}
    hyper = GROK_HYPER | {"softcap": 30.0}
    return Published(
        {**GROK_KEYS, **named, "hidden_act": "gelu"}, tensors, writer.weights, hyper, grok_1.model
    )


def _skywork(named: Mapping[str, Any]) -> Published:
    writer = Writer()
    writer.usual_trunk()
    for i in range(LAYERS):
        block = f"model.layers.{i}.block_sparse_moe"
        gate = f"{block}.gate.weight"
        writer.both(f"layers.{i}.moe.router.projection.weight", gate, EXPERTS, HIDDEN, gain=3)
        writer.experts(
            i, lambda e, block=block: [f"{block}.experts.{e}.{x}.weight" for x in ("w1", "w3", "w2")]
        )
    keys = TRUNK_KEYS | {
        "architectures": ["SkyworkMoeForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "intermediate_size": WIDTH,
        "moe_use_logits_norm": True,
        "moe_gate_norm_std": 1.5,
    }
    hyper = HYPER | {"k": 2, "standardise_scale": 1.5, "standardise_epsilon": 0.0, "capacity": None}
    # Only the reference's balance loss reads the coefficient.
    coefficients = {f"layers.{i}.moe.balance.coefficient": torch.zeros(()) for i in range(LAYERS)}
    return Published(
        {**keys, **named}, writer.tensors, writer.weights | coefficients, hyper, skywork_moe.model
    )


def skywork_with_local_experts() -> Published:
    return _skywork({"model_type": "skywork_moe", "num_local_experts": EXPERTS, "num_experts_per_tok": 2})


def skywork_with_listed_experts() -> Published:
    """The other generation of its keys, which has no top-k and lists its experts."""
    return _skywork(
        {
            "model_type": "skywork_moe",
            "num_experts": [EXPERTS],
            "moe_expert_interval": 1,
            "moe_2layer_gate": False,
            "moe_use_mixtral_gating": False,
            "moe_use_skywork_gating": False,
            "moe_feature_no_mul_topk": True,
        }
    )


def llama_moe_of_smoe() -> Published:
    """``LlamaMoEForCausalLM``, with the sizes of experts and the factor spelt out for every layer."""
    writer = Writer()
    writer.usual_trunk()
    for i in range(LAYERS):
        mlp, router = f"model.layers.{i}.mlp", f"layers.{i}.moe.router"
        gate = f"{mlp}.gate.gate_network"
        writer.both(f"{router}.projection.hidden.weight", f"{gate}.0.weight", EXPERTS, HIDDEN, gain=3)
        writer.both(f"{router}.projection.output.weight", f"{gate}.2.weight", EXPERTS, EXPERTS, gain=3)
        writer.both(f"{router}.noise.weight", f"{mlp}.gate.weight_noise.weight", EXPERTS, HIDDEN)
        calculator = f"{mlp}.calculator.experts"
        writer.experts(
            i,
            lambda e, at=calculator: [
                f"{at}.weight_gate.{e}",
                f"{at}.weight_up.{e}",
                f"{at}.weight_down.{e}",
            ],
        )
    keys = TRUNK_KEYS | {
        "architectures": ["LlamaMoEForCausalLM"],
        "model_type": "llama_moe",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_scaling": None,
        "intermediate_size": EXPERTS * WIDTH,
        "num_experts": EXPERTS,
        "num_selects": 2,
        "size_experts": [[WIDTH] * EXPERTS] * LAYERS,
        "gate_type": "TopKBalancedNoisyGate",
        "gate_network": "mlp",
        "gate_use_softmax": True,
        "gate_use_balance": True,
        "gate_balance_loss_weight": 0.01,
        "gate_add_noise": True,
        "gate_noise_epsilon": 0.01,
        "calculator_type": "UniversalCalculator",
        "multiply_gate_scores": True,
        "score_scale_factor": [3.0] * LAYERS,
        "add_weight_norm": False,
    }
    losses = {"importance_loss": 0.01, "load_loss": 0.01, "noise_floor": 0.01}
    hyper = HYPER | losses | {"k": 2, "scale": 3.0, "norm_epsilon": 1e-5}
    return Published(keys, writer.tensors, writer.weights, hyper, llama_moe.model)


PUBLISHED: Mapping[str, Callable[[], Published]] = {
    "deepseek": deepseek,
    "grok-1": grok_1_of_hpcai,
    "grok": grok_1_of_keyfan,
    "skywork_moe": skywork_with_local_experts,
    "skywork_moe-listed": skywork_with_listed_experts,
    "llama_moe": llama_moe_of_smoe,
}
