"""``consilium eval``: bits per byte of a checkpoint on text."""

from __future__ import annotations

import json
from argparse import Namespace

from consilium.checkpoint import store
from consilium.cli.actions.folders import checkpoint_in
from consilium.config.training import BuiltIn, Data
from consilium.config.training import Path as PathSource
from consilium.data.corpus import whole_corpus
from consilium.data.tokenizer import Tokenizer
from consilium.evaluation.bits import evaluate


def run(options: Namespace) -> int:
    checkpoint = checkpoint_in(options.folder)
    model = store.load(checkpoint).eval()
    source = PathSource(path=options.data) if options.data else BuiltIn()
    corpus = whole_corpus(Data(source=source), Tokenizer.load(checkpoint))
    result = evaluate(model, corpus, sequence_length=options.seq, limit_tokens=options.limit)
    if options.json:
        print(
            json.dumps(
                {
                    "bits_per_byte": result.bits_per_byte,
                    "domains": dict(result.domains),
                    "tokens": result.tokens,
                }
            )
        )
        return 0
    for name, value in result.domains.items():
        print(f"{name:<12} {value:.4f} bits per byte")
    print(f"{'mean':<12} {result.bits_per_byte:.4f} bits per byte, {result.tokens:,} tokens")
    return 0
