"""Write the golden vectors of every system: ``cd tests && python -m conformance.generate [MODEL ...]``.

Expectations come from transformers where it has the router, from ``by_hand`` and from plain loops. Where two
of them speak about the same thing they must agree, or nothing is written.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from conformance import by_hand, inputs, naive, oracles
from consilium.config import io
from consilium.recipes import catalogue

Data = dict[str, Any]
ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "src/consilium/recipes/vectors"

# The sizes that make a recipe small; every rule stays. Groups and devices keep their numbers.
SYSTEMS: dict[str, dict[str, str]] = {
    "jacobs:tiny": {},
    "dense-moe:tiny": {},
    "shazeer:256": {"experts": "16"},
    "shazeer:1024-h": {"experts": "16", "router.select.groups": "4"},
    "gshard:600b": {"experts": "8"},
    "switch:c": {"experts": "8"},
    "hash:2b": {"experts": "8", "router.select.vocab_size": "8", "router.select.k": "2"},
    "expert-choice:8b-64e": {"experts": "8"},
    "mixtral:8x7b": {},
    "llama-moe:3.0b-2-16": {},
    "deepseek-moe:16b": {"experts": "16"},
    "deepseek-moe:145b": {"experts": "16", "router.select.k": "6"},
    "deepseek-v2:236b": {"experts": "32", "admission.exempt": "0"},
    "deepseek-v2:lite": {"experts": "16"},
    "deepseek-v3:671b": {"experts": "32"},
    "qwen-moe:a2.7b": {"experts": "16"},
    "qwen-moe:57b": {"experts": "16"},
    "qwen3-moe:235b": {"experts": "16"},
    "olmoe:7b": {"experts": "16"},
    "nemotron-moe:e8g8t8": {"experts": "16"},
    "nemotron-moe:e8g1t2": {"experts": "16"},
    "latent-moe": {"experts": "16", "router.select.k": "4"},
    "grok-1:314b": {},
    "skywork-moe:146b": {},
}
HAND = {"shazeer:1024-h": "shazeer-h", "deepseek-moe:145b": "deepseek-moe-devices"}
LOOPS = "plain loops"
TIES = (
    f"{LOOPS}, ties to the lower expert; transformers leaves the order of ties open, so its weights are"
    " compared and its expert numbers are not"
)
GROUP_TIES = (
    f"{LOOPS}, ties to the lower group and expert; transformers may open another group of the same score"
)


def vectors(model: str) -> Data:
    """All cases of one system with what is expected of them."""
    config = catalogue.recipe(model).moe
    assert config is not None
    moe = io.to_data(io.replace(config, SYSTEMS[model]))
    system = model.partition(":")[0]
    drawn = zip(*(inputs.cases(moe, seed) for seed in range(8)), strict=True)
    made = [answered(moe, next(case for case in same if stable(moe, case)), system) for same in drawn]
    if (worked := by_hand.worked(HAND.get(model, system))) is not None:
        made.append(by_hand_case(moe, worked))
    return {"model": model, "sizes": SYSTEMS[model], "cases": made}


def at(moe: Data, sizes: dict[str, str]) -> Data:
    """``moe`` with dotted keys replaced, as plain data."""
    out = copy.deepcopy(moe)
    for key, text in sizes.items():
        *path, last = key.split(".")
        node = out
        for part in path:
            node = node[part]
        node[last] = yaml.safe_load(text)
    return out


def answered(moe: Data, case: Data, system: str) -> Data:
    tied, case = case.get("tied", False), {key: value for key, value in case.items() if key != "tied"}
    moe = at(moe, case.get("sizes", {}))
    found = naive.expected(moe, case)
    origin = LOOPS
    top_k = moe["router"]["select"].get("k")
    # The Switch router of transformers is an argmax, whatever k its configuration has.
    if system in oracles.ORACLES and (system, top_k != 1) != ("switch", True):
        name, ask = oracles.ORACLES[system]
        agree(moe, case, found, ask(moe, case), tied)
        ties = GROUP_TIES if moe["router"]["select"].get("groups") else TIES
        origin = ties if tied else f"transformers {version('transformers')}, {name}; the rest by {LOOPS}"
    return {"name": case["name"], "origin": origin, **case, **found}


def stable(moe: Data, case: Data) -> bool:
    """Whether errors of 1e-5 in the inputs leave every choice as it is; ties that are meant may stay."""
    moe, found = at(moe, case.get("sizes", {})), None
    draw = random.Random("stable")
    for reach in (0.0, 1e-5, 1e-5, 1e-5):
        x_TD = [[v + draw.uniform(-reach, reach) for v in row] for row in case["x_TD"]]
        again = naive.expected(moe, {**case, "x_TD": x_TD})
        choices = again["experts_TK"], again["admitted_TK"]
        found = found or choices
        if choices != found:
            return case.get("tied", False)
    return True


def agree(moe: Data, case: Data, found: Data, answer: oracles.Answer, tied: bool) -> None:
    """Put the numbers of transformers into ``found``, after checking that the plain loops give the same."""
    valid = case.get("valid_T") or [True] * len(case["x_TD"])
    tokens = [t for t, ok in enumerate(valid) if ok]
    for t, weights in zip(tokens, answer.weights, strict=True):
        ids, own = found["experts_TK"][t], found["weights_TK"][t]
        if tied:
            if moe["router"]["select"].get("groups") is None:
                assert near(sorted(weights.values()), sorted(own)), (case["name"], t)
            continue
        assert set(weights) == set(ids), (case["name"], t, weights, ids)
        assert near([weights[e] for e in ids], own), (case["name"], t, weights, own)
        found["weights_TK"][t] = [weights[e] for e in ids]
    if tied:
        return
    if answer.admitted is not None:
        kept = [
            [e in fits for e in found["experts_TK"][t]]
            for t, fits in zip(tokens, answer.admitted, strict=True)
        ]
        assert kept == [found["admitted_TK"][t] for t in tokens], (case["name"], kept)
    for rule in moe["balance"]["losses"]:
        if rule["kind"] in answer.losses and rule.get("counts", "all") == "all":
            wanted = rule["coefficient"] * answer.losses[rule["kind"]]
            assert near([wanted], [found["losses"][rule["kind"]]]), (case["name"], rule, wanted)
            found["losses"][rule["kind"]] = wanted


def near(actual: list[float], expected: list[float]) -> bool:
    """Equal but for the rounding of float32."""
    return len(actual) == len(expected) and all(
        math.isclose(a, b, rel_tol=2e-6, abs_tol=1e-12) for a, b in zip(actual, expected, strict=True)
    )


def by_hand_case(moe: Data, worked: Data) -> Data:
    """The worked case with the coefficients of the recipe; what the hand left out is added by plain loops."""
    moe = at(moe, worked.get("sizes", {}))
    case = {**worked, "x_TD": [[as_float32(v) for v in row] for row in worked["x_TD"]]}
    found = naive.expected(moe, case)
    for key in ("experts_TK", "admitted_TK", "load_E"):
        assert found[key] == worked[key], (key, found[key], worked[key])
    for own, row in zip(found["weights_TK"], worked["weights_TK"], strict=True):
        assert near(own, row), (own, row)
    losses = dict(found["losses"])
    for rule in moe["balance"]["losses"]:
        if rule["kind"] in worked["losses"]:
            wanted = worked["losses"][rule["kind"]] * rule.get("coefficient", rule.get("start"))
            assert near([wanted], [losses[rule["kind"]]]), (rule, wanted, losses)
            losses[rule["kind"]] = wanted
    return {**case, "origin": "by hand: tests/conformance/by_hand.py", "losses": losses}


def as_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def written(data: Data) -> str:
    """JSON with one case a line and nine digits, which is all that float32 has."""
    cases = ",\n".join(json.dumps(rounded(case)) for case in data["cases"])
    head = f'{{"model": {json.dumps(data["model"])}, "sizes": {json.dumps(data["sizes"])}, "cases": [\n'
    return f"{head}{cases}\n]}}\n"


def rounded(value: Any) -> Any:
    match value:
        case dict():
            return {key: rounded(inner) for key, inner in value.items()}
        case list():
            return [rounded(inner) for inner in value]
        case float():
            return float(f"{value:.9g}")
    return value


def file_of(model: str) -> Path:
    return VECTORS / f"{model.replace(':', '-')}.json"


def main(models: list[str]) -> None:
    VECTORS.mkdir(exist_ok=True)
    for model in models or SYSTEMS:
        path = file_of(model)
        path.write_text(written(vectors(model)), encoding="utf-8", newline="\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
