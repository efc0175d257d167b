"""``consilium generate``: stream one completion, or gather several."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence

from consilium.cli.actions.engines import load_engine, sampling_of
from consilium.engine.request import Piece
from consilium.errors import ConsiliumError


def run(options: Namespace) -> int:
    if not options.prompt:
        raise ConsiliumError('generate: no prompt; give --prompt "text".')
    if options.max_tokens < 1:
        raise ConsiliumError(
            f"generate: --max-tokens {options.max_tokens} is less than 1; give the tokens to add."
        )
    engine = load_engine(options.folder)
    pieces = engine.generate(
        options.prompt, max_tokens=options.max_tokens, sampling=sampling_of(options), stop=options.stop
    )
    if options.json:
        print(json.dumps({"completions": _gather(options.prompt, list(pieces))}))
    elif len(options.prompt) == 1:
        print(options.prompt[0], end="", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()
    else:
        for completion in _gather(options.prompt, list(pieces)):
            print(f"--- {completion['prompt']}\n{completion['prompt']}{completion['text']}")
    return 0


def _gather(prompts: Sequence[str], pieces: Sequence[Piece]) -> list[dict[str, object]]:
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
