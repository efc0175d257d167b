"""Which experts prefer which tokens: mutual information of expert choice and label, against shuffled labels.

Legend: N tokens of all passes, T tokens of one pass, K most experts a token may use, E experts, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from consilium.moe.types import Activations, Routing, Tokens
from consilium.ops.rows import Rows
from consilium.records.specialisation import Association, LayerSpecialisation, Specialisation

SHUFFLES = 8
UNLABELLED = -1


@dataclass(frozen=True, slots=True)
class Choices:
    """What one layer chose."""

    experts_NK: Tensor
    """Expert ids, any integer dtype."""
    keep_NK: Tensor
    """bool: which of them were used."""
    experts: int


@dataclass(frozen=True, slots=True)
class Labels:
    names: tuple[str, ...]
    label_N: Tensor
    """Integers in [0, L), or -1 where a token has no label and is left out."""


def mutual_information(counts_EL: Tensor) -> float:
    """I(expert; label) in bits of a table of counts: plug-in, so biased upwards on small samples."""
    joint_EL = counts_EL.double() / counts_EL.sum().clamp(min=1)
    entropies = [torch.special.entr(p).sum() for p in (joint_EL.sum(1), joint_EL.sum(0), joint_EL)]
    bits = (entropies[0] + entropies[1] - entropies[2]) / torch.tensor(2.0, dtype=torch.float64).log()
    return max(float(bits), 0.0)


def count(choices: Choices, label_N: Tensor, labels: int) -> Tensor:
    """int64 [E, L]: kept copies of tokens with each label at each expert."""
    keep_NK = choices.keep_NK & (label_N != UNLABELLED)[:, None]
    cell_NK = choices.experts_NK.long() * labels + label_N.long()[:, None]
    return torch.bincount(cell_NK[keep_NK], minlength=choices.experts * labels).view(choices.experts, labels)


def associate(choices: Choices, labels: Labels, generator: torch.Generator) -> Association:
    """Counts, mutual information, and what shuffling the labels over the labelled tokens leaves of it.

    Labels of whole tokens are shuffled, so that the K experts of one token stay together. Shuffling loses
    the order of the text: a labelling with long runs keeps a little more than chance.
    """
    labelled = (labels.label_N != UNLABELLED) & choices.keep_NK.any(1)
    label_N = labels.label_N[labelled]
    part = Choices(choices.experts_NK[labelled], choices.keep_NK[labelled], choices.experts)
    counts_EL = count(part, label_N, len(labels.names))
    shuffled = 0.0
    for _ in range(SHUFFLES):
        order_N = torch.randperm(label_N.shape[0], generator=generator)
        shuffled += mutual_information(count(part, label_N[order_N], len(labels.names))) / SHUFFLES
    return Association(
        counts_EL=tuple(tuple(row) for row in counts_EL.tolist()),
        bits=mutual_information(counts_EL),
        shuffled_bits=shuffled,
        shuffles=SHUFFLES,
    )


def specialise(
    layers: dict[int, Choices], domain: Labels, syntax: Labels, *, seed: int = 0
) -> Specialisation:
    """Both labellings against the choices of every layer (key: block index). Deterministic in ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return Specialisation(
        domains=domain.names,
        syntaxes=syntax.names,
        tokens=int((domain.label_N != UNLABELLED).sum()),
        layers=tuple(
            LayerSpecialisation(
                layer=layer,
                domain=associate(choices, domain, generator),
                syntax=associate(choices, syntax, generator),
            )
            for layer, choices in sorted(layers.items())
        ),
    )


@final
class SpecialisationCounter:
    """An Observer: call ``label`` before each pass and pass it down in ``Mode``; then ask for ``result``.

    Keeps expert ids and a bool of every copy: 3 bytes a layer, token and choice (5 above 32,768 experts),
    on the CPU.
    """

    def __init__(self) -> None:
        self._domains: list[Tensor] = []
        self._syntaxes: list[Tensor] = []
        self._choices: dict[int, list[Choices]] = {}

    def label(self, domain_T: Tensor, syntax_T: Tensor) -> None:
        """Set the labels of the next pass: integers [T], -1 where a token has none."""
        assert domain_T.shape == syntax_T.shape, f"{domain_T.shape} domains, {syntax_T.shape} syntax classes"
        self._domains.append(domain_T.flatten().cpu())
        self._syntaxes.append(syntax_T.flatten().cpu())

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        seen = self._choices.setdefault(layer, [])
        assert len(seen) < len(self._domains), "label() must be called before each pass"
        expected = self._domains[len(seen)].shape[0]
        assert tokens.count == expected, f"{tokens.count} tokens routed, {expected} labelled"
        experts = routing.logits_TE.shape[1]
        narrow = torch.int16 if experts <= 2**15 else torch.int32
        experts_TK = routing.experts_TK.detach().to("cpu", narrow)
        seen.append(Choices(experts_TK, routing.keep_TK.detach().cpu(), experts))

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        """Not needed here."""

    def result(self, domains: Sequence[str], syntaxes: Sequence[str], *, seed: int = 0) -> Specialisation:
        """Everything seen so far, with the names of the labels."""
        layers = {layer: _joined(passes) for layer, passes in self._choices.items()}
        return specialise(
            layers,
            Labels(tuple(domains), _concatenate(self._domains)),
            Labels(tuple(syntaxes), _concatenate(self._syntaxes)),
            seed=seed,
        )


def _joined(passes: Sequence[Choices]) -> Choices:
    return Choices(
        torch.cat([p.experts_NK for p in passes]), torch.cat([p.keep_NK for p in passes]), passes[0].experts
    )


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.int64)
