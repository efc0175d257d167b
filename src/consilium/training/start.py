"""Where a run's weights begin, and the digests that make that part of its identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from consilium.checkpoint import store
from consilium.checkpoint.weights import digest
from consilium.config.model import Model
from consilium.config.training import Folder, Random, StartTokenizer, StartWeights, Training
from consilium.data.corpus import Corpus, fingerprint
from consilium.errors import ConsiliumError
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.parallel.mesh import ALONE, Mesh
from consilium.training.freeze import freeze
from consilium.training.spread import allocated, drawn
from consilium.words.say import say

S = TypeVar("S", StartWeights, StartTokenizer)


def initial(
    config: Training,
    corpus: Corpus,
    device: str = "cpu",
    mesh: Mesh = ALONE,
    *,
    notice: Callable[[str], None] = lambda _: None,
) -> tuple[Decoder, Training]:
    """A model at step 0, and ``config`` with the digests of what it begins with.

    What a folder holds and the model has no place for is told. Raises ConsiliumError where a folder holds
    other weights than the model takes, or than ``config`` says.
    """
    match config.init:
        case Random():
            model, init = drawn(config, mesh, device), config.init
        case Folder() as init:
            source = _opened(init, config)
            _tell_left(source, init.path, config.model, notice)
            model = allocated(
                config.model, mesh, device, generation=source.generation, overlap=config.overlap
            )
            content = store.Content.of(model)
            store.fill(content, source, mesh)
            digest = mesh.world.led(lambda: _digest(content, source, whole=mesh.world.size == 1))
            init = _settled(init, digest, "weights")
    freeze(model, config.freeze)
    return model, dataclasses.replace(config, init=init, tokenizer=tokenizer_of(config, corpus))


def tokenizer_of(config: Training, corpus: Corpus) -> StartTokenizer:
    """``config.tokenizer`` with its digest. Raises ConsiliumError where the folder has another by now."""
    if isinstance(config.tokenizer, Folder):
        return _settled(config.tokenizer, fingerprint(corpus.tokenizer), "tokenizer")
    return config.tokenizer


def as_stored(asked: Training, stored: Training) -> Training:
    """``asked`` with the digests of ``stored`` where it names the same places without any."""
    return dataclasses.replace(
        asked,
        init=_with_digest(asked.init, stored.init),
        tokenizer=_with_digest(asked.tokenizer, stored.tokenizer),
    )


def _with_digest(asked: S, stored: S) -> S:
    if isinstance(asked, Folder) and isinstance(stored, Folder) and asked.sha256 is None:
        return stored if asked.path == stored.path else asked
    return asked


def _settled(folder: Folder, sha256: str, what: str) -> Folder:
    if folder.sha256 not in (None, sha256):
        raise ConsiliumError(
            f"train: {folder.path} has another {what} than when this configuration was made (SHA-256"
            f" {sha256}, not {folder.sha256}); restore it, or take sha256 out of the configuration."
        )
    return dataclasses.replace(folder, sha256=sha256)


def _opened(folder: Folder, config: Training) -> store.Source:
    """The weights of a folder, of which nothing is read yet, where the model has a place for every need.

    State that balances begins anew where the folder has none.
    """
    source = store.open_folder(folder.path, dtype="float32")
    if source.config.vocab_size != config.model.vocab_size:
        raise ConsiliumError(
            f"train: {folder.path} has a vocabulary of {source.config.vocab_size} tokens and the model one of"
            f" {config.model.vocab_size}; give them the same."
        )
    for name, parameter in build(config.model, device="meta").named_parameters():
        if name not in source.state or source.state[name].shape != parameter.shape:
            raise ConsiliumError(
                f"train: {folder.path} has no weight {name} of shape {list(parameter.shape)}; give the model"
                " the settings of that folder."
            )
    return source


def _tell_left(source: store.Source, path: str, model: Model, notice: Callable[[str], None]) -> None:
    wanted = build(model, device="meta").state_dict()
    left = [name for name in source.state if name not in wanted]
    if left:
        notice(
            say(
                "{count} tensors of {folder} have no place in the model and are left out, such as {name}",
                count=len(left),
                folder=path,
                name=left[0],
            )
        )


def _digest(model: store.Content, source: store.Source, *, whole: bool) -> str:
    """The digest of all values; what is in parts is read again, a tensor at a time."""
    return digest(
        (name, tensor if whole or name not in source.state else source.read(name))
        for name, tensor in sorted(model.weights.items())
    )
