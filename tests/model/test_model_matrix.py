"""Every system, with every format of its cache, by kernels and each way of its modules: the same values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from consilium.attention.types import LatentPath
from consilium.config.attention import MLA
from consilium.kv.build import build_cache
from consilium.kv.rows import CacheFormat
from consilium.model import decoder
from consilium.model.types import Inputs, Output
from consilium.recipes import catalogue
from kernels import HERE
from model.test_model_native import COUNTS, UNKNOWN, error, prepare
from small import lively

CACHES: tuple[tuple[torch.dtype, CacheFormat], ...] = (
    (torch.float32, "model"),
    (torch.bfloat16, "model"),
    (torch.float32, "int8"),
)
LENGTHS = (19, 3)


def combinations() -> Iterator[tuple[str, torch.dtype, CacheFormat, LatentPath]]:
    for system in catalogue.names():
        latent = isinstance(catalogue.recipe(system, "tiny").attention, MLA)
        for dtype, form in CACHES:
            if system in UNKNOWN or (form == "int8" and not latent):
                continue
            paths: tuple[LatentPath, ...] = ("absorbed", "expanded") if latent else ("auto",)
            for path in paths:
                yield system, dtype, form, path


@pytest.mark.parametrize(("system", "dtype", "form", "path"), list(combinations()), ids=str)
@torch.inference_mode()
def test_a_step_is_the_same_by_every_way(
    system: str, dtype: torch.dtype, form: CacheFormat, path: LatentPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tier that rounds nothing but the cache: a query that tiles round may choose another expert.

    What is written differs by a last place where a value lies between two that the cache can hold.
    """
    model = lively(catalogue.recipe(system, "tiny")).eval()
    exact = dtype == torch.float32 and form == "model"
    prepared, made = prepare(model, HERE[-1] if exact else HERE[0]), decoder.build_context
    monkeypatch.setattr(
        decoder, "build_context", lambda *args, **more: replace(made(*args, **more), latent_path=path)
    )
    generator = torch.Generator().manual_seed(len(system))
    ids_BS = torch.randint(model.config.vocab_size, (2, 21), generator=generator)
    found: list[Output] = []
    for step in (lambda i, c: prepared.step(i, c, COUNTS), lambda i, c: model(i, cache=c, options=COUNTS)):
        cache = build_cache(model.config, batch=2, capacity=21, dtype=dtype, form=form)
        model(Inputs(ids_BS[:, : LENGTHS[0]]), cache=cache, options=COUNTS)
        position_B1 = torch.tensor(LENGTHS)[:, None]
        found.append(step(Inputs(ids_BS.gather(1, position_B1), position_BS=position_B1), cache))
    assert error(found[0].logits, found[1].logits) < (1e-5 if exact else 1e-3)
