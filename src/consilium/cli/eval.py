"""``consilium eval``: bits per byte of a model on text, by domain, and what it was measured on."""

from __future__ import annotations

import dataclasses
import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, final

from consilium.cli.arguments import count, json_flag, path
from consilium.cli.generation import tell_kernels
from consilium.cli.progress import QUIET_SECONDS, Lines, note
from consilium.cli.running import Place, running_arguments, settle, weights_argument
from consilium.errors import ConsiliumError
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.config.data import Data, TextPath
    from consilium.config.training import Training
    from consilium.data.corpus import Corpus
    from consilium.data.documents import Document
    from consilium.evaluation.bits import Evaluation
    from consilium.model.decoder import Decoder
    from consilium.records.tokens import TokensRead


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=path, metavar="FOLDER", help="a run, a checkpoint in it or elsewhere, or a .gguf file"
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help="[NAME=]PATH, a file or folder of text, several times too, or builtin; default: what the run"
        " held out",
    )
    parser.add_argument(
        "--seq",
        type=count,
        metavar="S",
        help="context: tokens a window; default: as in the run's training, else the model's, at most 2,048",
    )
    parser.add_argument(
        "--stride", type=count, metavar="N", help="tokens between windows; default: S, no overlap"
    )
    parser.add_argument(
        "--limit", type=count, metavar="N", help="at most N bytes a domain, or questions a task"
    )
    parser.add_argument(
        "--tokens-page",
        type=path,
        metavar="FILE",
        help="also write a page of the text, each token in the colour of its expert",
    )
    parser.add_argument(
        "--beside",
        type=path,
        metavar="FOLDER",
        help="on that page a second model too, such as the one before its gates were trained",
    )
    parser.add_argument(
        "--tasks",
        action="append",
        default=[],
        metavar="NAME",
        help="a task of lm-evaluation-harness instead of text, several times too; needs lm_eval",
    )
    parser.add_argument(
        "--tasks-path", type=path, metavar="DIR", help="where YAML files of more tasks are, which it trusts"
    )
    parser.add_argument("--shots", type=count, metavar="N", help="examples before each question of a task")
    running_arguments(parser)
    weights_argument(parser)
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.checkpoint.folders import check_vocabulary, checkpoint_in

    checkpoint = checkpoint_in(options.folder)  # light: what is no model is told before torch is imported
    _check_page(options)
    if options.tasks or options.tasks_path is not None or options.shots is not None:
        return _run_tasks(options, checkpoint)
    from consilium.checkpoint import store
    from consilium.data.corpus import measured_corpus
    from consilium.data.tokenizer import Tokenizer
    from consilium.evaluation.bits import measure
    from consilium.evaluation.texts import reading_of
    from consilium.report.tokens import build_tokens_page

    place = settle(options)
    run_folder, stored = _run_of(options.folder)
    tokenizer, config = Tokenizer.load(checkpoint), store.open_folder(checkpoint, packed=True).config
    check_vocabulary(tokenizer.vocab_size, config.vocab_size)
    trained = None if stored is None else stored.data.sequence_length
    reading = reading_of(config, options.seq or trained, options.stride)
    documents, name = _documents(options, run_folder, stored)
    corpus = measured_corpus(documents, tokenizer, progress=_Late())
    model = _loaded(checkpoint, options, place)
    read = _tokens_read(options, model, corpus, documents, place)
    with Lines(say("measuring"), say(" tokens")) as lines:
        result = measure(model, corpus, reading, progress=lines)
    print(_json(result, name) if options.json else _table(result, name))
    if read:
        build_tokens_page(read, options.tokens_page)
        note(say("wrote {path}", path=options.tokens_page))
    return 0


def _run_tasks(options: Namespace, checkpoint: Path) -> int:
    from importlib.util import find_spec

    if not options.tasks:
        raise ConsiliumError("eval: --tasks-path and --shots are for tasks; give --tasks NAME.")
    for name in ("data", "seq", "stride", "tokens_page"):
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise ConsiliumError(f"eval: --{option} is for text, and tasks bring their own; drop it.")
    if options.tasks_path is not None and not options.tasks_path.is_dir():
        raise ConsiliumError(
            f"eval: --tasks-path {options.tasks_path} is no folder; give one with YAML files."
        )
    if find_spec("lm_eval") is None:
        raise ConsiliumError("eval: --tasks needs lm_eval, which is not installed; pip install lm_eval.")
    place = settle(options)
    from consilium.data.tokenizer import Tokenizer
    from consilium.engine.engine import Engine
    from consilium.engine.harness import evaluated, table

    engine = Engine(_loaded(checkpoint, options, place), Tokenizer.load(checkpoint))
    include = None if options.tasks_path is None else str(options.tasks_path)
    found = evaluated(engine, options.tasks, include=include, shots=options.shots, limit=options.limit)
    print(json.dumps(found["results"], default=str) if options.json else table(found))
    return 0


def _loaded(checkpoint: Path, options: Namespace, place: Place) -> Decoder:
    import torch

    from consilium.checkpoint import store

    model = store.load(checkpoint, dtype=place.dtype, weights=options.weights, check_finite=True)
    if place.device == "cpu" and (options.weights is not None or model.dtype == torch.bfloat16):
        tell_kernels()
    return model.to(place.device).eval()


