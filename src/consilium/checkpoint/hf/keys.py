"""Reading single keys of a foreign config.json: numbers, options that we lack, rotary positions. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from consilium.errors import ConsiliumError

Keys = Mapping[str, Any]
_LARGEST: Final = 2**48


def number(keys: Keys, path: Path, *names: str) -> int:
    """The first of the spellings ``names`` that is there, a positive whole number or ConsiliumError."""
    value = first(keys, *names)
    if type(value) is not int or not 1 <= value < _LARGEST:
        raise ConsiliumError(
            f"{path}: {names[0]} is {repr(value)[:60]} and must be a positive whole number; restore the file."
        )
    return value


def listed(keys: Keys, path: Path, key: str) -> list[Any]:
    """The list called ``key``, empty where it is absent or null."""
    value = first(keys, key, default=[])
    if not isinstance(value, list):
        raise ConsiliumError(f"{path}: {key} is {str(value)[:60]!r} and must be a list; restore the file.")
    return value


def first(keys: Keys, *names: str, default: Any = None) -> Any:
    """The value of the first of the spellings ``names`` that is there and not null."""
    return next((keys[name] for name in names if keys.get(name) is not None), default)


def only(keys: Keys, path: Path, key: str, *values: object) -> None:
    """Refuse ``key`` by name unless it is absent, null or one of ``values``."""
    if keys.get(key) is not None and keys[key] not in values:
        raise unsupported(path, key, keys[key])


def unsupported(path: Path, key: str, value: object) -> ConsiliumError:
    return ConsiliumError(f"{path}: {key} {str(value)[:60]!r} is not computed here; use a model without it.")


def gqa(keys: Keys, path: Path, *, theta: float = 1e4, **choices: object) -> dict[str, Any]:
    """Grouped-query attention as plain data; heads share the hidden size unless ``head_dim`` is there."""
    only(keys, path, "attention_bias", False)
    heads = number(keys, path, "num_attention_heads")
    head_dim = keys.get("head_dim") or number(keys, path, "hidden_size") // heads
    return {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": keys.get("num_key_value_heads") or heads,
        "head_dim": number({"head_dim": head_dim}, path, "head_dim"),
        "rope": rope(keys, path, theta),
        **choices,
    }


def rope(keys: Keys, path: Path, theta: float) -> dict[str, Any]:
    """Rotary positions in both spellings: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``."""
    found = first(keys, "rope_parameters", "rope_scaling", default={})
    if not isinstance(found, dict):
        raise unsupported(path, "rope_parameters", found)
    for place in (found, keys):
        only(place, path, "partial_rotary_factor", 1.0)
    kind = first(found, "rope_type", "type", default="default")
    plain = {"theta": found.get("rope_theta", keys.get("rope_theta", theta))}
    if kind == "default":
        return plain
    if kind != "yarn":
        raise unsupported(path, "rope_type", kind)
    return plain | {"scaling": _yarn(found, path)}


def _yarn(found: Keys, path: Path) -> dict[str, Any]:
    only(found, path, "truncate", True)
    yarn = {
        "kind": "yarn",
        "factor": found.get("factor"),
        "original_length": found.get("original_max_position_embeddings"),
        "beta_fast": found.get("beta_fast") or 32.0,
        "beta_slow": found.get("beta_slow") or 1.0,
    }
    if found.get("mscale") and found.get("mscale_all_dim"):
        only(found, path, "attention_factor")
        return yarn | {"mscale": found["mscale"], "mscale_all_dim": found["mscale_all_dim"]}
    if found.get("mscale_all_dim"):
        raise unsupported(path, "rope_parameters", dict(found))
    return yarn | _multiplier(found, path)


def _multiplier(found: Keys, path: Path) -> dict[str, Any]:
    """The multiplier m for which 0.1 m ln(factor) + 1 is the attention factor that the file gives."""
    given, factor = found.get("attention_factor"), found.get("factor")
    if given is None:
        return {}
    if not isinstance(given, int | float) or not isinstance(factor, int | float) or not factor > 1:
        raise unsupported(path, "attention_factor", given)
    # Rounded as Yarn.temperature rounds, so that the paper's own factor gives 1 to the last bit.
    slope = (0.1 * math.log(factor) + 1.0) - 1.0
    if not (0 < given < 1e6 and slope > 0):
        raise unsupported(path, "attention_factor", given)
    return {"mscale": (given - 1.0) / slope}


def switch_loss(keys: Keys, default: float) -> dict[str, Any]:
    """The one balance loss that most of transformers' models share, where its coefficient is not zero."""
    coefficient = first(keys, "router_aux_loss_coef", default=default)
    return {"losses": [{"kind": "switch", "coefficient": coefficient}] if coefficient else []}
