"""A single-file reference asked for its routing: experts that tell who answered.

Expert e gives the unit vector e whatever it reads, so that a layer's output is the table of its weights
[T, E]. References know no padding and see valid tokens only.

Legend: T valid tokens, I inputs of a case, E experts, D = max(I, E) + 1; the last input is always 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from consilium.config.balance import AdaptiveLoss
from consilium.config.feed_forward import GATED
from consilium.config.moe import MoE
from consilium.conformance.suite import Case, Vectors
from consilium.moe.routing.router import Router
from consilium.recipes.catalogue import recipe
from model.reference_cases import hyper_of
from reference import (
    deepseek_moe,
    deepseek_v2,
    deepseek_v3,
    dense_moe,
    expert_choice,
    grok_1,
    gshard,
    jacobs,
    latent_moe,
    llama_moe,
    mixtral,
    nemotron_moe,
    olmoe,
    qwen3_moe,
    qwen_moe,
    shazeer,
    skywork_moe,
    switch,
)
from reference import hash as hash_layers

Weights = dict[str, Tensor]
Hyper = dict[str, Any]
Answer = tuple[Tensor, Mapping[str, Tensor]]
"""The layer's output and its losses by name."""
Layer = Callable[[Weights, Hyper, Tensor, Sequence[int]], Answer]
"""Takes weights, numbers, x_TD and the lengths of the sequences."""

GELU = 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))
AT_ONE = {"swiglu": 1 / (1 + math.exp(-1)), "geglu": GELU, "gelu": GELU, "relu": 1.0, "squared_relu": 1.0}
"""What an activation makes of 1."""
ACTIVATIONS = {"switch": "geglu"}
"""Where a reference has the network of one size of its system alone."""


def asked(vectors: Vectors, case: Case) -> tuple[list[dict[int, float]], dict[str, float]]:
    """Expert to weight of each admitted copy of each valid token, and the losses: the reference's."""
    config = vectors.moe(case)
    family = vectors.model.partition(":")[0]
    hyper = {"devices": 1, "most_devices": 1, "device_loss": 0.0, "communication_loss": 0.0}
    changed = {"moe": config} | ({"vocab_size": len(case.parameters["table"])} if family == "hash" else {})
    hyper |= hyper_of(dataclasses.replace(recipe(vectors.model), **changed))
    hyper["drops"] = config.admission.kind == "device_capacity"
    x_TD = inputs_of(config, case)
    part = part_of(config, case, ACTIVATIONS.get(family, config.activation))
    y_TD, losses = LAYERS[family](part, hyper, x_TD, lengths_of(case))
    rows = [{e: float(w) for e, w in enumerate(y_D) if w} for y_D in y_TD[:, : config.experts]]
    return rows, {name: float(value) for name, value in losses.items()}


def valid_of(case: Case) -> list[bool]:
    return list(case.valid_T or [True] * len(case.x_TD))


def lengths_of(case: Case) -> list[int]:
    numbers = case.sequence_T or [0] * len(case.x_TD)
    valid = [number for number, ok in zip(numbers, valid_of(case), strict=True) if ok]
    return [valid.count(number) for number in sorted(set(valid))]


def inputs_of(config: MoE, case: Case) -> Tensor:
    x_TI = torch.tensor(case.x_TD, dtype=torch.float64)[torch.tensor(valid_of(case))]
    x_TD = torch.zeros(len(x_TI), size_of(config, case), dtype=torch.float64)
    x_TD[:, : x_TI.shape[1]] = x_TI
    x_TD[:, -1] = 1
    return x_TD


def size_of(config: MoE, case: Case) -> int:
    return max(len(case.x_TD[0]), config.experts) + 1


def part_of(config: MoE, case: Case, activation: str) -> Weights:
    """The case's router, experts that tell who answered, and everything beside them silent."""
    size, experts = size_of(config, case), config.experts
    part = {f"router.{name}": tensor for name, tensor in router_of(config, case, size).items()}
    gated, one = activation in GATED, AT_ONE[activation]
    part["experts.up"] = torch.zeros(experts, 1 + gated, size)
    part["experts.up"][:, :, -1] = torch.tensor([1.0, 1.0] if gated else [1.0])
    part["experts.down"] = torch.eye(size, dtype=torch.float64)[:experts, :, None] / one
    part |= {"latent.down.weight": torch.eye(size), "latent.up.weight": torch.eye(size)}
    part |= {"shared.up.weight": torch.zeros(2, size), "shared.gate.weight": torch.zeros(1, size)}
    part["shared.down.weight"] = torch.zeros(size, 1 + (not gated))
    part["balance.bias_E"] = torch.tensor(case.bias_E or [0.0] * experts)
    # The identity of a case's token is its place.
    part["ids"] = torch.arange(len(case.x_TD))[torch.tensor(valid_of(case))]
    starts = [loss.start for loss in config.balance.losses if isinstance(loss, AdaptiveLoss)]
    part["balance.coefficient"] = torch.tensor(starts[:1])
    return {name: tensor.double() for name, tensor in part.items()}


