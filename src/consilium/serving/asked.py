"""What a request says of drawing and of routing, as the engine takes it.

Legend: T tokens, M MoE layers, K choices.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch

from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.engine.request import Sampling
from consilium.engine.routes import Routes
from consilium.engine.steering import Steering, steered_layers
from consilium.serving.body import Refused
from consilium.serving.protocol import Generating


def sampling_of(asked: Generating, defaults: GenerationDefaults) -> Sampling:
    """What was asked for, else what the model's files say, else OpenAI's defaults: a temperature of 1."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    theirs = {name: getattr(defaults, name) for name in names if getattr(defaults, name) is not None}
    own = {name: getattr(asked, name) for name in (*names, "presence_penalty", "frequency_penalty")}
    said: dict[str, Any] = (
        {"temperature": 1.0} | theirs | {name: value for name, value in own.items() if value is not None}
    )
    if not said.get("top_p", 1.0):
        del said["top_p"]  # some files write 0 for off
    said["top_k"] = max(int(said.get("top_k", 0)), 0)
    bias = tuple((int(token), value) for token, value in (asked.logit_bias or {}).items())
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    return Sampling(**said, logit_bias=bias, seed=seed)


def steering_of(asked: Generating, config: Model) -> Steering | None:
    """Raises Refused for routing whose tokens, layers or choices are not as many each."""
    replayed = asked.replay_routed_experts
    if not asked.mute_experts and asked.experts_per_token is None and replayed is None:
        return None
    return Steering(
        mute=tuple(dict.fromkeys((layer, expert) for layer, expert in asked.mute_experts or ())),
        top_k=asked.experts_per_token,
        replay=None if replayed is None else _routes(replayed, config),
    )


def _routes(experts: list[list[list[int]]], config: Model) -> Routes:
    try:
        experts_TMK = torch.tensor(experts, dtype=torch.int16)
    except (ValueError, TypeError, RuntimeError):
        experts_TMK = torch.empty(0)
    layers = steered_layers(config)
    if experts_TMK.ndim != _DIMENSIONS or experts_TMK.shape[1] != len(layers):
        raise Refused(
            400,
            f"replay_routed_experts is no list of tokens of {len(layers)} layers of as many experts each",
            param="replay_routed_experts",
        )
    shape = experts_TMK.shape
    return Routes(layers, experts_TMK, torch.zeros(shape), torch.zeros(shape[:2]), torch.zeros(shape[:2]))


_DIMENSIONS = 3
