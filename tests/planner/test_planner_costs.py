from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.config.attention import GQA, MLA
from consilium.config.feed_forward import FeedForward
from consilium.config.model import MTP, Model
from consilium.planner.flops import LONGEST_CONTEXT, flops
from consilium.planner.kv import values_per_token
from consilium.planner.plan import plan
from consilium.recipes.catalogue import recipe
from planner.planner_configs import active, models, tensors

PLAIN = GQA(heads=2, kv_heads=1, head_dim=4)


def pairs(model: Model, length: int) -> int:
    """Multiplications of queries with keys and weights with values in one layer, position by position."""
    match model.attention:
        case GQA(heads=heads, head_dim=head_dim):
            per_key = heads * (head_dim + head_dim)
        case MLA(heads=heads, nope_dim=nope, rope_dim=rope, v_dim=value):
            per_key = heads * (nope + rope + value)
    return sum((position + 1) * per_key for position in range(length))


def multiplications(model: Model, *, mtp: bool) -> int:
    """Multiplications of one token with matrices, tensor by tensor; biases and norms multiply nothing."""
    total = model.vocab_size * model.hidden_size * (model.mtp.depth if mtp else 1)
    for name, shape in tensors(model):
        if name.startswith("mtp.") != mtp or len(shape) < 2 or name in {"embed.weight", "head.weight"}:
            continue
        total += math.prod(active(model, name, shape))
    return total


@given(models, st.integers(1, 40))
def test_flops_of_a_sequence_equal_a_count_of_every_multiplication(model: Model, length: int) -> None:
    counted = flops(model, context=length)
    attention = pairs(model, length)
    main = 2 * (length * multiplications(model, mtp=False) + model.layers * attention)
    extra = 2 * (length * multiplications(model, mtp=True) + model.mtp.depth * attention)
    assert counted.forward * length == main
    assert counted.mtp * length == extra
    assert counted.training == 3 * counted.forward


def test_a_plan_assumes_sequences_of_pre_training() -> None:
    assert flops(recipe("deepseek-v3")).context == LONGEST_CONTEXT
    assert flops(recipe("deepseek-v3:tiny")).context == 1024
    assert flops(recipe("llama")).forward > flops(recipe("llama"), context=1).forward


def test_published_training_cost_of_llama_7b() -> None:
    """187.9 TFLOP for 4096 tokens (2401.06066), which counts the pairs a causal mask hides: another half."""
    model = recipe("llama:7b")
    hidden = 3 * 2 * model.layers * 32 * 2 * 128 * 4096 * 4095 // 2
    counted = 4096 * flops(model, context=4096).training + hidden
    assert abs(counted / 187.9e12 - 1) < 0.01


@pytest.mark.parametrize(
    ("name", "values"),
    [("deepseek-v3", 35_136), ("deepseek-v2", 34_560), ("mixtral:8x7b", 65_536), ("llama:7b", 262_144)],
)
def test_cached_values_are_the_published_ones(name: str, values: int) -> None:
    planned = plan(recipe(name))
    assert planned.kv_values_per_token == values == values_per_token(recipe(name))
    assert planned.kv_bytes_per_token == 2 * values


@given(models)
def test_bytes_follow_from_parameters(model: Model) -> None:
    planned = plan(model)
    total = planned.parameters.total
    assert planned.weight_bytes == planned.weight_bytes_by_dtype["bfloat16"] == 2 * total
    assert planned.weight_bytes_by_dtype["float32"] == 4 * total
    assert planned.weight_bytes_by_dtype["int8"] == total
    assert planned.weight_bytes_by_dtype["int4"] == math.ceil(total / 2)
    assert planned.training_bytes == 16 * (total + planned.parameters.mtp)


@given(
    window=st.integers(1, 40),
    full=st.sets(st.integers(0, 2)),
    length=st.integers(1, 40),
)
def test_flops_of_windows_equal_a_count_of_what_queries_see(window: int, full: set[int], length: int) -> None:
    attention = GQA(heads=2, kv_heads=1, head_dim=4, window=window, full_layers=tuple(sorted(full)))
    model = Model(
        family="x",
        vocab_size=10,
        hidden_size=4,
        layers=3,
        attention=attention,
        dense=FeedForward(width=4),
        mtp=MTP(depth=1),
    )
    seen = {
        layer: sum(
            sum(layer in full or query - window < key for key in range(query + 1)) for query in range(length)
        )
        for layer in range(4)
    }
    counted, plain = flops(model, context=length), flops(dataclasses.replace(model, attention=PLAIN), length)
    per_key, all_pairs = 2 * 2 * (4 + 4), length * (length + 1) // 2
    for found, without, layers in (
        (counted.forward, plain.forward, (0, 1, 2)),
        (counted.mtp, plain.mtp, (3,)),
    ):
        hidden = sum(all_pairs - seen[layer] for layer in layers) * per_key
        assert abs((without - found) * length - hidden) <= length * len(layers) / 2
    planned = plan(model).window
    assert planned is not None
    assert (planned.tokens, planned.layers) == (window, len({0, 1, 2} - full))
    assert planned.kv_values_beyond == len({0, 1, 2} & full) * 2 * 4


def test_a_model_without_windows_has_none_in_its_plan() -> None:
    assert plan(recipe("mixtral")).window is None
