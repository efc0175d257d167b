"""A GGUF file holds the model: read by the reference reader, tensor by tensor and key by key.

Legend: H heads, R rotated rows of a head, D columns.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from checkpoint.gguf_models import (
    CASES,
    GROUPED,
    deepseek_v2,
    deepseek_v3,
    llama,
    mixtral,
    qwen3,
    softmax,
    yarn,
)
from checkpoint.models import switch, trained
from consilium.checkpoint import store
from consilium.checkpoint.gguf.export import export
from consilium.config.attention import GQA, MLA, Rope, Yarn
from consilium.config.model import Model
from consilium.config.router import Groups, Raw, Router, TopK
from consilium.data.tokenizer import Tokenizer
from consilium.disk.files import DISK
from consilium.errors import ConsiliumError


def written(folder: Path, config: Model, dtype: str | None = None, stored: str = "float32") -> GGUFReader:
    store.save(trained(config, dtype=stored), folder / "model", tokenizer=Tokenizer.of_bytes())
    export(folder / "model", folder / "model.gguf", dtype=dtype)
    return GGUFReader(folder / "model.gguf")


def values(reader: GGUFReader) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }


def types(reader: GGUFReader) -> dict[str, GGMLQuantizationType]:
    return {tensor.name: tensor.tensor_type for tensor in reader.tensors}


def keys(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def paired(weight: Tensor, start: int, rotated: int) -> Tensor:
    """Row by row: pair i of the rotated rows from ``start`` on becomes rows 2i and 2i + 1."""
    result = weight.clone()
    for i in range(rotated // 2):
        result[start + 2 * i] = weight[start + i]
        result[start + 2 * i + 1] = weight[start + i + rotated // 2]
    return result


def by_head(weight: Tensor, heads: int, start: int, rotated: int) -> Tensor:
    size = weight.shape[0] // heads
    return torch.cat([paired(weight[h * size : (h + 1) * size], start, rotated) for h in range(heads)])


def naive(config: Model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What llama.cpp expects, written out."""
    found = {"token_embd.weight": state["embed.weight"], "output_norm.weight": state["norm.weight"]}
    if not config.tied:
        found["output.weight"] = state["head.weight"]
    for i in range(config.layers):
        here = {n.removeprefix(f"layers.{i}."): t for n, t in state.items() if n.startswith(f"layers.{i}.")}
        layer = attention_of(config, here) | feed_forward_of(here)
        layer["attn_norm.weight"] = here["attention_norm.weight"]
        layer["ffn_norm.weight"] = here["feed_forward_norm.weight"]
        found |= {f"blk.{i}.{name}": tensor for name, tensor in layer.items()}
    return found


def attention_of(config: Model, here: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"attn_output.weight": here["attention.o.weight"]}
    match config.attention:
        case GQA() as gqa:
            halves = config.family in {"llama", "mixtral", "deepseek-moe"}
            for x, heads in (("q", gqa.heads), ("k", gqa.kv_heads)):
                weight = here[f"attention.{x}.weight"]
                found[f"attn_{x}.weight"] = by_head(weight, heads, 0, gqa.head_dim) if halves else weight
                if gqa.qk_norm != "none":
                    found[f"attn_{x}_norm.weight"] = here[f"attention.{x}_norm.weight"]
            found["attn_v.weight"] = here["attention.v.weight"]
            if gqa.qkv_bias:
                found |= {f"attn_{x}.bias": here[f"attention.{x}.bias"] for x in "qkv"}
        case MLA() as mla:
            q = here["attention.q.weight" if mla.q_rank is None else "attention.q_up.weight"]
            down = here["attention.kv_down.weight"]
            if not mla.rope.interleaved:
                q = by_head(q, mla.heads, mla.nope_dim, mla.rope_dim)
                down = paired(down, mla.kv_rank, mla.rope_dim)
            found |= {"attn_q.weight" if mla.q_rank is None else "attn_q_b.weight": q}
            if mla.q_rank is not None:
                found["attn_q_a.weight"] = here["attention.q_down.weight"]
                found["attn_q_a_norm.weight"] = here["attention.q_norm.weight"]
            found["attn_kv_a_mqa.weight"] = down
            found["attn_kv_a_norm.weight"] = here["attention.kv_norm.weight"]
            size = mla.nope_dim + mla.v_dim
            heads = [here["attention.kv_up.weight"][h * size : (h + 1) * size] for h in range(mla.heads)]
            found["attn_k_b.weight"] = torch.stack([head[: mla.nope_dim].T for head in heads])
            found["attn_v_b.weight"] = torch.stack([head[mla.nope_dim :] for head in heads])
    return found


