"""What somebody forces on the routing of one request.

Legend: N tokens of a pass, T tokens, M MoE layers, K choices, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.config.model import Model
from consilium.engine.routes import Routes
from consilium.errors import ConsiliumError
from consilium.moe.types import KEPT, Override, Replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """Such a request takes passes of its own, and shares the cache with those that are steered alike."""

    mute: tuple[tuple[int, int], ...] = ()
    """A layer and an expert that nothing of it goes to, each."""
    top_k: int | None = None
    """Experts a token at most."""
    replay: Routes | None = None
    """Where its first tokens go; weights are computed anew. At least those of the prompt."""

    @property
    def salt(self) -> bytes:
        """What tells it from other steering, and from none."""
        digest = hashlib.sha256(repr((sorted(set(self.mute)), self.top_k)).encode())
        if self.replay is not None:
            experts_TMK = self.replay.experts_TMK
            digest.update(repr((self.replay.layers, experts_TMK.dtype, experts_TMK.shape)).encode())
            digest.update(experts_TMK.contiguous().numpy().tobytes())
        return digest.digest()

    def check(self, config: Model, prompt: int, name: str) -> None:
        """Raises ConsiliumError for what does not fit a model or a prompt of so many tokens."""
        moe = config.moe
        if moe is None:
            raise ConsiliumError("this model has no experts whose routing could be steered.")
        layers, most = steered_layers(config), moe.most_active
        for layer, expert in self.mute:
            if layer not in layers or not 0 <= expert < moe.experts:
                raise ConsiliumError(
                    f"expert {expert} of layer {layer} cannot be muted; the MoE layers are"
                    f" {layers[0]} to {layers[-1]}, of {moe.experts} experts each."
                )
        if self.top_k is not None and not 1 <= self.top_k <= most:
            raise ConsiliumError(f"{self.top_k} experts a token are out of range; use 1 to {most}.")
        for layer in layers:
            left = moe.experts - len({e for muted, e in self.mute if muted == layer})
            if left < (needed := min(self.top_k or most, most)):
                raise ConsiliumError(
                    f"layer {layer} would have {left} experts left of the {needed} that a token needs;"
                    " mute fewer."
                )
        if self.replay is not None and not 1 <= self.replay.experts_TMK.shape[2] <= most:
            raise ConsiliumError(
                f"the routing to replay has {self.replay.experts_TMK.shape[2]} experts a token, and the model"
                f" uses {most}."
            )
        if self.replay is not None:
            _check_replay(self.replay, layers, moe.experts, (prompt, name))

    def override(self, config: Model, place_N: Tensor) -> Mapping[int, Override]:
        """Of the tokens at these places, by layer."""
        assert config.moe is not None, "it is checked"
        replayed = self.replay is not None and int(place_N.max()) < self.replay.tokens
        k_T = None if self.top_k is None else place_N.new_tensor([self.top_k])
        return {
            layer: Override(
                mute_TE=self._muted(layer, config.moe.experts, place_N.device),
                k_T=k_T,
                replay=_replay(self.replay, layer, place_N) if self.replay is not None and replayed else None,
            )
            for layer in steered_layers(config)
        }

    def _muted(self, layer: int, experts: int, device: torch.device) -> Tensor | None:
        own = [expert for muted, expert in self.mute if muted == layer]
        if not own:
            return None
        mute_1E = torch.zeros(1, experts, dtype=torch.bool, device=device)
        mute_1E[0, own] = True
        return mute_1E


def steered_layers(config: Model) -> tuple[int, ...]:
    """Those with experts, without multi-token prediction modules, which guess alone."""
    return tuple(layer for layer in config.moe_layers if layer < config.layers)


def _replay(routes: Routes, layer: int, place_N: Tensor) -> Replay:
    experts_NK = routes.experts_TMK[place_N.cpu(), routes.layers.index(layer)].long().to(place_N.device)
    reached_NK = (experts_NK >= 0).to(torch.uint8) * KEPT
    return Replay(experts_NK.clamp(min=0), reached_NK)


def _check_replay(routes: Routes, layers: tuple[int, ...], experts: int, prompt: tuple[int, str]) -> None:
    length, name = prompt
    if routes.layers != layers:
        raise ConsiliumError(
            f"the routing to replay is of layers {list(routes.layers)}, and the model has experts in"
            f" {list(layers)}; replay what this model, or one like it, recorded."
        )
    if routes.experts_TMK.numel() and int(routes.experts_TMK.min()) < -1:
        raise ConsiliumError(
            f"the routing to replay names expert {int(routes.experts_TMK.min())}; -1 is for none."
        )
    if routes.experts_TMK.numel() and int(routes.experts_TMK.max()) >= experts:
        raise ConsiliumError(
            f"the routing to replay names expert {int(routes.experts_TMK.max())}, and the model has"
            f" {experts}."
        )
    if routes.tokens < length:
        raise ConsiliumError(
            f"the routing to replay is of {routes.tokens} tokens, and {name} has {length}; record it with the"
            " same prompt."
        )
    sorted_TMK = routes.experts_TMK.sort(-1).values
    twice = (sorted_TMK[..., 1:] == sorted_TMK[..., :-1]) & (sorted_TMK[..., 1:] >= 0)
    if twice.any():
        expert = int(sorted_TMK[..., 1:][twice][0])
        raise ConsiliumError(f"the routing to replay sends a token to expert {expert} twice; name each once.")
