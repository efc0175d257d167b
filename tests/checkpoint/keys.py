"""config.json for tests: ours as others see it, what of a model decides its answers, and variations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from checkpoint.models import HUGGING_FACE, deepseek_v3, llama, mixtral, windowed
from consilium.checkpoint.hf.config import to_hugging_face
from consilium.config.attention import GQA, MLA
from consilium.config.balance import Balance
from consilium.config.model import Model
from consilium.config.moe import Dropless, SigmoidGated


def folder_with(keys: object, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def foreign(config: Model) -> dict[str, Any]:
    """The keys of ``config`` without our own."""
    return {
        key: value for key, value in to_hugging_face(config, dtype="bfloat16").items() if key != "consilium"
    }


def computed(config: Model) -> tuple[Model, list[bool]]:
    """What of ``config`` decides the answers, and which layers route.

    No losses, drops or initialisation; two pairs of ``dense_first`` and ``moe_every`` can mean the same.
    """
    routed = [config.is_moe(i) for i in range(config.layers)]
    moe = config.moe and dataclasses.replace(config.moe, balance=Balance(), admission=Dropless())
    dense = None if all(routed) else config.dense
    same = {"family": "", "init": llama().init, "dense_first": 0, "moe_every": 1}
    return dataclasses.replace(config, dense=dense, moe=moe, **same), routed


YARN_KEYS = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
BOTH_MULTIPLIERS = {"mscale": 1.0, "mscale_all_dim": 0.7}


def altered(config: Model, **router: Any) -> Model:
    assert config.moe is not None
    changed = dataclasses.replace(config.moe.router, **router)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=changed))


def with_moe(config: Model, **changes: Any) -> Model:
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


def with_gqa(**changes: Any) -> Model:
    attention = GQA(**({"heads": 4, "kv_heads": 2, "head_dim": 8} | changes))
    return dataclasses.replace(llama(), attention=attention)


def with_latent(**changes: Any) -> Model:
    config = deepseek_v3()
    assert isinstance(config.attention, MLA)
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, **changes))


def five_layers(config: Model) -> Model:
    return dataclasses.replace(config, layers=5)


NAMED = HUGGING_FACE | {
    "qwen2": with_gqa(qkv_bias=True),
    "qwen3": with_gqa(qk_norm="head"),
    "qwen2_moe": five_layers(with_moe(mixtral(), shared=SigmoidGated(width=10))),
    "qwen3_moe": five_layers(dataclasses.replace(mixtral(), attention=with_gqa(qk_norm="head").attention)),
    "qwen2-windowed": windowed(with_gqa(qkv_bias=True), 3, 1),
    "qwen2_moe-windowed": windowed(five_layers(with_moe(mixtral(), shared=SigmoidGated(width=10))), 3, 0, 3),
    "olmoe": dataclasses.replace(mixtral(), attention=GQA(heads=2, kv_heads=1, head_dim=8, qk_norm="full")),
}
