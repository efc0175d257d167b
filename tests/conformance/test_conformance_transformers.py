"""Our router and every router of transformers that its parts can spell, over many random tokens.

Legend: T tokens, D router inputs, E experts, K choices a token.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.jamba.modeling_jamba import JambaTopKRouter
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from consilium.config.router import (
    ClampedSum,
    Groups,
    LinearGate,
    Normalised,
    Raw,
    Router,
    Sigmoid,
    SoftmaxOfSelected,
    SqrtSoftplus,
    TopK,
)
from consilium.moe.routing.router import Router as RouterModule
from consilium.moe.types import LayerMode, Tokens

TOKENS, HIDDEN, EXPERTS, K = 400, 12, 32, 6
V3 = Router(
    score=Sigmoid(),
    offset="scores",
    select=TopK(k=K, groups=Groups(count=8, keep=4, score="top2_sum")),
    scale=2.5,
)
V2 = Router(select=TopK(k=K, groups=Groups(count=8, keep=3, score="max")), weight=Raw(), scale=16.0)
RENORMALISED = Router(select=TopK(k=K))
PLAIN = Router(select=TopK(k=K), weight=Raw())

ROUTERS: dict[Any, Router] = {
    MixtralTopKRouter: Router(select=TopK(k=K), weight=SoftmaxOfSelected()),
    Qwen2MoeTopKRouter: PLAIN,
    Qwen3MoeTopKRouter: RENORMALISED,
    OlmoeTopKRouter: PLAIN,
    JambaTopKRouter: PLAIN,
    DeepseekV2TopkRouter: V2,
    DeepseekV3TopkRouter: V3,
    Glm4MoeTopkRouter: V3,
    NemotronHTopkRouter: V3,
    DeepseekV4TopKRouter: Router(score=SqrtSoftplus(), offset="scores", select=TopK(k=K), scale=2.5),
    Ernie4_5_MoeTopKRouter: Router(offset="scores", select=TopK(k=K), weight=ClampedSum(minimum=0.6)),
    GptOssTopKRouter: Router(projection=LinearGate(bias=True), select=TopK(k=K), weight=SoftmaxOfSelected()),
    GraniteMoeTopKRouter: Router(select=TopK(k=K), weight=SoftmaxOfSelected()),
    Lfm2MoeTopKRouter: Router(
        score=Sigmoid(), offset="scores", select=TopK(k=K), weight=Normalised(epsilon=1e-6), scale=2.5
    ),
    MiniMaxM2TopKRouter: Router(score=Sigmoid(), offset="scores", select=TopK(k=K)),
    Llama4Router: Router(score=Sigmoid(), select=TopK(k=K), weight=Raw(), weight_on="input"),
}


def settings(config: Router) -> SimpleNamespace:
    assert isinstance(config.select, TopK)
    groups = config.select.groups
    return SimpleNamespace(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=K,
        norm_topk_prob=isinstance(config.weight, Normalised),
        routed_scaling_factor=config.scale,
        topk_method="group_limited_greedy" if groups else "greedy",
        n_group=groups.count if groups else 1,
        topk_group=groups.keep if groups else 1,
        scoring_func="sqrtsoftplus",
        moe_norm_min=0.6,
        use_expert_bias=True,
    )


def asked(router: Any, weight_ED: Tensor, projection_bias_E: Tensor, bias_E: Tensor, x_TD: Tensor) -> Tensor:
    """Weights [T, E] of a router of transformers, zero where an expert is not used."""
    router.weight.copy_(weight_ED)
    for name, buffer in [*router.named_buffers(), *router.named_parameters()]:
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(bias_E.view_as(buffer))
        elif name == "bias":
            buffer.copy_(projection_bias_E)
    if isinstance(router, Llama4Router):
        return router(x_TD)[0]
    extra = (bias_E,) if isinstance(router, Lfm2MoeTopKRouter | MiniMaxM2TopKRouter) else ()
    _, weights_TK, experts_TK = router(x_TD, *extra)
    return torch.zeros(TOKENS, EXPERTS).scatter(1, experts_TK, weights_TK)


@pytest.mark.parametrize("mean", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("kind", ROUTERS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_our_router_is_that_of_transformers(kind: Any, mean: float) -> None:
    config, generator = ROUTERS[kind], torch.Generator().manual_seed(11)
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight_ED = torch.randn(EXPERTS, HIDDEN, generator=generator) / HIDDEN**0.5
    bias_E = mean + torch.randn(EXPERTS, generator=generator) / 4
    projection_bias_E = torch.randn(EXPERTS, generator=generator) / 4
    expected_TE = asked(kind(settings(config)), weight_ED, projection_bias_E, bias_E, x_TD)
    module = RouterModule(config, HIDDEN, EXPERTS)
    module.projection.weight.copy_(weight_ED)
    if module.projection.bias is not None:
        module.projection.bias.copy_(projection_bias_E)
    place_T = torch.arange(TOKENS)
    every = Tokens(place_T, torch.zeros_like(place_T), place_T, torch.ones(TOKENS, dtype=torch.bool))
    routing = module(x_TD, bias_E, every, LayerMode())
    actual_TE = torch.zeros(TOKENS, EXPERTS).scatter(1, routing.experts_TK, routing.weights_TK)
    assert torch.equal(actual_TE != 0, expected_TE != 0)
    assert float(((actual_TE - expected_TE).abs() / expected_TE.abs().clamp_min(1)).max()) < 1e-6
