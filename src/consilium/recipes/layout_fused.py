"""Layouts with all experts of a layer in one tensor: what transformers 5 holds in memory.

It writes them for ``save_original_format=False``. Most other readers lose the experts of such files, so they
are read here and never written.
"""

from __future__ import annotations

from typing import Final

from consilium.recipes import layout
from consilium.recipes.layout import Table

_EXPERTS: Final[Table] = {
    "layers.{i}.moe.experts.up": ("model.layers.{i}.mlp.experts.gate_up_proj",),
    "layers.{i}.moe.experts.down": ("model.layers.{i}.mlp.experts.down_proj",),
}

MIXTRAL: Final[Table] = {
    **layout.MIXTRAL,
    **_EXPERTS,
    "layers.{i}.moe.router.projection.weight": ("model.layers.{i}.mlp.gate.weight",),
}
QWEN2_MOE: Final[Table] = layout.QWEN2_MOE | _EXPERTS
QWEN3_MOE: Final[Table] = layout.QWEN3_MOE | _EXPERTS
OLMOE: Final[Table] = layout.OLMOE | _EXPERTS
DEEPSEEK_V2: Final[Table] = layout.DEEPSEEK_V2 | _EXPERTS
DEEPSEEK_V3: Final[Table] = layout.DEEPSEEK_V3 | _EXPERTS
