"""Names of balance methods, for ``train --balance`` and documents. It imports nothing: help is instant."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

TEXTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "none": "nothing balances",
        "switch": "E Σ f P over each micro-batch, 0.01 (Switch, DeepSeekMoE)",
        "switch-z": "the same and 0.001 of the z-loss (ST-MoE)",
        "global": "the same with f of all ranks and of the micro-batches so far (Qwen3)",
        "step": "the same with f of the whole step, counted by a pass before it: as one batch, however cut",
        "sequence": "the same in each sequence, 0.01 (DeepSeek-V2, V3)",
        "device": "0.003 of switch and 0.05 of the same by device (DeepSeekMoE 145B)",
        "communication": "expert, device and communication losses of each sequence, 0.003, 0.05 and 0.02"
        " (DeepSeek-V2)",
        "importance": "CV² of summed weights, 0.1 (Shazeer 2017)",
        "load": "CV² of summed weights and of the smooth load, 0.1 each, with learned noise (Shazeer 2017)",
        "adaptive": "Σ (1/E - P)², its coefficient led by the share of dropped tokens (Skywork-MoE)",
        "bias": "b moves by 0.001 against the sign of the excess, and 0.0001 of sequence (DeepSeek-V3)",
        "bias-centred": "the same, its mean taken out of each move, and no loss (Trinity's smaller models)",
        "bias-linear": "b moves by 0.01 of the relative excess, and 0.0001 of sequence (this project)",
        "smebu": "b moves by momentum of a soft-clamped excess (Trinity Large)",
        "pid": "b is led by the excess, its sum and its change (LongCat-Flash: its sum)",
        "quantile": "b gives each expert its exact share of the last step (quantile balancing: Su, Kimi K3)",
        "quantile-ema": "half of that way",
        "quantile-histogram": "the same from a histogram, in fixed memory",
        "sinkhorn": "training chooses in a balanced plan of the micro-batch (S-BASE)",
    }
)
"""What each of them is, for one line of a table."""
