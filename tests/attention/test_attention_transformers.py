"""The released architectures as transformers computes them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from attention.cases import HIDDEN, built, counted, random_x
from attention.naive import EPSILON
from consilium.attention.context import build_context
from consilium.config.attention import GQA, MLA, Rope, Yarn
from support import relative_error

pytestmark = pytest.mark.slow

MLA_NAMES = {
    "q": "q_proj",
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "o": "o_proj",
}
GQA_NAMES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
}

YARN = Yarn(factor=40, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
V3 = MLA(
    heads=4, q_rank=7, kv_rank=10, nope_dim=6, rope_dim=8, v_dim=5, rope=Rope(interleaved=True, scaling=YARN)
)


def oracle(system: str) -> Any:
    pytest.importorskip("transformers")
    return importlib.import_module(f"transformers.models.{system}")


def renamed(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    split = {name: name.split(".", 1) for name in state}
    return {f"{names[part]}.{leaf}": state[name] for name, (part, leaf) in split.items()}


def theirs(attention: Any, rotary: Any, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    tokens = x.shape[1]
    blocked = torch.full((tokens, tokens), float("-inf")).triu(1).expand(x.shape[0], 1, -1, -1)
    with torch.no_grad():
        return attention(x, rotary(x, position), blocked)[0]


@pytest.mark.parametrize("start", [0, 3000])
@pytest.mark.parametrize("q_rank", [None, 7])
def test_deepseek_v3(q_rank: int | None, start: int) -> None:
    system, config = oracle("deepseek_v3"), replace(V3, q_rank=q_rank)
    scaling = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1e4}
    scaling |= {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
    configuration = system.DeepseekV3Config(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_rank,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=8,
        v_head_dim=5,
        max_position_embeddings=163840,
        rope_parameters=scaling,
        attn_implementation="eager",
    )
    file = system.modeling_deepseek_v3
    attention, rotary = (
        file.DeepseekV3Attention(configuration, 0),
        file.DeepseekV3RotaryEmbedding(configuration),
    )
    module, x, position = built(config), random_x(2, 9), counted(2, 9, start)
    attention.load_state_dict(renamed(module.state_dict(), MLA_NAMES))
    for norm in (attention.q_a_layernorm, attention.kv_a_layernorm):
        if norm is not None:
            norm.variance_epsilon = EPSILON
    y = module(x, build_context(config, position)).y_BSD
    # Their angles are float32: at position 3,000 they are off by about 1e-4.
    assert relative_error(y, theirs(attention, rotary, x, position)) < (1e-5 if start == 0 else 2e-4)


def test_qwen3() -> None:
    system = oracle("qwen3")
    config = GQA(heads=4, kv_heads=2, head_dim=6, qk_norm="head", rope=Rope(theta=1e6))
    configuration = system.Qwen3Config(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="eager",
    )
    file = system.modeling_qwen3
    attention, rotary = file.Qwen3Attention(configuration, 0), file.Qwen3RotaryEmbedding(configuration)
    module, x, position = built(config), random_x(2, 9), counted(2, 9)
    attention.load_state_dict(renamed(module.state_dict(), GQA_NAMES))
    assert (
        relative_error(
            module(x, build_context(config, position)).y_BSD, theirs(attention, rotary, x, position)
        )
        < 1e-5
    )


def test_qwen2_has_biases() -> None:
    system = oracle("qwen2")
    config = GQA(heads=4, kv_heads=1, head_dim=6, qkv_bias=True)
    configuration = system.Qwen2Config(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=6,
        attn_implementation="eager",
    )
    file = system.modeling_qwen2
    attention, rotary = file.Qwen2Attention(configuration, 0), file.Qwen2RotaryEmbedding(configuration)
    module, x, position = built(config), random_x(2, 9), counted(2, 9)
    attention.load_state_dict(renamed(module.state_dict(), GQA_NAMES))
    assert (
        relative_error(
            module(x, build_context(config, position)).y_BSD, theirs(attention, rotary, x, position)
        )
        < 1e-5
    )


def test_nemotron_rotates_half_of_each_head() -> None:
    system = oracle("nemotron")
    config = GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(fraction=0.5))
    configuration = system.NemotronConfig(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        attn_implementation="eager",
    )
    file = system.modeling_nemotron
    attention, rotary = file.NemotronAttention(configuration, 0), file.NemotronRotaryEmbedding(configuration)
    module, x, position = built(config), random_x(2, 9), counted(2, 9)
    attention.load_state_dict(renamed(module.state_dict(), GQA_NAMES))
    assert (
        relative_error(
            module(x, build_context(config, position)).y_BSD, theirs(attention, rotary, x, position)
        )
        < 1e-5
    )
