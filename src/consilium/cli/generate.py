"""``consilium generate``: continue prompts, or answer one question, streaming to the terminal."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from consilium.cli.arguments import json_flag, path
from consilium.cli.generation import Clock, generation_arguments, open_model, sampling_of
from consilium.cli.progress import note
from consilium.errors import ConsiliumError
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.engine.chat import Format
    from consilium.engine.engine import Engine
    from consilium.engine.request import Piece

TOKENS: Final = 64


def arguments(parser: ArgumentParser) -> None:
    generation_arguments(
        parser,
        tokens=f"{TOKENS}; with --chat until the end of the turn",
        temperature="0; with --chat the model's",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="may be given several times: one batch; - is standard input without its last line break",
    )
    parser.add_argument(
        "--prompt-file",
        type=path,
        action="append",
        default=[],
        metavar="FILE",
        help="a prompt in a file, likewise",
    )
    parser.add_argument(
        "--chat", action="store_true", help="answer each prompt as one turn of chat, by the model's template"
    )
    json_flag(parser)


def run(options: Namespace) -> int:
    prompts = _prompts(options)
    opened = open_model(options)
    form = opened.form() if options.chat else None
    engine = opened.engine()
    clock = Clock()
    sampling = sampling_of(options, engine.model.generation if options.chat else None)
    ids, stops, stop_ids = _asked(prompts, form, engine, options)
    limit = options.max_tokens or (None if options.chat else TOKENS)
    stream = engine.generate(ids, max_tokens=limit, sampling=sampling, stop=stops, stop_ids=stop_ids)
    if options.json:
        completions = _gather(prompts, list(clock.timed(stream)))
        speed = {"first_token_seconds": clock.first, "tokens_per_second": clock.rate}
        loads = {str(layer): load_E for layer, load_E in engine.loads.items()}
        seed = sampling.seed if sampling.temperature else None
        print(json.dumps({"completions": completions, "seed": seed, "speed": speed, "loads": loads}))
        return 0
    if len(prompts) == 1:
        print("" if options.chat else prompts[0], end="", flush=True)
        for piece in clock.timed(stream):
            print(piece.text, end="", flush=True)
        print(flush=True)
    else:
        for one in _gather(prompts, list(clock.timed(stream))):
            shown = one["text"] if options.chat else f"{one['prompt']}{one['text']}"
            print(f"--- {one['prompt']}\n{shown}", flush=True)
    note(str(clock))
    return 0


def _prompts(options: Namespace) -> list[str]:
    if options.prompt.count("-") > 1:
        raise ConsiliumError("generate: standard input can be one prompt only; give --prompt - once.")
    prompts = [_from_input() if prompt == "-" else prompt for prompt in options.prompt]
    prompts += [_text(_bytes_of(file), str(file)) for file in options.prompt_file]
    if not prompts:
        raise ConsiliumError(
            'generate: no prompt; give --prompt "text", --prompt - for standard input, or --prompt-file FILE.'
        )
    return prompts


def _from_input() -> str:
    """Standard input, whose bytes are UTF-8 whatever the locale says."""
    stream = sys.stdin
    if stream is None:
        raise ConsiliumError('generate: standard input is closed; give --prompt "text".')
    return _text(stream.buffer.read(), "standard input")


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        why = (error.strerror or "error").lower()
        raise ConsiliumError(f"generate: cannot read the prompt {file} ({why}); give a text file.") from None


def _text(data: bytes, where: str) -> str:
    try:
        return _line(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConsiliumError(
            f"generate: {where} is not UTF-8 at byte {error.start}; convert it first, for example with iconv."
        ) from None


def _line(text: str) -> str:
    """Without the line break that an editor or ``echo`` puts at the end."""
    return text.removesuffix("\n").removesuffix("\r")


def _asked(
    prompts: Sequence[str], form: Format | None, engine: Engine, options: Namespace
) -> tuple[Sequence[str] | Sequence[Sequence[int]], tuple[str, ...], tuple[int, ...] | None]:
    """Prompts as the engine takes them, and what ends them."""
    if form is None:
        return prompts, tuple(options.stop), None
    from consilium.data.forms import Message

    note(say("format: {name}", name=form.name))
    ids = [form.ids((Message("user", prompt),)) for prompt in prompts]
    return ids, (*form.stops, *options.stop), (*engine.stop_ids, *form.stop_ids)


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
