"""``consilium generate``: continue prompts, streaming to the terminal."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from consilium.checkpoint import store
from consilium.cli.arguments import json_flag
from consilium.cli.folders import checkpoint_in
from consilium.data.tokenizer import Tokenizer
from consilium.engine.engine import Engine
from consilium.engine.request import Piece, Sampling
from consilium.errors import ConsiliumError


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run or a checkpoint")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times: one batch")
    sampling_arguments(parser)
    json_flag(parser)


def sampling_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="new tokens at most; default 64")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy, the default")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="keep the N most likely tokens; 0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens of mass P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text")


def sampling_of(options: Namespace) -> Sampling:
    return Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )


def load_engine(folder: Path) -> Engine:
    checkpoint = checkpoint_in(folder)
    return Engine(store.load(checkpoint), Tokenizer.load(checkpoint))


def run(options: Namespace) -> int:
    if not options.prompt:
        raise ConsiliumError('generate: no prompt; give --prompt "text".')
    if options.max_tokens < 1:
        raise ConsiliumError(f"generate: --max-tokens {options.max_tokens} is less than 1; give the tokens to add.")
    engine = load_engine(options.folder)
    pieces = engine.generate(
        options.prompt, max_tokens=options.max_tokens, sampling=sampling_of(options), stop=options.stop
    )
    if options.json:
        print(json.dumps({"completions": _gather(options.prompt, list(pieces))}, ensure_ascii=False))
    elif len(options.prompt) == 1:
        print(options.prompt[0], end="", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()
    else:
        for completion in _gather(options.prompt, list(pieces)):
            print(f"--- {completion['prompt']}\n{completion['prompt']}{completion['text']}")
    return 0


def _gather(prompts: list[str], pieces: list[Piece]) -> list[dict[str, object]]:
    def of(index: int) -> list[Piece]:
        return [piece for piece in pieces if piece.request == index]

    return [
        {
            "prompt": prompt,
            "text": "".join(piece.text for piece in of(i)),
            "tokens": [piece.token for piece in of(i)],
            "logprobs": [piece.logprob for piece in of(i)],
            "finished": of(i)[-1].finished,
        }
        for i, prompt in enumerate(prompts)
    ]
