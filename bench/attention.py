"""What multi-head, grouped-query, multi-query and latent attention cost a token behind a long context.

usage: python bench/attention.py [--turns 5] [--new 8] [--out bench/records/attention.json]

One dense model of 12 layers, width 1024 and 16 heads, in bfloat16, with each kind of attention; caches hold
random rows, as many as the context has, so that no prompt has to be read. The latent's ranks are those of
``deepseek-v3:1b``. Figures are milliseconds of one new token, and bytes of the cache a token: the first of
each is compared with multi-head attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from kept import keep

from consilium.benchmarking.record import once, record, several
from consilium.config.attention import GQA, MLA
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.kv.build import build_pool
from consilium.kv.paged import CachePart
from consilium.machine.processors import threads
from consilium.model.build import build
from consilium.model.native import NativeDecoder
from consilium.model.types import Inputs, Options
from consilium.moe.types import Mode
from consilium.planner.kv import values_per_token
from consilium.recipes import catalogue
from consilium.records.bench import Figure

CONTEXTS: Final = (512, 8192, 32768)
PAGE: Final = 64
OPTIONS: Final = Options(mode=Mode(counts_only=True))


def kinds() -> Mapping[str, GQA | MLA]:
    latent = catalogue.recipe("deepseek-v3", "1b").attention
    grouped = {
        name: GQA(heads=16, kv_heads=n, head_dim=64) for name, n in (("MHA", 16), ("GQA", 4), ("MQA", 1))
    }
    return {**grouped, "MLA": latent}


def model_with(attention: GQA | MLA) -> Model:
    return Model(
        family="llama",
        vocab_size=32000,
        hidden_size=1024,
        layers=12,
        attention=attention,
        dense=FeedForward(width=4096),
        max_length=CONTEXTS[-1] + 1,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Contestant:
    decoder: NativeDecoder
    cache: CachePart

    def milliseconds(self, context: int, new: int) -> float:
        """Of each of ``new`` tokens at the same place: what they write they write again."""
        inputs = Inputs(torch.tensor([[7]]), position_BS=torch.tensor([[context]]))
        begun = time.perf_counter()
        for _ in range(new):
            self.decoder.step(inputs, self.cache, OPTIONS)
        return (time.perf_counter() - begun) / new * 1e3


def contestant(attention: GQA | MLA) -> Contestant:
    model = build(model_with(attention), dtype="bfloat16").eval()
    decoder = NativeDecoder.of(model)
    assert decoder is not None, "this measures the kernels: see consilium doctor"
    pages = CONTEXTS[-1] // PAGE + 1
    pool = build_pool(model.config, pages=pages, page=PAGE, dtype=torch.bfloat16)
    cache = pool.part(torch.randperm(pages)[None])
    for storage_NPC in cache.layers:
        storage_NPC.normal_()
    return Contestant(decoder, cache)


def figures(turns: int, new: int) -> Iterator[Figure]:
    contestants = {name: contestant(attention) for name, attention in kinds().items()}
    found: dict[tuple[str, int], list[float]] = {(n, c): [] for c in CONTEXTS for n in contestants}
    for turn in range(turns + 1):
        for (name, context), values in found.items():
            values.append(contestants[name].milliseconds(context, new))
        print(f"turn {turn} of {turns}, the first to warm up", flush=True)
    for (name, context), (_, *values) in found.items():
        _, *most = found["MHA", context]
        against = None if name == "MHA" else (f"MHA, context {context}", most)
        yield several(f"{name}, context {context}", "ms a token", values, against)
    sizes = {name: 2 * values_per_token(model_with(attention)) for name, attention in kinds().items()}
    for name, size in sizes.items():
        yield once(f"{name}: cache", "bytes a token", size, None if name == "MHA" else ("MHA", sizes["MHA"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    command = f"python bench/attention.py --turns {options.turns} --new {options.new}"
    made = record("attention", command, tuple(figures(options.turns, options.new)))
    keep(made, options.out)


if __name__ == "__main__":
    main()
