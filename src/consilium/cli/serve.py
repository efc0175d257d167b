"""``consilium serve``: a model behind the HTTP API that OpenAI's clients speak."""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from consilium.cli.arguments import path, size
from consilium.cli.endings import ended
from consilium.cli.generation import model_arguments, open_checkpoint
from consilium.cli.installed import check_installed
from consilium.cli.progress import note
from consilium.errors import ConsiliumError
from consilium.machine.memory import free_memory
from consilium.words.say import say

if TYPE_CHECKING:
    import socket

    from consilium.cli.generation import Opened
    from consilium.serving.limits import Settings
    from consilium.serving.metrics import Metrics
    from consilium.serving.service import Service

HOST: Final = "127.0.0.1"
PORT: Final = 8000
_SHARE: Final = 0.8
"""Of the memory that is free, unless told otherwise."""
_PAGE: Final = 64
_LARGEST_KEYS: Final = 2**16


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=path, metavar="MODEL", help="a run, a checkpoint, a downloaded folder or a .gguf file"
    )
    parser.add_argument("--host", default=HOST, metavar="NAME", help="address to listen on")
    parser.add_argument("--port", type=_port, default=PORT, metavar="N", help="0 takes one that is free")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="what opens the server; may be repeated; needed to listen beyond this machine",
    )
    parser.add_argument("--api-key-file", type=path, metavar="FILE", help="a key a line, likewise")
    parser.add_argument(
        "--max-queue", type=_count, default=64, metavar="N", help="sequences that may wait; more get a 429"
    )
    parser.add_argument(
        "--max-num-seqs", type=_positive, metavar="N", help="sequences that run at once; default: 64"
    )
    parser.add_argument(
        "--max-model-len",
        type=_positive,
        metavar="N",
        help="tokens of a prompt with its answer; default: the model's length",
    )
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="of weights, cache and all else; default: four fifths of what is free",
    )
    parser.add_argument(
        "--prompt-part",
        type=_part,
        metavar="N",
        help="tokens of a prompt that are computed at once, a multiple of 64; prompts share whole parts of "
        "their beginnings; default: 512",
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        default=1,
        metavar="N",
        help="processes, each with a model, a cache and a queue of its own; they share threads and memory",
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="how clients call it; default: the name of the folder"
    )
    parser.add_argument(
        "--runs",
        type=path,
        metavar="DIR",
        help="training runs that the page shows; default: runs, where there is such a folder",
    )
    model_arguments(parser)


def run(options: Namespace) -> int:
    from consilium.checkpoint.folders import checkpoint_in

    checkpoint = checkpoint_in(options.folder)
    settings = _settings(options)
    check_installed("serve")
    from consilium.serving.run import RENEWS, is_loopback, listening

    if not settings.keys and not is_loopback(options.host):
        raise ConsiliumError(
            f"serve: without a key {options.host} would be open to everybody; give --api-key, or leave"
            " --host out."
        )
    if RENEWS is not None:
        signal.signal(RENEWS, signal.SIG_IGN)  # until there is a model to read again
    with listening(options.host, options.port) as listener:
        memory = options.memory or int(_SHARE * free_memory())
        if options.workers == 1:
            return _serve(checkpoint, options, settings, memory, listener)
        if sys.platform == "win32":
            raise ConsiliumError("serve: --workers needs a system that forks; start several servers instead.")
        from consilium.machine.processors import threads
        from consilium.serving.workers import in_workers

        count = options.workers
        options.threads = options.threads or max(1, threads() // count)
        each = memory // count
        return in_workers(
            count, lambda _: ended(lambda: _serve(checkpoint, options, settings, each, listener))
        )


def _serve(
    checkpoint: Path, options: Namespace, settings: Settings, memory: int, listener: socket.socket
) -> int:
    from consilium.checkpoint.folders import checkpoint_in
    from consilium.serving.metrics import Metrics
    from consilium.serving.run import serve

    metrics = Metrics(settings.name)
    place = f"http://{_bracketed(options.host)}:{listener.getsockname()[1]}"

    def first() -> Service:
        made = _service(open_checkpoint(checkpoint, options), options, settings, metrics, memory)
        note(say("format: {name}", name=made.form.name))
        note(say("{model} at {place}/v1; Ctrl-C stops it", model=settings.name, place=place))
        return made

    def renewed() -> Service:
        newest = checkpoint_in(options.folder)
        note(say("reading {path}", path=newest))
        free = int(_SHARE * free_memory()) // options.workers  # beside the model that still answers
        made = _service(open_checkpoint(newest, options), options, settings, metrics, min(memory, free))
        note(say("{path} answers from now on", path=newest))
        return made

    serve(first, listener, host=options.host, renewed=renewed)
    return 0


def _service(
    opened: Opened, options: Namespace, settings: Settings, metrics: Metrics, memory: int
) -> Service:
    """Read the weights into an engine of its own."""
    from consilium.serving.answers import Spelling
    from consilium.serving.grammar import Grammars
    from consilium.serving.service import Service
    from consilium.serving.worker import Worker

    form = opened.form()
    engine = opened.engine(
        memory=memory,
        most_length=options.max_model_len,
        most_rows=options.max_num_seqs,
        part=options.prompt_part,
    )
    if engine.model.config.max_length < (options.max_model_len or 0):
        raise ConsiliumError(
            f"serve: --max-model-len {options.max_model_len} exceeds the model's length"
            f" {engine.model.config.max_length}; give at most that."
        )
    worker = Worker(engine, most_waiting=settings.most_waiting)
    grammars = Grammars(opened.tokenizer, engine.model.config.vocab_size, engine.stop_ids)
    spelling = Spelling(opened.tokenizer)
    return Service(engine, worker, opened.tokenizer, form, settings, metrics, grammars, spelling)


def _settings(options: Namespace) -> Settings:
    from consilium.serving.limits import Settings

    keys = (*options.api_key, *(() if options.api_key_file is None else _keys(options.api_key_file)))
    if "" in keys:
        raise ConsiliumError("serve: a key is empty and would open the server to everybody; leave it out.")
    name = options.served_model_name or options.folder.resolve().name
    return Settings(name=name, keys=keys, most_waiting=options.max_queue, runs=_runs(options.runs))


def _runs(asked: Path | None) -> Path | None:
    if asked is not None and not asked.is_dir():
        raise ConsiliumError(f"serve: no such folder: {asked}; give --runs the folder that holds your runs.")
    usual = Path("runs")
    return asked or (usual if usual.is_dir() else None)


def _keys(file: Path) -> tuple[str, ...]:
    try:
        text = file.read_bytes()[:_LARGEST_KEYS].decode()
    except OSError as error:
        why = (error.strerror or "error").lower()
        raise ConsiliumError(f"serve: cannot read the keys in {file} ({why}); give a text file.") from None
    except UnicodeDecodeError:
        raise ConsiliumError(f"serve: {file} is no text, so it holds no keys; give a text file.") from None
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise ConsiliumError(f"serve: {file} holds no key; write one a line.")
    return keys


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**16:
        raise ArgumentTypeError(f"{text!r} is no port; use 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise ArgumentTypeError(f"{text!r} is no number of things; use 0 or more")
    return int(text)


def _part(text: str) -> int:
    if not (number := _count(text)) or number % _PAGE:
        raise ArgumentTypeError(f"{text!r} is no multiple of {_PAGE}; use {_PAGE} or more")
    return number


def _positive(text: str) -> int:
    if not (number := _count(text)):
        raise ArgumentTypeError("0 is too few; use 1 or more")
    return number
