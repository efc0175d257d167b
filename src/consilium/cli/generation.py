"""What ``generate`` and ``chat`` share: options of sampling, an engine from a model, how fast it was."""

from __future__ import annotations

import os
import secrets
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from consilium.cli.arguments import path
from consilium.cli.progress import note
from consilium.cli.running import Place, running_arguments, settle, weights_argument
from consilium.errors import ConsiliumError
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.config.generation import GenerationDefaults
    from consilium.data.tokenizer import Tokenizer
    from consilium.engine.chat import Format
    from consilium.engine.drafts import Speculation
    from consilium.engine.engine import Engine
    from consilium.engine.request import Piece, Sampling
    from consilium.kv.rows import CacheFormat
    from consilium.model.decoder import Decoder
    from consilium.ops.weights import Packing

BESIDE: Final = int(0.4 * 2**30)
"""Bytes of a process that are neither weights nor cache."""
LEAST_TOKENS: Final = 256
"""Below which a cache is of no use."""
SETTINGS: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_DRAW: Final = ("top_k", "top_p", "min_p", "seed")
"""What only a draw reads."""


def generation_arguments(parser: ArgumentParser, *, tokens: str, temperature: str) -> None:
    """Add MODEL and the options of sampling; help names ``tokens`` and ``temperature`` as defaults."""
    parser.add_argument(
        "folder", type=path, metavar="MODEL", help="a run, a checkpoint, a downloaded folder or a .gguf file"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"new tokens at most; default: {tokens}")
    parser.add_argument(
        "--temperature", type=float, metavar="X", help=f"0 takes the likeliest; default: {temperature}"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="keep the N likeliest tokens; 0 is off, the default"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="keep the likeliest tokens of mass P; 1 is off, the default"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens P times as likely as the likeliest; default: 0"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="against tokens that were there; default: 1"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the draws; default: another one each time, which is told"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    model_arguments(parser)


def model_arguments(parser: ArgumentParser) -> None:
    """Add how a model is read and computed."""
    running_arguments(parser)
    weights_argument(parser)
    parser.add_argument(
        "--cache",
        choices=("int8",),
        help="keep latents in 8 bits, about half of what they take; default: in the dtype of the model",
    )
    parser.add_argument(
        "--speculate",
        choices=("ngram", "mtp"),
        help="guess tokens and check several in one pass, which changes no text: ngram guesses what followed "
        "before, mtp by the model's own multi-token prediction modules; default: neither",
    )
    parser.add_argument(
        "--draft", type=int, metavar="N", help="tokens to guess for a pass; default: 4 by ngram, 1 by mtp"
    )


def check_settings(options: Namespace) -> None:
    """Refuse what no model allows, before one is read, and tell what will do nothing."""
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ConsiliumError(f"--max-tokens {options.max_tokens} is less than 1; give the tokens to add.")
    if "" in options.stop:
        raise ConsiliumError("a stop text is empty and would end every answer at once; leave --stop out.")
    from consilium.engine.request import Sampling

    Sampling(**_given(options))


@dataclass(frozen=True, slots=True)
class Opened:
    """A model whose weights are still to be read."""

    path: Path
    """The checkpoint or GGUF file that it is in."""
    tokenizer: Tokenizer
    place: Place
    packing: Packing | None
    cache: CacheFormat
    speculation: Speculation | None

    def form(self) -> Format:
        """How the model reads a conversation."""
        from consilium.engine.chat import chat_format

        return chat_format(self.path, self.tokenizer)

    def engine(
        self,
        *,
        memory: int | None = None,
        most_length: int | None = None,
        most_rows: int | None = None,
        part: int | None = None,
    ) -> Engine:
        """Read the weights, which may take minutes. ``memory`` is for them, the cache and all else."""
        import torch

        from consilium.checkpoint import store
        from consilium.engine.drafts import Ahead, check_speculation
        from consilium.engine.engine import MOST_ROWS, Engine
        from consilium.kv.rows import rows_of

        config = store.open_folder(self.path, packed=True).config  # told before minutes of reading
        rows_of(config.attention, self.cache, torch.bfloat16)
        check_speculation(config, self.speculation)
        tell_kernels()
        model = store.load(self.path, dtype=self.place.dtype, weights=self.packing, check_finite=True).to(
            self.place.device
        )
        modules = config.mtp.depth if isinstance(self.speculation, Ahead) else 0
        most = None if memory is None else tokens_within(memory, model, self.cache, modules)
        if most is not None:  # all rows at their longest, and as much again for beginnings
            most = min(most, 2 * (most_rows or MOST_ROWS) * model.config.max_length)
        engine = Engine(
            model,
            self.tokenizer,
            cache=self.cache,
            most_tokens=most,
            most_length=most_length,
            most_rows=most_rows or MOST_ROWS,
            speculation=self.speculation,
            part=part,
        )
        tell_unread(engine)
        return engine


def tokens_within(memory: int, model: Decoder, cache: CacheFormat, modules: int) -> int:
    """Tokens that the cache may hold beside the weights and what else a process needs.

    Raises ConsiliumError where there is no room for a sequence.
    """
    from consilium.kv.build import token_bytes

    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    each = token_bytes(model.config, model.dtype, cache, modules)
    tokens = (memory - weights - BESIDE) // each
    if tokens < LEAST_TOKENS:
        need = weights + BESIDE + LEAST_TOKENS * each
        raise ConsiliumError(
            f"--memory {memory / 2**30:.2f} GiB is too little: weights of {weights / 2**30:.2f} GiB and a"
            f" cache of {LEAST_TOKENS} tokens need {need / 2**30:.2f} GiB; give more, or --weights int8."
        )
    return tokens


def tell_kernels() -> None:
    """Say what takes seconds once, or what is missing and what helps."""
    from consilium.ops.native.compile import VARIABLE, Missing, planned
    from consilium.ops.native.library import found

    plan = planned()
    if not isinstance(plan, Missing) and not plan.is_there:
        note(say("compiling kernels for this processor, once"))
    kernels = found()
    if isinstance(kernels, Missing) and os.environ.get(VARIABLE) != "off":
        note(
            say(
                "slower, without native kernels: {reason}; {remedy}",
                reason=kernels.reason,
                remedy=kernels.remedy,
            )
        )


def tell_unread(engine: Engine) -> None:
    """Say where PyTorch decodes although there are kernels, and what helps."""
    from consilium.ops.native.library import TYPES, kernels

    if engine.by_kernels or engine.model.device.type != "cpu" or kernels() is None:
        return
    if engine.model.dtype in TYPES:
        note(say("slower: the native kernels do not know a part of this model, and PyTorch decodes"))
    else:
        dtype = str(engine.model.dtype).removeprefix("torch.")
        note(say("slower: the native kernels do not read {dtype}; give --dtype bfloat16", dtype=dtype))


def open_model(options: Namespace) -> Opened:
    """A run's newest checkpoint, a checkpoint or a GGUF file.

    Raises ConsiliumError for any other path, and for a tokenizer of another model.
    """
    from consilium.checkpoint.folders import checkpoint_in

    checkpoint = checkpoint_in(options.folder)  # light: what is no model is told before torch is imported
    check_settings(options)
    return open_checkpoint(checkpoint, options)


def open_checkpoint(checkpoint: Path, options: Namespace) -> Opened:
    """The same of a folder that is known to hold one."""
    from consilium.checkpoint.folders import check_vocabulary

    place = settle(options)
    from consilium.checkpoint import store
    from consilium.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(checkpoint)
    check_vocabulary(tokenizer.vocab_size, store.open_folder(checkpoint, packed=True).config.vocab_size)
    speculation = speculation_of(options)
    return Opened(checkpoint, tokenizer, place, options.weights, options.cache or "model", speculation)


def speculation_of(options: Namespace) -> Speculation | None:
    """Raises ConsiliumError for a number of tokens that cannot be guessed, or by nobody."""
    from consilium.engine.drafts import Ahead, NGrams

    kinds = {"ngram": NGrams, "mtp": Ahead}
    if options.speculate is None:
        if options.draft is not None:
            raise ConsiliumError("--draft guesses by no way; add --speculate ngram or mtp.")
        return None
    kind = kinds[options.speculate]
    return kind() if options.draft is None else kind(options.draft)


def guesses_told(engine: Engine) -> str:
    """How many guesses were right; nothing where there were none."""
    guessed, right = engine.guesses
    if not guessed:
        return ""
    return say(
        "; {right} of {guessed} guesses right ({share:.0%})",
        right=right,
        guessed=guessed,
        share=right / guessed,
    )


def sampling_of(options: Namespace, defaults: GenerationDefaults | None) -> Sampling:
    """What was asked for, else what the model's files say, else greedy; with a seed that is told.

    Options that then do nothing are named on standard error.
    """
    from consilium.engine.request import Sampling

    theirs = {} if defaults is None else {name: getattr(defaults, name) for name in SETTINGS}
    said = {name: value for name, value in theirs.items() if value is not None} | _given(options)
    if not said.get("top_p", 1.0):
        del said["top_p"]  # some files write 0 for off
    if not said.get("temperature"):
        for name in (name for name in _DRAW if getattr(options, name) is not None):
            note(
                say(
                    "--{option} does nothing at temperature 0; add --temperature 0.7 or so.",
                    option=name.replace("_", "-"),
                )
            )
    elif options.seed is None:
        said["seed"] = secrets.randbelow(2**31)
        note(say("seed {seed}; the same text again with --seed {seed}", seed=said["seed"]))
    return Sampling(**said)


def _given(options: Namespace) -> dict[str, Any]:
    names = (*SETTINGS, "seed")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


@final
class Clock:
    """Passes pieces on and measures them."""

    def __init__(self) -> None:
        self.tokens = 0
        self.first: float | None = None
        """Seconds to the first token."""
        self.seconds = 0.0

    def timed(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        began = time.perf_counter()
        for piece in pieces:
            self.seconds = time.perf_counter() - began
            self.first = self.seconds if self.first is None else self.first
            self.tokens += 1
            yield piece

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first, None for one token alone."""
        if self.first is None or self.tokens < 2 or self.seconds <= self.first:
            return None
        return (self.tokens - 1) / (self.seconds - self.first)

    def __str__(self) -> str:
        first = "" if self.first is None else say(", the first after {seconds:.2f} s", seconds=self.first)
        rate = "" if self.rate is None else say(", then {rate:,.1f} tokens/s", rate=self.rate)
        tokens = say("1 token") if self.tokens == 1 else say("{n} tokens", n=self.tokens)
        return f"{tokens}{first}{rate}"
