"""Admission: which of the router's choices fit. Integers only, before any data moves.

Legend: T tokens, E experts, G local groups of tokens, K choices a token, N = K T copies listed by choice rank
and then by token.

Weights stay as they are: after a drop they are not renormalised, and the residual stream carries the token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from consilium.config.moe import Admission, Capacity, DeviceCapacity, Dropless
from consilium.moe.ordering import capacities, place_within
from consilium.moe.types import KEPT, LayerMode, Routing, Tokens
from consilium.ops.counting import occurrences, scramble


def admit(routing: Routing, tokens: Tokens, admission: Admission, mode: LayerMode) -> Routing:
    """The routing with ``keep_TK`` narrowed to what experts or devices accept, or to what a replay kept."""
    replay = mode.override.replay
    if replay is not None:
        return _narrow(routing, replay.reached_TK >= KEPT)
    match admission:
        case Dropless():
            return routing
        case Capacity(scope=scope):
            if scope == "training" and not mode.training:
                return routing
            return _narrow(routing, _within_capacity(routing, tokens, admission))
        case DeviceCapacity():
            if not mode.training:
                return routing
            return _narrow(routing, _within_devices(routing, tokens, admission))


def _narrow(routing: Routing, fits_TK: Tensor) -> Routing:
    return replace(routing, keep_TK=routing.keep_TK & fits_TK)


def _within_capacity(routing: Routing, tokens: Tokens, config: Capacity) -> Tensor:
    """Places of each expert in each local group, counted apart.

    A second choice that a draw rejected takes its place all the same (GShard algorithm 1, line 22).
    """
    experts, k = routing.logits_TE.shape[1], routing.experts_TK.shape[1]
    group_T, count_G = _local_groups(tokens, config.group_tokens)
    limit_G = capacities(config.factor, count_G, k, experts)
    slot_TK = group_T[:, None] * experts + routing.experts_TK
    slot_N = _by_rank(slot_TK.masked_fill(~routing.considered_TK, experts * limit_G.shape[0]))
    match config.by:
        case "position":
            # GShard algorithm 1: all first choices in token order, then all second choices.
            place_N = place_within(slot_N)
        case "probability":
            place_N = _place_by(_affinity(routing), slot_N)
    return _by_token(place_N, routing) < limit_G[group_T][:, None]


def _local_groups(tokens: Tokens, size: int | None) -> tuple[Tensor, Tensor]:
    """The group of each token and the valid tokens of each group: runs of ``size`` valid tokens, or all."""
    place_T = tokens.valid_T.cumsum(dim=0) - 1
    size = size or max(tokens.count, 1)
    group_T = place_T.clamp_min(0) // size
    return group_T, occurrences(group_T, -(-tokens.count // size), tokens.valid_T)


def _within_devices(routing: Routing, tokens: Tokens, config: DeviceCapacity) -> Tensor:
    """Each device drops its lowest affinities beyond its budget, exempt copies never (V2 section 2.2.4)."""
    size = routing.logits_TE.shape[1] // config.devices
    limit = capacities(config.factor, routing.keep_TK.sum(), 1, config.devices)
    device_N = _by_rank((routing.experts_TK // size).masked_fill(~routing.keep_TK, config.devices))
    exempt_T = exempt(tokens, config.exempt)
    exempt_N = _by_rank(exempt_T[:, None].expand_as(routing.keep_TK))
    place_N = _place_by(_affinity(routing).masked_fill(exempt_N, torch.inf), device_N)
    return _by_token((place_N < limit) | exempt_N, routing)


def exempt(tokens: Tokens, fraction: float) -> Tensor:
    """Tokens, as bool [T], of sequences that never drop: about ``fraction`` of all sequences.

    A sequence is exempt by a hash of its own tokens. Every layer, every pass and every micro-batch then
    agrees about it, recomputation included, which no draw and no index inside a batch would give.
    """
    mixed_T = scramble(tokens.ids_T * 0x9E3779B1 + tokens.position_T + 1).masked_fill(~tokens.valid_T, 0)
    sum_S = mixed_T.new_zeros(tokens.most_sequences).index_add(0, tokens.sequence_T, mixed_T)
    uniform_S = (scramble(sum_S) & 0xFFFFFF).double() / 2**24
    return (uniform_S < fraction)[tokens.sequence_T]


def _affinity(routing: Routing) -> Tensor:
    return _by_rank(routing.scores_TE.detach().gather(1, routing.experts_TK))


def _place_by(affinity_N: Tensor, group_N: Tensor) -> Tensor:
    """Places inside groups by falling affinity; ties keep the order of the copies."""
    order_N = affinity_N.argsort(descending=True, stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = place_within(group_N[order_N])
    return place_N


def _by_rank(values_TK: Tensor) -> Tensor:
    return values_TK.T.flatten()


def _by_token(values_N: Tensor, routing: Routing) -> Tensor:
    return values_N.view(routing.keep_TK.shape[1], routing.keep_TK.shape[0]).T
