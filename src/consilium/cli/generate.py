"""``consilium generate``: continue prompts, or answer one question, streaming to the terminal."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from consilium.cli.arguments import json_flag, path
from consilium.cli.generation import Clock, generation_arguments, guesses_told, open_model, sampling_of
from consilium.cli.progress import note
from consilium.disk.atomic import check_place
from consilium.errors import ConsiliumError
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.engine.chat import Format
    from consilium.engine.engine import Engine
    from consilium.engine.request import Piece, Request, Sampling
    from consilium.engine.routes import Recording
    from consilium.engine.steering import Steering

TOKENS: Final = 64
_LONGEST_NAME: Final = 16


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
    _steering_arguments(parser)
    json_flag(parser)


def _steering_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--record-routing",
        type=path,
        metavar="FILE",
        help="write which experts computed which token, as safetensors; for one prompt",
    )
    parser.add_argument(
        "--replay-routing",
        type=path,
        metavar="FILE",
        help="send tokens to the experts that were recorded, of the same prompt",
    )
    parser.add_argument(
        "--mute",
        type=_expert,
        action="append",
        default=[],
        metavar="LAYER:EXPERT",
        help="an expert that nothing goes to; may be repeated",
    )
    parser.add_argument(
        "--experts-per-token", type=int, metavar="N", help="fewer experts a token than the model chooses"
    )


def _expert(text: str) -> tuple[int, int]:
    layer, colon, expert = text.partition(":")
    if not (colon and layer.isdecimal() and expert.isdecimal() and len(text) < _LONGEST_NAME):
        raise ArgumentTypeError(f"{text!r} names no expert; write its layer and its number, such as 3:17")
    return int(layer), int(expert)


def run(options: Namespace) -> int:
    prompts = _prompts(options)
    if len(prompts) > 1 and (options.record_routing or options.replay_routing):
        raise ConsiliumError("generate: routing is recorded and replayed of one prompt; give one.")
    if options.record_routing is not None:
        check_place(options.record_routing)
    opened = open_model(options)
    recorded = _recorded(options)
    form = opened.form() if options.chat else None
    engine = opened.engine()
    from consilium.engine.request import requests_of

    clock = Clock()
    common, ids = _asked(prompts, form, engine, options)
    steered = replace(
        common, steering=_steering(options, recorded), routes=options.record_routing is not None
    )
    requests = requests_of(steered, ids)
    _check(recorded, engine, requests, options)
    stream = _recording(engine, requests, options.record_routing)
    if options.json:
        print(json.dumps(_told(engine, common.sampling, _gather(prompts, list(clock.timed(stream))), clock)))
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
    note(f"{clock}{guesses_told(engine)}")
    return 0


def _told(
    engine: Engine, sampling: Sampling, completions: list[dict[str, object]], clock: Clock
) -> dict[str, object]:
    guessed, right = engine.guesses
    return {
        "completions": completions,
        "seed": sampling.seed if sampling.temperature else None,
        "speed": {
            "first_token_seconds": clock.first,
            "tokens_per_second": clock.rate,
            "guessed": guessed,
            "guessed_right": right,
        },
        "loads": {str(layer): load_E for layer, load_E in engine.loads.items()},
    }


def _recorded(options: Namespace) -> Recording | None:
    from consilium.engine.routes import Recording

    return None if options.replay_routing is None else Recording.read(options.replay_routing)


def _steering(options: Namespace, recorded: Recording | None) -> Steering | None:
    from consilium.engine.steering import Steering

    replayed = None if recorded is None else recorded.routes
    asked = Steering(mute=tuple(options.mute), top_k=options.experts_per_token, replay=replayed)
    return None if asked == Steering() else asked


def _check(
    recorded: Recording | None, engine: Engine, requests: Sequence[Request], options: Namespace
) -> None:
    """Raises ConsiliumError before anything is printed."""
    prompts = [tuple(engine.check(request)) for request in requests]
    if recorded is not None and recorded.tokens[: len(prompts[0])] != prompts[0]:
        raise ConsiliumError(
            f"generate: {options.replay_routing} was recorded of another prompt; give the same one, by the"
            " same model."
        )
    if options.record_routing is not None and engine.model.config.moe is None:
        raise ConsiliumError("generate: a model without experts has no routing to record.")


def _recording(engine: Engine, requests: Sequence[Request], file: Path | None) -> Iterator[Piece]:
    """Pass pieces on, and write the routing of the first prompt when all are there."""
    from consilium.engine.routes import Recording, Routes

    tokens, routes = engine.check(requests[0]), list[Routes]()
    for piece in engine.stream(requests):
        if piece.routes is not None:
            routes.append(piece.routes)
        tokens.append(piece.token)
        yield piece
    if file is not None:
        Recording(tuple(tokens[:-1]), Routes.joined(routes)).write(file)


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
) -> tuple[Request, Sequence[str] | Sequence[Sequence[int]]]:
    """What all prompts ask, and these as the engine takes them."""
    from consilium.data.forms import Message
    from consilium.engine.request import Request

    sampling = sampling_of(options, None if form is None else engine.model.generation)
    stops = tuple(options.stop)
    if form is None:
        return Request(
            prompt=(), max_tokens=options.max_tokens or TOKENS, sampling=sampling, stop=stops
        ), prompts
    note(say("format: {name}", name=form.name))
    common = Request(
        prompt=(),
        max_tokens=options.max_tokens,
        sampling=sampling,
        stop=(*form.stops, *stops),
        stop_ids=(*engine.stop_ids, *form.stop_ids),
    )
    return common, [form.ids((Message("user", prompt),)) for prompt in prompts]


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
