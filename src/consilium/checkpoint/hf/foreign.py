"""Whose config.json it is: the family it names, its keys with their defaults, and what is refused by name.

No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from consilium.checkpoint.hf.families import FAMILIES, Family
from consilium.checkpoint.hf.keys import Keys, unsupported
from consilium.errors import ConsiliumError

_KINDS: Final = {family.class_name: name for name, family in FAMILIES.items()}

_OTHERS: Final = frozenset(
    """
    afmoe apertus arcee aria aria_text baichuan bailing_hybrid bailing_moe bamba bert biogpt bitnet
    bloom blt chatglm codegen cohere cohere2 cohere2_moe dbrx deepseek_v32 deepseek_v4 deepseek_vl
    deepseek_vl_v2 diffllama doge dots1 ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon
    falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n gemma4 glm glm4 glm4_moe
    glm4_moe_lite glm_moe_dsa glm4v glm4v_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite
    granitemoe granitemoehybrid granitemoeshared grok-2 helium hunyuan hunyuan_v1_dense hunyuan_v1_moe
    internlm internlm2 internlm3 internvl_chat jais jais2 jamba jetmoe kimi_k2 kimi_k25 kimi_linear
    kimi_vl lfm2 lfm2_moe lfm3 llama4 llama4_text llava longcat_flash mamba mamba2 mimo mimo_v2_flash
    minicpm minicpm3 minimax minimax_m2 minimax_text_01 ministral ministral3 mistral3 mistral4 mllama
    moonshot mpt nanochat nemotron nemotron_h nllb-moe olmo olmo2 olmo3 olmo_hybrid openmoe opt
    persimmon phi phi3 phi3small phi4_multimodal phimoe pixtral qwen qwen2_5_vl qwen2_audio qwen2_vl
    qwen3_5 qwen3_5_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe recurrent_gemma rwkv sarvam_moe
    seed_oss smollm3 solar_open stablelm starcoder2 step3 switch_transformers t5 vaultgemma xglm xlstm
    xverse youtu zamba zamba2
    """.split()  # noqa: SIM905 - a hundred quoted names are not read
)
"""Model types that are somebody's and not ours: never called a slip of the pen."""

_ARITHMETIC: Final = re.compile(
    r"""(^|_)(scale|scaling|rescale|scalar|multiplier|softcap|softcapping|mup|alibi|clip|window|sink|rotary|rope
    |nope|qk_norm|qk_layernorm|use_attn_moe|parallel_residual|parallel_attn|parallel_block|temperature_tuning)
    (_|$)""",
    re.VERBOSE,
)
_HARMLESS: Final = re.compile(
    r"loss|coef|dropout|init|dtype|version|max_window_layers|^attn_implementation$|vision|image|audio|tokenizer"
)
_INACTIVE: Final = (None, False, 0, 1, -1)


def kind_of(found: Mapping[str, Any], path: Path) -> str:
    """The ``model_type`` of a file, known by the class it names where it has none.

    Raises ConsiliumError for one that is not read here.
    """
    named = found.get("architectures")
    last = str(named[0]) if isinstance(named, list) and named else "None"
    kind = str(found["model_type"]) if found.get("model_type") is not None else _KINDS.get(last, last)
    if kind in FAMILIES:
        return kind
    if kind in _OTHERS:
        known = ", ".join(name for name in FAMILIES)
        raise ConsiliumError(f"{path}: {kind} is a known family that is not computed here, only {known}.")
    raise ConsiliumError(f"{path}: architecture {kind[:60]!r} is not known here.{_slip(kind)}")


def completed(found: Mapping[str, Any], path: Path, kind: str) -> Keys:
    """Every key of the family as ``found`` has it, in its first spelling, or as the family's default.

    Raises ConsiliumError naming a key that asks for what is not computed here.
    """
    family = FAMILIES[kind]
    for key, values in family.only.items():
        if found.get(key) is not None and not any(_same(found[key], value) for value in values):
            raise unsupported(path, key, found[key])
    _refuse_code(found, path, family)
    _refuse_unknown(found, path, family)
    spelt = dict(found)
    for other, key in family.spellings.items():
        if spelt.get(other) is not None:
            value = _single(spelt.pop(other))
            if spelt.get(key) is not None and not _same(_single(spelt[key]), value):
                raise ConsiliumError(
                    f"{path}: {other} is {value} and {key} {spelt[key]}, two names of one number."
                )
            spelt[key] = value
    return Keys(path, {key: spelt.get(key, default) for key, default in family.defaults.items()})


def _refuse_code(found: Mapping[str, Any], path: Path, family: Family) -> None:
    """A family that everybody has needs no code: what brings some computes something else."""
    code = found.get("auto_map")
    if not isinstance(code, dict):
        return
    own = (f".{family.class_name}", family.class_name.replace("ForCausalLM", "Model"))
    models = [str(name) for key, name in code.items() if str(key).startswith("AutoModel")]
    if any(not (family.code and name.endswith(own)) for name in models):
        raise ConsiliumError(
            f"{path}: auto_map names {models[0][:60]!r}, code that is never run here and may compute"
            " something else; remove auto_map if the model is the plain one."
        )


def _refuse_unknown(found: Mapping[str, Any], path: Path, family: Family) -> None:
    """Keys that transformers does not read for this family but whose name says that answers need them."""
    known = family.defaults.keys() | family.only.keys() | family.spellings.keys()
    for key in found.keys() - known:
        matters = _ARITHMETIC.search(key) and not _HARMLESS.search(key)
        if matters and not isinstance(found[key], str) and found[key] not in (*_INACTIVE, [], {}):
            raise unsupported(path, key, found[key])


def _same(one: object, other: object) -> bool:
    """``True`` is no number here."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _single(value: object) -> object:
    """One generation of Skywork's keys gives a number as a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _slip(kind: str) -> str:
    """Near misses in letters only: another number is another model."""

    def letters(name: str) -> str:
        return re.sub(r"[^a-z]", "", name.lower())

    def numbers(name: str) -> list[str]:
        return re.findall(r"\d+", name)

    alike = [name for name in FAMILIES if numbers(name) == numbers(kind)]
    near = sorted(alike, key=lambda name: letters(name) != letters(kind))
    for name in near:
        if _one_edit(letters(kind), letters(name)):
            return f" Did you mean {name!r}?"
    return f" Known: {', '.join(FAMILIES)}."


def _one_edit(one: str, other: str) -> bool:
    """Whether at most one letter is too many, missing, wrong, or two neighbours are exchanged."""
    short, long = sorted((one, other), key=len)
    same = next((i for i, letter in enumerate(short) if letter != long[i]), len(short))
    rest, more = short[same:], long[same:]
    swapped = len(rest) > 1 and len(more) > 1 and rest[1] + rest[0] + rest[2:] == more
    return rest == more or rest == more[1:] or rest[1:] == more[1:] or swapped
