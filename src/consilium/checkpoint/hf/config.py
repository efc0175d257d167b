"""config.json in the keys of Hugging Face and back, without torch.

A configuration is written under the architecture that computes exactly what ours does, whatever its family
is called. The key ``consilium`` beside it holds our own, so that our reload loses nothing. Systems that no
published code computes get ``model_type: consilium``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from consilium.checkpoint.hf.architecture import Architecture, architecture
from consilium.checkpoint.hf.attention import write_attention
from consilium.checkpoint.hf.families import FAMILIES
from consilium.checkpoint.hf.foreign import kind_of
from consilium.checkpoint.hf.generation import token_keys
from consilium.checkpoint.hf.read import from_hugging_face
from consilium.checkpoint.hf.write import network
from consilium.checkpoint.json_file import read_object
from consilium.config.generation import GenerationDefaults
from consilium.config.io import from_data, to_data
from consilium.config.model import FanIn, Model, Normal
from consilium.errors import ConsiliumError

OWN: Final = "consilium"
NAME: Final = "config.json"
_SAYS_NOTHING: Final = frozenset(
    {"architectures", "dtype", "torch_dtype", "use_cache", "transformers_version"}
)
"""Keys that are no part of the model."""


def config_from_folder(folder: Path) -> Model:
    """Read the model of ``folder``: our own key where present, otherwise the keys of a known family.

    Raises ConsiliumError for an unknown family, an option that we do not compute, or contradicting keys.
    """
    path = folder / NAME
    data = read_object(path)
    if OWN not in data:
        return from_hugging_face(data, path)
    config = from_data(Model, data[OWN], where=f"{path}: {OWN}")
    _refuse_contradictions(data, config, path)
    return config


def layout_of(folder: Path) -> Architecture | None:
    """Return whose names the tensors of ``folder`` have, None for our own."""
    data = read_object(folder / NAME)
    return None if data.get("model_type") == OWN else FAMILIES[kind_of(data, folder / NAME)].layout


def to_hugging_face(
    config: Model, *, dtype: str, generation: GenerationDefaults = GenerationDefaults(), own: bool = False
) -> dict[str, Any]:
    """Return the contents of config.json; ``dtype`` is that of the matrices.

    ``own``: of weights in our own layout, whatever the architecture.
    """
    found = None if own else architecture(config)
    shared = _shared(config, dtype) | token_keys(generation)
    if found is None:
        named: dict[str, Any] = {"architectures": ["ConsiliumForCausalLM"], "model_type": OWN}
    else:
        family = FAMILIES[found]
        named = {"architectures": [family.class_name], "model_type": found}
        shared |= {key: values[0] for key, values in family.only.items()}
        shared |= write_attention(config.attention) | network(config, found)
    return named | shared | {OWN: to_data(config)}


def _refuse_contradictions(data: Mapping[str, Any], config: Model, path: Path) -> None:
    """An edit of the keys beside ours must not be lost: they say what we would write for ``config``."""
    written = to_hugging_face(config, dtype="float32", own=data.get("model_type") == OWN)
    kind = written["model_type"]
    if data.get("model_type") == kind and kind != OWN:
        # Ours says what is computed, so that code beside it has nothing to add.
        said = {key: value for key, value in data.items() if key != "auto_map"}
        if from_hugging_face(said, path) == from_hugging_face(written, path):
            return
    for key in _differing(data, written):
        raise ConsiliumError(
            f"{path}: {key} is {str(data.get(key))[:60]}, but the key {OWN!r} beside it says"
            f" {str(written[key])[:60]}; change both, or remove {OWN!r} to go by the other keys."
        )


def _differing(data: Mapping[str, Any], written: Mapping[str, Any]) -> Iterator[str]:
    """Keys of the model that ``data`` has otherwise, those whose edit is plain to see before the others."""
    skipped = {OWN, *token_keys(GenerationDefaults()), *_SAYS_NOTHING}
    keys = [key for key in written if key not in skipped]
    yield from (key for key in keys if key in data and data[key] != written[key])
    if written["model_type"] != OWN:
        yield from (key for key in keys if key not in data)


def _shared(config: Model, dtype: str) -> dict[str, Any]:
    match config.init:
        case Normal(std=std):
            spread = std
        case FanIn(scale=scale):
            spread = (scale / config.hidden_size) ** 0.5
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "initializer_range": spread,
        "use_cache": True,
        # Readers before and after transformers 5 look for different spellings; each finds its own.
        "dtype": dtype,
        "torch_dtype": dtype,
    }
