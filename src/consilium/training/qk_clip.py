"""QK-Clip: heads whose logits grew too large get smaller queries and keys (Kimi K2, 2507.20534 section 2.1).

Legend: H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from consilium.attention.mla import LatentAttention
from consilium.model.block import DecoderBlock
from consilium.model.decoder import Decoder
from consilium.parallel.part import Part, whole


def clip_heads(
    model: Decoder,
    largest: Mapping[int, Tensor],
    most: float,
    part_of: Callable[[Tensor], Part] = whole,
) -> None:
    """Scale each head whose largest logit of the step, ``largest`` [H] by block, was above ``most``.

    Of a model over several processes each scales the rows that it has.
    """
    for module in model.modules():
        if isinstance(module, DecoderBlock) and isinstance(module.attention, LatentAttention):
            module.attention.cool((most / largest[module.layer]).clamp(max=1.0), part_of)