def _check_page(options: Namespace) -> None:
    """Raise ConsiliumError for a page that could not be written, before anything is measured."""
    from consilium.checkpoint.folders import checkpoint_in
    from consilium.records.io import is_page, refuse_others

    if options.tokens_page is None:
        if options.beside is not None:
            raise ConsiliumError(
                "eval: --beside is for the page of tokens; give --tokens-page FILE, or drop it."
            )
        return
    refuse_others(options.tokens_page, "page", is_page, "--tokens-page")
    if options.beside is not None:
        checkpoint_in(options.beside)


def _tokens_read(
    options: Namespace, model: Decoder, corpus: Corpus, documents: list[Document], place: Place
) -> list[TokensRead]:
    """What a page of tokens shows; nothing where none is asked for."""
    from consilium.analysis.tokens import observe_tokens
    from consilium.checkpoint.folders import check_vocabulary, checkpoint_in
    from consilium.data.corpus import measured_corpus
    from consilium.data.tokenizer import Tokenizer

    if options.tokens_page is None:
        return []
    found = [observe_tokens(model, corpus, str(options.folder))]
    if options.beside is not None:
        checkpoint = checkpoint_in(options.beside)
        other = _loaded(checkpoint, options, place)
        tokenizer = Tokenizer.load(checkpoint)
        check_vocabulary(tokenizer.vocab_size, other.config.vocab_size, options.beside)
        found.append(observe_tokens(other, measured_corpus(documents, tokenizer), str(options.beside)))
    return found


@final
class _Late:
    """Says what goes on once it takes over two seconds."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._begun > QUIET_SECONDS:
            note(text)


def _run_of(folder: Path) -> tuple[Path | None, Training | None]:
    """The run that ``folder`` is or lies in."""
    from consilium.records.run import META_FILE
    from consilium.training.files import stored_config

    inside = folder.absolute()
    for place in (inside, *inside.parents[:2]):
        if (place / META_FILE).is_file() and (stored := stored_config(place)) is not None:
            return place, stored
    return None, None


def _documents(
    options: Namespace, run_folder: Path | None, stored: Training | None
) -> tuple[list[Document], str]:
    """All of the user's text, or what the run held out: text that it trained on would flatter it."""
    from consilium.config.data import BUILT_IN, Data
    from consilium.data.corpus import whole_documents
    from consilium.data.documents import Text
    from consilium.data.library import Library, source_texts
    from consilium.evaluation.texts import limited

    if options.data is not None and options.data != [BUILT_IN]:
        texts = [text for source in _sources(options.data) for text in source_texts(source, note)]
        return whole_documents(limited(texts, options.limit)), ", ".join(options.data)
    if options.data is None and stored is None:
        raise ConsiliumError(
            f"eval: {options.folder} is no run, so it holds no text out; give --data PATH, or --data"
            f" {BUILT_IN} for the built-in text."
        )
    data = Data() if options.data is not None or stored is None else stored.data
    library = Library.open(data, note)
    if options.data is None and run_folder is not None:
        _check_same(run_folder, library.sha256)
    held_out = [Text(d.content, d.domain, d.name, d.name) for d in library.all_documents(held_out=True)]
    return whole_documents(limited(held_out, options.limit)), f"held out of {_named(data)}"


def _check_same(run_folder: Path, sha256: str) -> None:
    """What is held out of another text may be what the run was trained on."""
    from consilium.records.run import META_FILE

    meta = json.loads((run_folder / META_FILE).read_text(encoding="utf-8"))
    if meta.get("corpus_sha256") != sha256:
        raise ConsiliumError(
            f"eval: the text has changed since {run_folder} was trained on it, so what it would hold out now"
            " may be text that it has seen; restore the text, or give --data PATH with text of its own."
        )


def _sources(given: list[str]) -> list[TextPath]:
    """Text of the user's own, all of which is read."""
    from consilium.config.data import TextPath, read_source
    from consilium.data.library import refuse_twice

    sources: list[TextPath] = []
    for text in given:
        source = read_source(text)
        if not isinstance(source, TextPath):
            raise ConsiliumError(f"eval: --data {text} stands alone, without a weight or other text.")
        if source.weight is not None:
            raise ConsiliumError(f"eval: all text is read, so --data {text} takes no weight; drop it.")
        sources.append(source)
    refuse_twice([Path(source.path) for source in sources])
    return sources


def _named(data: Data) -> str:
    from consilium.config.data import TextPath

    return ", ".join(s.path if isinstance(s, TextPath) else "the built-in text" for s in data.sources)


def _json(result: Evaluation, name: str) -> str:
    fields = dataclasses.asdict(result) | {"data": name, "loads": _loads(result)}
    return json.dumps(fields)


def _loads(result: Evaluation) -> dict[str, dict[str, object]]:
    return {
        str(layer): {
            "load": found.counts,
            "wanted": found.wanted,
            "entropy": found.entropy,
            "dropped_frac": found.dropped_fraction,
        }
        for layer, found in result.loads.items()
    }


def _table(result: Evaluation, name: str) -> str:
    from consilium.report.plain import columns

    figures = [*result.domains.items(), (say("mean"), result.bits_per_byte)]
    lines = [columns([(domain, f"{value:.4f}", say("bits per byte")) for domain, value in figures])]
    counts = dataclasses.asdict(result)
    lines.append(
        say(
            "{name}: {bytes:,} bytes of {documents:,} documents, {tokens:,} tokens, context {context}, stride"
            " {stride}",
            name=name,
            **{key: counts[key] for key in ("bytes", "documents", "tokens", "context", "stride")},
        )
    )
    if not result.causal:
        lines.append(
            say(
                "not comparable: this model is not causal, its experts choose among tokens that come later,"
                " so the figure is none of prediction"
            )
        )
    return "\n".join(lines)
