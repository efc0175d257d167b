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
from consilium.moe.ordering import capacity, place_within
from consilium.moe.types import Mode, Routing, Tokens


def admit(routing: Routing, tokens: Tokens, admission: Admission, mode: Mode) -> Routing:
    """The routing with ``keep_TK`` narrowed to what experts or devices accept, or to what a replay kept."""
    replayed_TK = mode.own_override.keep_TK
    if replayed_TK is not None:
        return _narrow(routing, replayed_TK)
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
    """Places of each expert in each local group, counted apart."""
    experts, k = routing.logits_TE.shape[1], routing.experts_TK.shape[1]
    group_T, count_G = _local_groups(tokens, config.group_tokens)
    limit_G = count_G.new_tensor([capacity(config.factor, n, k, experts) for n in count_G.tolist()])
    slot_TK = group_T[:, None] * experts + routing.experts_TK
    slot_N = _by_rank(slot_TK.masked_fill(~routing.keep_TK, experts * limit_G.shape[0]))
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
    group_T = place_T.clamp_min(0) // (size or max(tokens.count, 1))
    return group_T, torch.bincount(group_T[tokens.valid_T], minlength=1)


def _within_devices(routing: Routing, tokens: Tokens, config: DeviceCapacity) -> Tensor:
    """Each device drops its lowest affinities beyond its budget, exempt copies never (V2 section 2.2.4)."""
    size = routing.logits_TE.shape[1] // config.devices
    limit = capacity(config.factor, int(routing.keep_TK.sum()), 1, config.devices)
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
    sequences = int(tokens.sequence_T.max()) + 1 if tokens.count else 0
    mixed_T = _scramble(tokens.ids_T * 0x9E3779B1 + tokens.position_T + 1).masked_fill(~tokens.valid_T, 0)
    sum_S = mixed_T.new_zeros(sequences).index_add(0, tokens.sequence_T, mixed_T)
    uniform_S = (_scramble(sum_S) & 0xFFFFFF).double() / 2**24
    return (uniform_S < fraction)[tokens.sequence_T]


def _scramble(value: Tensor) -> Tensor:
    """splitmix64's finaliser in wrapping int64 arithmetic; shifts are made logical by the masks."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


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