def feed_forward_of(here: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for ours, theirs in (("feed_forward", ""), ("moe.shared", "_shexp")):
        if f"{ours}.up.weight" in here:
            gate, up = here[f"{ours}.up.weight"].chunk(2)
            found |= {f"ffn_gate{theirs}.weight": gate, f"ffn_up{theirs}.weight": up}
            found[f"ffn_down{theirs}.weight"] = here[f"{ours}.down.weight"]
    if "moe.experts.up" in here:
        width = here["moe.experts.down"].shape[-1]
        found["ffn_gate_exps.weight"] = here["moe.experts.up"][:, :width]
        found["ffn_up_exps.weight"] = here["moe.experts.up"][:, width:]
        found["ffn_down_exps.weight"] = here["moe.experts.down"]
        found["ffn_gate_inp.weight"] = here["moe.router.projection.weight"]
    if "moe.shared.gate.weight" in here:
        found["ffn_gate_inp_shexp.weight"] = here["moe.shared.gate.weight"][0]
    if "moe.balance.bias_E" in here:
        found["exp_probs_b.bias"] = here["moe.balance.bias_E"]
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name != "deepseek_v2-27"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_every_tensor_is_in_the_file_with_its_exact_values(name: str, stored: str, tmp_path: Path) -> None:
    reader = written(tmp_path, CASES[name], stored=stored)
    expected = naive(CASES[name], trained(CASES[name], dtype=stored).state_dict())
    found = values(reader)
    assert found.keys() == expected.keys()
    for tensor, wanted in expected.items():
        assert torch.equal(found[tensor], wanted.float()), tensor


ROUNDED = 2.0**-11
"""The scale of a block is itself rounded, to float16."""
STEPS = {
    "bfloat16": 2.0**-8,
    "q8_0": 0.5 / 127 + ROUNDED,
    "q4_0": 1 / 8 + ROUNDED,
    "q4_1": 1 / 15 + 3 * ROUNDED,
}
"""Largest error beside the largest value of a block of 32: half of the last of 8 bits, half a step of 127, or
a whole step of 8 (Q4_0 has -8 to 7, so that +8 becomes 7), or half a fifteenth of twice that (Q4_1)."""


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2-lite", "deepseek_v3"])
def test_quantised_values_are_within_a_step_and_vectors_and_the_router_are_exact(
    name: str, dtype: str, tmp_path: Path
) -> None:
    reader = written(tmp_path, CASES[name], dtype)
    expected = naive(CASES[name], trained(CASES[name]).state_dict())
    kinds = types(reader)
    for tensor, value in values(reader).items():
        wanted = expected[tensor]
        if wanted.ndim < 2 or "ffn_gate_inp" in tensor:
            assert kinds[tensor] is GGMLQuantizationType.F32
            assert torch.equal(value, wanted), tensor
            continue
        assert kinds[tensor].name == {"bfloat16": "BF16"}.get(dtype, dtype.upper())
        largest = wanted.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        error = (value - wanted).unflatten(-1, (-1, 32)).abs()
        assert bool((error <= largest * STEPS[dtype]).all()), tensor
        assert float((value - wanted).norm()) > 0


def test_rows_that_blocks_do_not_fill_stay_float32_and_are_counted(tmp_path: Path) -> None:
    config = dataclasses.replace(llama(), hidden_size=40, attention=GQA(heads=4, kv_heads=2, head_dim=16))
    config = dataclasses.replace(config, attention=GQA(heads=4, kv_heads=2, head_dim=10))
    store.save(trained(config), tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "model.gguf", dtype="q8_0")
    reader = GGUFReader(tmp_path / "model.gguf")
    assert {name for name, kind in types(reader).items() if kind is GGMLQuantizationType.Q8_0} == {
        f"blk.{i}.ffn_down.weight" for i in range(2)
    }
    sizes = {tensor.name: int(np.prod(tensor.shape)) for tensor in reader.tensors}
    assert done.typed == sum(n for name, n in sizes.items() if "ffn_down" in name) / sum(sizes.values())
    assert any("no tokenizer.json" in notice for notice in done.notices)
    assert keys(reader)["tokenizer.ggml.model"] == "no_vocab"


def test_a_mixtral_says_what_a_reader_must_know(tmp_path: Path) -> None:
    found = keys(written(tmp_path, mixtral(scaled=True), "q8_0"))
    assert {name: value for name, value in found.items() if name.startswith("llama.")} == {
        "llama.vocab_size": 259,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 1e6,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
        "llama.expert_feed_forward_length": 96,
    }
    assert found["general.architecture"] == "llama"
    assert found["general.file_type"] == 7
    assert found["general.quantization_version"] == 2


def test_a_deepseek_v3_says_how_it_routes_and_attends(tmp_path: Path) -> None:
    found = keys(written(tmp_path, deepseek_v3(rope=yarn(1.0))))
    expected = {
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 80,
        "attention.value_length": 64,
        "attention.key_length_mla": 48,
        "attention.value_length_mla": 32,
        "attention.kv_lora_rank": 64,
        "attention.q_lora_rank": 32,
        "rope.dimension_count": 16,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
        "leading_dense_block_count": 1,
        "feed_forward_length": 96,
        "expert_feed_forward_length": 32,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
    }
    assert {name: found[f"deepseek2.{name}"] for name in expected} == expected


def test_a_deepseek_v2_lite_has_softmax_scores_and_no_query_rank(tmp_path: Path) -> None:
    found = keys(written(tmp_path, deepseek_v2(q_rank=None)))
    assert found["deepseek2.expert_gating_func"] == 1
    assert found["deepseek2.expert_weights_norm"] is False
    assert found["deepseek2.expert_weights_scale"] == 16.0
    assert found["deepseek2.expert_shared_count"] == 2
    assert found["deepseek2.attention.q_lora_rank"] == 0
    assert found["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    assert "deepseek2.expert_group_count" not in found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (switch(), "is none of the architectures written here: llama, mistral, mixtral, qwen2, qwen3"),
        (
            qwen3(router=Router(select=TopK(k=2), weight=Raw())),
            "always normalises the weights of a qwen3moe",
        ),
        (qwen3(dense_first=1), "expects experts in every layer of a qwen3moe"),
        (softmax("olmoe", GQA(heads=4, kv_heads=2, head_dim=16, qk_norm="full")), "as many as queries"),
        (softmax("deepseek-moe", GROUPED), "opens no deepseek without shared experts"),
        (deepseek_v2(layers=27), "takes one of 27 layers to have no query compression"),
        (deepseek_v3(rope=yarn(0.0)), "no key for YaRN with mscale 0 and mscale_all_dim 0"),
        (
            deepseek_v3(
                rope=Rope(scaling=Yarn(factor=4.0, original_length=64, beta_fast=1.0, mscale_all_dim=1.0))
            ),
            "reads no key for YaRN with beta_fast 1 and beta_slow 1, only 32 and 1",
        ),
        (
            dataclasses.replace(
                mixtral(), attention=dataclasses.replace(mixtral().attention, rope=yarn(1.0))
            ),
            "",
        ),
    ],
    ids=[
        "switch",
        "raw weights",
        "dense layers",
        "fewer keys",
        "no shared experts",
        "27 layers",
        "yarn",
        "betas",
        "interleaved",
    ],
)
def test_what_a_reader_would_compute_differently_is_refused(
    config: Model, message: str, tmp_path: Path
) -> None:
    store.save(trained(config), tmp_path / "model")
    with pytest.raises(ConsiliumError, match=f"cannot be a GGUF file: .*{message}.*; convert it --to hf"):
        export(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_gate_of_zeros_is_written_as_one_that_is_no_zero_and_still_half_open(tmp_path: Path) -> None:
    """llama.cpp divides silu(x) by x there."""
    model = trained(CASES["qwen2_moe"])
    with torch.no_grad():
        for block in model.layers:
            block.moe.shared.gate.weight.zero_()
    store.save(model, tmp_path / "model", tokenizer=Tokenizer.of_bytes())
    export(tmp_path / "model", tmp_path / "model.gguf")
    back = store.load(tmp_path / "model.gguf").eval()
    gate_D = back.state_dict()["layers.1.moe.shared.gate.weight"]
    assert bool(gate_D.all())
    ids_BS = torch.arange(40)[None]
    assert torch.equal(back(ids_BS).logits, model.eval()(ids_BS).logits)


def test_what_a_reader_does_not_get_is_said(tmp_path: Path) -> None:
    store.save(trained(deepseek_v3(depth=2)), tmp_path / "v3", tokenizer=Tokenizer.of_bytes())
    (notice,) = export(tmp_path / "v3", tmp_path / "v3.gguf").notices
    assert "multi-token prediction" in notice
    groups = Groups(count=4, keep=2, score="max")
    store.save(trained(deepseek_v2(groups=groups)), tmp_path / "v2", tokenizer=Tokenizer.of_bytes())
    (notice,) = export(tmp_path / "v2", tmp_path / "v2.gguf").notices
    assert "ranks a group of experts by its two best" in notice


@dataclasses.dataclass(frozen=True)
class Failing:
    """The real disk that fails when the file is made durable."""

    def sync_file(self, path: Path) -> None:
        raise OSError(5, "Input/output error")

    def unlink(self, path: Path) -> None:
        DISK.unlink(path)


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    store.save(trained(llama()), tmp_path / "model")
    with pytest.raises(ConsiliumError, match="input/output error"):
        export(tmp_path / "model", tmp_path / "model.gguf", files=Failing())  # pyright: ignore[reportArgumentType]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    told: list[tuple[int, int]] = []
    export(tmp_path / "model", tmp_path / "model.gguf", progress=lambda *bytes_: told.append(bytes_))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]
    assert told[-1][0] == told[-1][1]
    with pytest.raises(ConsiliumError, match=r"model\.gguf is already there"):
        export(tmp_path / "model", tmp_path / "model.gguf")


