"""Sliding windows in the keys of Hugging Face, both ways. No torch."""

from __future__ import annotations

from typing import Any, Final, Literal

from consilium.checkpoint.hf.architecture import Architecture
from consilium.checkpoint.hf.keys import Keys
from consilium.config.attention import GQA
from consilium.config.model import Model

_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"


def read_window(keys: Keys) -> dict[str, Any]:
    """A window of every layer; kinds of layers that contradict it make another model of the family."""
    window = _window(keys)
    if (_FULL if window else _SLIDING) in _kinds(keys):
        raise keys.unsupported("layer_types")
    return window


def read_layer_windows(keys: Keys, rule: Literal["last", "even"]) -> dict[str, Any]:
    """A window of the layers that ``layer_types`` names, or of those that the family takes without it.

    These are the ones from ``max_window_layers`` on, or the even ones below it.
    """
    window, kinds, layers = _used(keys), _kinds(keys), keys.number("num_hidden_layers")
    if not window:
        return {}
    if kinds and len(kinds) != layers:
        raise keys.wrong("layer_types", f"a list of num_hidden_layers, {layers}")
    most = keys.number("max_window_layers", least=0)
    match rule:
        case "last":
            found = [i >= most for i in range(layers)]
        case "even":
            found = [i % 2 == 0 and i < most for i in range(layers)]
    slides = [kind == _SLIDING for kind in kinds] or found
    full = [i for i, inside in enumerate(slides) if not inside]
    return window | {"full_layers": full} if any(slides) else {}


def read_agreed_window(keys: Keys) -> dict[str, Any]:
    """A window of every layer, where no version of the family's code takes fewer."""
    window = _used(keys)
    if window and (keys["max_window_layers"] != 0 or _FULL in _kinds(keys)):
        raise keys.unsupported("sliding_window")
    return window


def write_windows(config: Model, found: Architecture) -> dict[str, Any]:
    """In the keys that readers of the architecture look for, older ones included."""
    gqa = config.attention
    window, full = (gqa.window, gqa.full_layers) if isinstance(gqa, GQA) else (None, ())
    if found in {"mistral", "mixtral"}:
        return {"sliding_window": window}
    first = len(full) if full == tuple(range(len(full))) else config.layers
    plain = {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.layers if window is None else first,
    }
    if window is None or found == "qwen3_moe":
        return plain
    return plain | {"layer_types": [_FULL if i in full else _SLIDING for i in range(config.layers)]}


def _used(keys: Keys) -> dict[str, Any]:
    """The window where the family's switch turns it on; layers that have one without it contradict it."""
    if keys.flag("use_sliding_window"):
        return _window(keys)
    if _SLIDING in _kinds(keys) and _window(keys):
        raise keys.unsupported("layer_types")
    return {}


def _window(keys: Keys) -> dict[str, Any]:
    """One at least as long as any text changes nothing."""
    length = keys.number("max_position_embeddings")
    window = keys.number_or("sliding_window", length)
    return {"window": window} if window < length else {}


def _kinds(keys: Keys) -> list[str]:
    kinds = [str(kind) for kind in keys.listed("layer_types")]
    if any(kind not in {_FULL, _SLIDING} for kind in kinds):
        raise keys.unsupported("layer_types")
    return kinds
