"""Which tokens begin, end and pad a text, and how to sample it: config.json and generation_config.json.

No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from consilium.checkpoint.json_file import read_object
from consilium.config.generation import GenerationDefaults
from consilium.errors import ConsiliumError

NAME: Final = "generation_config.json"
_CONFIG: Final = "config.json"
_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_LARGEST: Final = 2**31


def read_generation(folder: Path) -> GenerationDefaults:
    """Return what the files of ``folder`` say; nothing where they do not exist.

    An id that generation_config.json does not name is that of config.json. ``temperature`` is 0 where
    ``do_sample`` is false. Raises ConsiliumError naming the file and key of a value that makes no sense.
    """
    config, own = (_object(folder / name) for name in (_CONFIG, NAME))
    said = {key: next((k for k in (own, config) if k.get(key) is not None), {}) for key in _TOKENS}
    places = {key: folder / (NAME if keys is own else _CONFIG) for key, keys in said.items()}
    begin, ends, padding = (_ids(said[key], places[key], key) for key in _TOKENS)
    path = folder / NAME
    top_k = _number(own, path, "top_k", -1, _LARGEST)
    return GenerationDefaults(
        begin=next(iter(begin), None),
        ends=ends,
        padding=next(iter(padding), None),
        temperature=_temperature(own, path),
        top_k=None if top_k is None else max(int(top_k), 0),
        top_p=_number(own, path, "top_p", 0, 1),
        min_p=_number(own, path, "min_p", 0, 1),
        repetition_penalty=_number(own, path, "repetition_penalty", 0, 100),
        in_config={key: config[key] for key in _TOKENS if key in config},
        in_generation_config=own,
    )


def token_keys(defaults: GenerationDefaults) -> dict[str, Any]:
    """Return the token ids as config.json has them."""
    return dict.fromkeys(_TOKENS) | (dict(defaults.in_config) or _tokens(defaults))


def generation_config(defaults: GenerationDefaults) -> dict[str, Any]:
    """Return the contents of generation_config.json."""
    if defaults.in_generation_config:
        return dict(defaults.in_generation_config)
    tokens = {key: value for key, value in token_keys(defaults).items() if value is not None}
    sampling = {
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "repetition_penalty": defaults.repetition_penalty,
    }
    said = {key: value for key, value in sampling.items() if value is not None}
    drawn = {"do_sample": defaults.temperature != 0} if said else {}
    return {"_from_model_config": not said, **tokens, **drawn, **said}


def _tokens(defaults: GenerationDefaults) -> dict[str, Any]:
    ends = defaults.ends
    end = list(ends) if len(ends) > 1 else next(iter(ends), None)
    return dict(zip(_TOKENS, (defaults.begin, end, defaults.padding), strict=True))


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _ids(keys: Mapping[str, Any], path: Path, key: str) -> tuple[int, ...]:
    """One id or a list of them; what is negative stands for none in older files."""
    value = keys.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(one) is not int or one >= _LARGEST for one in found):
        raise _wrong(path, key, value, "token ids")
    return tuple(dict.fromkeys(one for one in found if one >= 0))


def _temperature(keys: Mapping[str, Any], path: Path) -> float | None:
    given = _number(keys, path, "temperature", 0, 100)
    match keys.get("do_sample"):
        case False:
            return 0.0
        case True:
            return 1.0 if given is None else given
        case None:
            return given
        case other:
            raise _wrong(path, "do_sample", other, "true or false")


def _number(keys: Mapping[str, Any], path: Path, key: str, least: float, most: float) -> float | None:
    value = keys.get(key)
    if value is None:
        return None
    if type(value) not in {int, float} or not (math.isfinite(value) and least <= value <= most):
        raise _wrong(path, key, value, f"a number from {least:g} to {most:g}")
    return value


def _wrong(path: Path, key: str, value: object, wanted: str) -> ConsiliumError:
    return ConsiliumError(
        f"{path}: {key} is {repr(value)[:60]} and must be {wanted}; mend or remove the key."
    )