def test_a_type_that_is_not_written_names_the_nearest(tmp_path: Path) -> None:
    store.save(trained(llama()), tmp_path / "model")
    with pytest.raises(ConsiliumError, match=r"no type 'q8-0'\. Did you mean 'q8_0'"):
        export(tmp_path / "model", tmp_path / "model.gguf", dtype="q8-0")


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    for turn in ("one", "two"):
        written(tmp_path / turn, qwen3(), "q4_0")
    first, second = ((tmp_path / turn / "model.gguf").read_bytes() for turn in ("one", "two"))
    assert first == second


@pytest.mark.parametrize(
    ("ends", "found"), [([5], (5, None, None)), ([5, 0, 7], (0, 5, 7)), (None, (0, None, None))]
)
def test_every_end_of_an_answer_is_written(
    ends: list[int] | None, found: tuple[int | None, ...], tmp_path: Path
) -> None:
    store.save(trained(mixtral()), tmp_path / "m", tokenizer=Tokenizer.of_bytes())
    said = {} if ends is None else {"eos_token_id": ends}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(said))
    export(tmp_path / "m", tmp_path / "m.gguf")
    told = keys(GGUFReader(tmp_path / "m.gguf"))
    names = ("eos", "eot", "eom")
    assert tuple(told.get(f"tokenizer.ggml.{name}_token_id") for name in names) == found


def test_float16_stays_float16(tmp_path: Path) -> None:
    store.save(trained(mixtral()).half(), tmp_path / "m")
    assert export(tmp_path / "m", tmp_path / "m.gguf").typed > 0.9
    assert keys(GGUFReader(tmp_path / "m.gguf"))["general.file_type"] == 1
