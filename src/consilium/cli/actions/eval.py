"""``consilium eval``: bits per byte of a checkpoint on text."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from consilium.checkpoint import store
from consilium.checkpoint.folders import checkpoint_in
from consilium.config.training import Data
from consilium.data.corpus import Corpus, held_out_corpus, whole_corpus
from consilium.data.tokenizer import Tokenizer
from consilium.evaluation.bits import Evaluation, evaluate
from consilium.training.files import stored_config


def run(options: Namespace) -> int:
    checkpoint = checkpoint_in(options.folder)
    model = store.load(checkpoint, check_finite=True).eval()
    stored = stored_config(options.folder)
    data = Data() if stored is None else stored.data
    corpus = _corpus(options.data, data, Tokenizer.load(checkpoint))
    length = options.seq or min(data.sequence_length, model.config.max_length)
    result = evaluate(model, corpus, sequence_length=length, limit_tokens=options.limit)
    print(_json(result) if options.json else _table(result))
    return 0


def _corpus(path: str | None, data: Data, tokenizer: Tokenizer) -> Corpus:
    """All of the user's text, or what the run held out: text that it trained on would flatter it."""
    return held_out_corpus(data, tokenizer) if path is None else whole_corpus(Path(path), tokenizer)


def _json(result: Evaluation) -> str:
    fields = {"bits_per_byte": result.bits_per_byte, "domains": dict(result.domains), "tokens": result.tokens}
    return json.dumps(fields)


def _table(result: Evaluation) -> str:
    rows = [*result.domains.items(), ("mean", result.bits_per_byte)]
    lines = [f"{name:<14} {value:.4f} bits per byte" for name, value in rows]
    return "\n".join([*lines, f"{result.tokens:,} tokens"])
