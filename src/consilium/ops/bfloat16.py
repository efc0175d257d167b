"""Where bfloat16 is a format to keep numbers in and none to multiply with."""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.ops.constant import constant


def is_storage(x: Tensor) -> bool:
    """Whether torch's products of rows like ``x`` crawl: bfloat16 on a processor without AVX512.

    There a product of several rows runs a reference kernel, tens to hundreds of times slower than float32
    (pytorch issue 146508).
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    return _has_no_products()


@constant
def _has_no_products() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"