def router_of(config: MoE, case: Case, size: int) -> Weights:
    """Its matrices, the identity where the case has none; inputs that were added count for nothing."""
    inputs, found = len(case.x_TD[0]), {}
    for name, parameter in Router(config.router, inputs, config.experts).named_parameters():
        plain = torch.eye(*parameter.shape) if parameter.ndim == 2 else torch.zeros(parameter.shape)
        given = case.parameters.get(name)
        tensor = plain if given is None else torch.tensor(given).view(parameter.shape)
        reads_x = parameter.ndim == 2 and name != "projection.output.weight"
        found[name] = torch.nn.functional.pad(tensor, (0, size - inputs)) if reads_x else tensor
    if (table := case.parameters.get("table")) is not None:
        found["table"] = torch.tensor(table)
    return found


def alone(layer: Callable[..., Any], *names: str) -> Layer:
    """A reference that reads weights, numbers and tokens; ``names`` are those of its losses."""

    def ask(part: Weights, hyper: Hyper, x_TD: Tensor, lengths: Sequence[int]) -> Answer:
        y_TD, *losses = layer(part, hyper, x_TD)
        return y_TD, dict(zip(names, losses, strict=True))

    return ask


def silent(layer: Callable[..., Tensor]) -> Layer:
    """A reference without losses."""
    return lambda part, hyper, x_TD, lengths: (layer(part, hyper, x_TD), {})


def by_sequence(part: Weights, hyper: Hyper, x_TD: Tensor, lengths: Sequence[int]) -> Answer:
    """DeepSeek-V3's takes one sequence; the loss is the mean over sequences."""
    outputs, losses = zip(*(deepseek_v3.mixture(part, hyper, x) for x in x_TD.split(lengths)), strict=True)
    return torch.cat(outputs), {"sequence": torch.stack(losses).mean()}


def latent(part: Weights, hyper: Hyper, x_TD: Tensor, lengths: Sequence[int]) -> Answer:
    y_TD, loss = latent_moe.mixture(part, hyper, x_TD, lengths)
    return y_TD, {"sequence": loss}


def llama(part: Weights, hyper: Hyper, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return llama_moe.mixture(part, hyper, x_TD, torch.zeros(len(x_TD), hyper["experts"]))


def noisy(part: Weights, hyper: Hyper, x_TD: Tensor) -> tuple[Tensor, ...]:
    y_TD, losses = shazeer.mixture(part, hyper, x_TD, {})
    return y_TD, *losses


def hashed(part: Weights, hyper: Hyper, x_TD: Tensor) -> Tensor:
    experts = {"up": part["experts.up"], "down": part["experts.down"]}
    return hash_layers.hashed(experts, x_TD, part["ids"].long(), part["router.table"].long())


LAYERS: dict[str, Layer] = {
    "jacobs": silent(lambda part, hyper, x_TD: jacobs.blend(part, x_TD)),
    "dense-moe": silent(lambda part, hyper, x_TD: dense_moe.mixture(part, x_TD)),
    "shazeer": alone(noisy, "importance", "load"),
    "gshard": alone(lambda p, hyper, x: gshard.mixture(p, hyper, x, torch.zeros(len(x))), "switch"),
    "switch": alone(lambda part, hyper, x_TD: switch.switch(part, hyper, x_TD, x_TD), "switch"),
    "hash": silent(hashed),
    "expert-choice": silent(expert_choice.mixture),
    "mixtral": alone(mixtral.mixture, "switch"),
    "llama-moe": alone(llama, "importance", "load"),
    "deepseek-moe": lambda part, hyper, x_TD, lengths: deepseek_moe.mixture(part, hyper, x_TD),
    "deepseek-v2": deepseek_v2.mixture,
    "deepseek-v3": by_sequence,
    "qwen-moe": alone(qwen_moe.mixture, "switch"),
    "qwen3-moe": alone(lambda p, h, x: qwen3_moe.mixture(p, h, x, [0] * h["experts"]), "switch"),
    "olmoe": lambda part, hyper, x_TD, lengths: olmoe.mixture(part, hyper, x_TD),
    "nemotron-moe": alone(nemotron_moe.mixture, "switch"),
    "latent-moe": latent,
    "grok-1": silent(grok_1.mixture),
    "skywork-moe": alone(skywork_moe.mixture, "adaptive"),
}
