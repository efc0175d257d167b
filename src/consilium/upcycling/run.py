"""A trained model made sparse: surveyed on text, cut, certified and written, a layer at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch

from consilium.checkpoint.convert import companions, fill_folder
from consilium.checkpoint.folders import check_vocabulary, checkpoint_in, refuse_inside
from consilium.checkpoint.hf.config import NAME as CONFIG_FILE
from consilium.checkpoint.source import Source
from consilium.checkpoint.store import SCALARS, open_folder
from consilium.checkpoint.weights import digest
from consilium.config.attention import GQA, MLA
from consilium.config.data import BUILT_IN, Data
from consilium.config.io import from_data, to_data
from consilium.config.model import Model
from consilium.config.upcycling import (
    BranchTrainMix,
    Copy,
    Drop,
    Expand,
    Latent,
    Upcycling,
    VirtualGroup,
)
from consilium.data.corpus import Corpus, held_out_corpus, measured_corpus, whole_documents
from consilium.data.paths import path_texts
from consilium.data.tokenizer import Tokenizer
from consilium.disk.atomic import commit_folder
from consilium.disk.files import DISK, Filesystem, refuse_full
from consilium.errors import ConsiliumError
from consilium.evaluation.bits import Reading
from consilium.evaluation.walk import Passage, passages
from consilium.machine.device import choose_device
from consilium.model.build import build
from consilium.planner.latent import is_whole
from consilium.planner.upcycled import (
    begun,
    chosen_together,
    factor,
    needs_equal_weights,
    spread,
    upcycled,
    weighs_copies_alike,
)
from consilium.records.io import to_json
from consilium.records.upcycling import NAME, Certificate, Lineage, Origin
from consilium.upcycling.certificate import certify
from consilium.upcycling.compose import Composed, composed, trunk
from consilium.upcycling.expand import Expanded, expanded
from consilium.upcycling.latent import LatentSource, bases
from consilium.upcycling.rounding import Rounded
from consilium.upcycling.source import Upcycled
from consilium.upcycling.survey import Progress, survey

_CONTEXT: Final = 512
_EQUAL: Final = 1e-5
"""Spread of logits below which weights count as equal."""
_FEWEST: Final = 64
"""Tokens for each expert chosen, so that an even load can be told from an uneven one."""


@final
@dataclass(frozen=True, slots=True)
class How:
    """On what and where the work is done, and in what it is written."""

    data: Path | str | None = None
    """Calibration text; None is what the built-in text holds out."""
    device: str = "cpu"
    """``cpu`` or ``cuda:N``, which is here; blocks run there in float32."""
    dtype: str | None = None
    """Of the weights written; None is that of the source."""


def upcycle(  # noqa: PLR0913 - the public face, by keyword
    dense: Path | str,
    out: Path | str,
    *,
    sources: Sequence[Path | str] | Path | str = (),
    data: Path | str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress = lambda what, done, total: None,
    files: Filesystem = DISK,
    **options: object,
) -> Certificate:
    """Make a sparse model of the one in ``dense`` and write it to the folder ``out``.

    ``dense`` is a run, a checkpoint, a Hugging Face folder or a GGUF file; ``options`` are the fields of
    ``consilium.config.upcycling.Upcycling``, with the name of a method or a value of its class as ``method``.
    ``sources`` are the fine-tunes of ``dense`` that become experts, for the method ``btx`` alone, which needs
    no ``experts`` then.
    ``data`` is calibration text, by default what the built-in text holds out. The certificate compares both
    models on it, in float32 on ``device``, with weights as ``dtype`` (float32, bfloat16 or float16) rounds
    them: that of the result, by default that of the source. Raises ConsiliumError for a model or options that
    do not fit, for too little text and for too little room on the disk, before anything is written.
    """
    places = [sources] if isinstance(sources, str | Path) else sources
    models = [Path(dense), *(Path(place) for place in places)]
    if places:
        options.setdefault("experts", len(places))
    how = How(data, choose_device(device), dtype)
    return run(models, Path(out), _asked(options), how, progress=progress, files=files)


def run(
    models: Sequence[Path],
    out: Path,
    asked: Upcycling,
    how: How = How(),
    *,
    progress: Progress = lambda what, done, total: None,
    files: Filesystem = DISK,
) -> Certificate:
    """``upcycle`` with its options as one value; ``models`` are ``dense`` and then the sources."""
    dense, *sources = models
    folder = checkpoint_in(dense)
    for place in models:
        refuse_inside("upcycle", place, out)
    if (out / CONFIG_FILE).is_file() and not (out / NAME).is_file():
        raise ConsiliumError(f"upcycle: {out} holds a model that no upcycling made; give a new folder.")
    _check_sources(asked, sources)
    stored = open_folder(folder)
    source = Rounded.of(open_folder(folder, dtype=how.dtype, check_finite=True))
    config = upcycled(source.config, asked)
    asked = begun(source.config, asked)
    corpus = _calibration(folder, source.config, how.data)
    text = tuple(passage.to(how.device) for passage in _passages(corpus, asked, config))
    kind = str(_dtype(source)).removeprefix("torch.")
    state = build(config, dtype=kind, device="meta").state_dict()
    bare = Upcycled(source, asked, config, state, {}, {})
    bare = _with_sources(bare, folder, sources, corpus.tokenizer, how.device)
    made: list[Certificate] = []

    def write(staged: Path) -> None:
        needed = sum(tensor.nbytes for tensor in state.values())
        refuse_full(out, needed, "the new model")
        progress("taking", 0, needed)
        sparse = _sparse(bare, text, progress)
        certificate = certify(
            source,
            sparse,
            text,
            promise=promise(source, asked),
            progress=lambda done, total: progress("comparing", done, total),
        )
        lineage = _lineage(dense, stored, sparse, corpus.sha256, certificate)
        lineage = dataclasses.replace(lineage, dtype=how.dtype, device=how.device)
        fill_folder(
            staged,
            sparse,
            beside=companions(folder) | {NAME: f"{to_json(lineage)}\n".encode()},
            progress=lambda done, total: progress("writing", done, total),
            files=files,
        )
        made.append(certificate)

    commit_folder(out, write, unless=(SCALARS,), files=files)
    return made[0]


def _asked(options: Mapping[str, object]) -> Upcycling:
    method = options.get("method")
    plain = {
        key: to_data(v) if dataclasses.is_dataclass(v) and not isinstance(v, type) else v
        for key, v in options.items()
    }
    if isinstance(method, str):
        plain["method"] = {"kind": method}
    return from_data(Upcycling, plain, where="upcycle")


def promise(source: Source, asked: Upcycling) -> float | None:
    """The relative error of the logits that the method stays below; None where it promises nothing.

    With float32 weights; in a narrower dtype a factor that is no power of two rounds, and in float16 a gate
    is too large for equal weights (``consilium.upcycling.rounding.raised``).
    """
    if not _is_exact(source, asked):
        return None
    dtype = _dtype(source)
    wide = dtype == torch.float32
    if isinstance(asked.method, Latent):
        return 1e-4 if wide else 3e-2
    if isinstance(asked.method, Expand):
        return 1e-5 if wide else 3e-2  # rows of copies stay apart when they are rounded
    rounds = math.frexp(factor(asked))[0] != 0.5 or (dtype == torch.float16 and needs_equal_weights(asked))
    return 3e-2 if rounds and not wide else 1e-5


def _dtype(source: Source) -> torch.dtype:
    return source.state["embed.weight"].dtype


def _is_exact(source: Source, asked: Upcycling) -> bool:
    """Whether the experts that a token uses add up to the network, or a latent leaves nothing out.

    Where weights sum to 1, copies do whoever is chosen; otherwise while all logits are equal.
    """
    match asked.method:
        case Latent() as method:
            return isinstance(source.config.attention, GQA) and is_whole(source.config.attention, method)
        case Expand():
            alike = chosen_together(source.config, asked) and weighs_copies_alike(source.config)
            return alike and spread(asked) <= _EQUAL
        case _ if needs_equal_weights(asked):
            return spread(asked) <= _EQUAL and asked.gate != "standardised"
        case Copy() | Drop(fresh=0.0) | VirtualGroup():
            return True
        case _:
            return False


def _calibration(folder: Path, config: Model, data: Path | str | None) -> Corpus:
    try:
        tokenizer = Tokenizer.load(folder)
    except ConsiliumError as error:
        raise ConsiliumError(f"upcycle: {error} Without it there is no text to calibrate on.") from None
    check_vocabulary(tokenizer.vocab_size, config.vocab_size, folder)
    if data is None or (str(data) == BUILT_IN and not Path(data).exists()):
        return held_out_corpus(Data(), tokenizer)
    return measured_corpus(whole_documents(path_texts(Path(data))), tokenizer)


def _passages(corpus: Corpus, asked: Upcycling, config: Model) -> tuple[Passage, ...]:
    share = -(-asked.calibration_tokens // len(corpus.domains))
    found = passages(corpus, Reading(min(_CONTEXT, config.max_length), limit_tokens=share))
    tokens = sum(int(p.tokens(p.inputs.ids_BS).numel()) for p in found)
    needed, why = _needed(asked, config)
    if tokens < needed:
        raise ConsiliumError(
            f"upcycle: the calibration text has {tokens} tokens, and {why} {needed} at least; give more text"
            " with --data, or raise calibration_tokens."
        )
    return found


def _needed(asked: Upcycling, config: Model) -> tuple[int, str]:
    """Tokens, and what for."""
    if isinstance(config.attention, MLA) and isinstance(asked.method, Latent):
        return config.attention.cache_width, f"a cache of {config.attention.cache_width} values a token needs"
    assert config.moe is not None, "the result is sparse"
    experts, active = config.moe.experts, config.moe.most_active
    levelled = f"{experts} experts of which a token uses {active}, to be levelled, need"
    return -(-_FEWEST * experts // active), levelled


def _check_sources(asked: Upcycling, sources: Sequence[Path]) -> None:
    if not isinstance(asked.method, BranchTrainMix):
        if sources:
            raise ConsiliumError(
                f"upcycle: --sources are the experts of btx, and {asked.method.kind} takes one model; give"
                " --method btx, or no --sources."
            )
    elif len(sources) != asked.experts:
        raise ConsiliumError(
            f"upcycle: btx makes an expert of each of --sources, and {asked.experts} experts are asked for of"
            f" {len(sources)} sources; give as many, DENSE itself among them where it is to be an expert."
        )


def _with_sources(
    sparse: Upcycled, folder: Path, sources: Sequence[Path], tokenizer: Tokenizer, device: str
) -> Upcycled:
    """``sparse`` with what its experts and the rest are read from."""
    method = sparse.asked.method
    if not isinstance(method, BranchTrainMix):
        return sparse
    experts = composed(sparse.dense, folder, tokenizer, sources, method).to(device)
    return dataclasses.replace(sparse, dense=trunk(sparse.dense, experts, method), composed=experts)


def _sparse(
    bare: Upcycled, text: Sequence[Passage], progress: Progress
) -> Upcycled | Expanded | LatentSource:
    if isinstance(bare.asked.method, Expand):
        return expanded(Expanded(bare.dense, bare.asked, bare.config, bare.state, {}, {}), text, progress)
    if isinstance(bare.asked.method, Latent):
        found = bases(bare.dense, bare.config, text, progress)
        return LatentSource(bare.dense, bare.asked, bare.config, bare.state, found)
    return survey(bare, text, progress)


def _lineage(
    dense: Path,
    source: Source,
    sparse: Upcycled | Expanded | LatentSource,
    text_sha256: str,
    certificate: Certificate,
) -> Lineage:
    cuts = [sparse.cuts[layer] for layer in sorted(sparse.cuts)] if isinstance(sparse, Upcycled) else []
    whole = isinstance(sparse.asked.method, BranchTrainMix | Copy | Drop | VirtualGroup)
    shared = [plan.shared_N.tolist() for plan in cuts if plan.shared_N is not None]
    return Lineage(
        source=dense.name,
        source_sha256=_digest(source),
        text_sha256=text_sha256,
        upcycling=to_data(sparse.asked),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        certificate=certificate,
        neurons=[] if whole else [plan.neurons_ES.tolist() for plan in cuts],
        shared=shared,
        experts=_origins(sparse.composed) if isinstance(sparse, Upcycled) else (),
    )


def _origins(experts: Composed | None) -> tuple[Origin, ...]:
    if experts is None:
        return ()
    pairs = zip(experts.names, experts.sources, strict=True)
    return tuple(Origin(name=name, sha256=_digest(source)) for name, source in pairs)


def _digest(source: Source) -> str:
    return digest((name, source.read(name)) for name in sorted(source.state))
