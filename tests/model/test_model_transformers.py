"""transformers opens our checkpoints and agrees at positions where rotary mistakes have had room to grow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from consilium.checkpoint import store
from consilium.config.attention import MLA, Rope, Yarn
from consilium.config.model import MTP, Model
from consilium.config.router import Groups, TopK
from consilium.recipes.catalogue import recipe
from small import lively
from support import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
LENGTH = 128


def stretched(name: str, groups: Groups, multiplier: float) -> Model:
    """The tiny recipe with the groups and the YaRN of its large size, past the length it was trained for."""
    config = recipe(name, "tiny")
    assert config.moe is not None
    assert isinstance(config.attention, MLA)
    yarn = Yarn(factor=40.0, original_length=32, mscale=multiplier, mscale_all_dim=multiplier)
    attention = dataclasses.replace(config.attention, rope=Rope(interleaved=True, scaling=yarn))
    router = dataclasses.replace(config.moe.router, select=TopK(k=4, groups=groups))
    moe = dataclasses.replace(config.moe, router=router)
    return dataclasses.replace(config, attention=attention, moe=moe, mtp=MTP(depth=0))


CONFIGS = {
    "deepseek-v3": stretched("deepseek-v3", Groups(count=8, keep=4, score="top2_sum"), 1.0),
    "deepseek-v2": stretched("deepseek-v2", Groups(count=8, keep=3, score="max"), 0.707),
    "mixtral": recipe("mixtral", "tiny"),
    "llama": recipe("llama", "tiny"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_long_sequence_has_the_logits_of_transformers(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """With these tokens no two experts are within 1e-4 of a tie, which rounding would decide either way."""
    model = lively(CONFIGS[name]).eval()
    store.save(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=dtype, local_files_only=True, experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(2)
    ids_BS = torch.randint(model.config.vocab_size, (1, LENGTH), generator=generator)
    assert relative_error(model.to(dtype)(ids_BS).logits, theirs(ids_BS).logits) < 1e-5
