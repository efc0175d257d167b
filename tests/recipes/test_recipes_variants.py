from __future__ import annotations

import dataclasses

import pytest

from consilium.cli.main import verb_parser
from consilium.config.attention import GQA, Rope
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, Capacity, Dropless, MoE
from consilium.config.router import LearnedNoise, Raw, Router, Sigmoid, SoftmaxOfSelected, TopK, TwoLevel
from consilium.errors import ConsiliumError
from consilium.planner.parameters import parameters
from consilium.planner.scaling import scale_to, scaled
from consilium.recipes.balances import TEXTS
from consilium.recipes.balancing import BALANCES
from consilium.recipes.catalogue import names, recipe, systems
from consilium.recipes.variants import dense_twin, with_balance

TINY = [f"{name}:tiny" for name in names()]
QUANTILES = ("quantile", "quantile-ema", "quantile-histogram")
FIXED = ("bias", "bias-centred", "bias-linear", "smebu", "pid", *QUANTILES, "sinkhorn", "adaptive", "load")
"""What has nothing to do where experts choose their tokens."""
REFUSED = {
    *(("hash", name) for name in BALANCES if name != "none"),
    *(("expert-choice", name) for name in FIXED),
    *((family, name) for family in ("jacobs", "dense-moe", "gshard", "deepseek-v2") for name in QUANTILES),
    *((family, "load") for family in ("gshard", "switch", "deepseek-v2", "skywork-moe")),
    *((family, "sinkhorn") for family in ("gshard", "deepseek-v2")),
}


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("name", ["deepseek-v3:tiny", "mixtral:tiny"])
def test_a_balance_changes_nothing_but_balance_and_what_it_needs(name: str, balance: str) -> None:
    """Of softmax scores and of sigmoid scores; and the way back is open."""
    before, after = recipe(name), with_balance(recipe(name), balance)
    assert isinstance(before.moe, MoE)
    assert isinstance(after.moe, MoE)
    assert after.moe.balance == BALANCES[balance](before.moe)
    router = after.moe.router
    assert router.served.select == before.moe.router.select
    assert (router.select != router.served.select) == (balance == "sinkhorn")
    assert isinstance(router.noise, LearnedNoise) == (balance == "load")
    if after.moe.balance.bias.kind != "none":
        assert router.offset != "none"
    if before.moe.router.offset != "none" and balance not in {"sinkhorn", "load"}:
        assert router.offset == before.moe.router.offset
    left = dataclasses.replace(
        router, select=router.served.select, offset=before.moe.router.offset, noise=before.moe.router.noise
    )
    assert left == before.moe.router
    back = with_balance(after, "switch").moe
    assert back is not None
    assert (back.balance, back.router.select) == (BALANCES["switch"](back), before.moe.router.select)


def test_every_balance_has_a_line_and_help_names_them_all() -> None:
    assert tuple(TEXTS) == tuple(BALANCES)
    (option,) = (action for action in verb_parser("train").actions() if action.dest == "balance")
    assert option.help == f"{', '.join(TEXTS)}; default: the model's own"


@pytest.mark.parametrize("name", TINY)
def test_a_balance_is_valid_or_refused_in_one_sentence_that_names_it(name: str) -> None:
    model = recipe(name)
    for balance in BALANCES:
        if model.moe is None or (model.family, balance) in REFUSED:
            with pytest.raises(ConsiliumError, match=rf"^--balance {balance}: [^\n]+\.$"):
                with_balance(model, balance)
        else:
            assert with_balance(model, balance).moe is not None


@pytest.mark.parametrize("name", [f"{one.name}:{size}" for one in systems() for size in one.sizes])
def test_the_dense_twin_has_the_active_parameters(name: str) -> None:
    model = recipe(name)
    twin = dense_twin(model)
    assert twin.moe is None
    assert parameters(twin).total == pytest.approx(parameters(model).active, rel=0.003)
    assert dense_twin(twin) == twin


def test_the_dense_twin_of_expert_choice_has_what_a_token_uses_on_average() -> None:
    model = recipe("expert-choice:tiny")
    assert model.moe is not None
    few = dataclasses.replace(model.moe, router=Router(select=TopK(k=2), weight=Raw()))
    assert dense_twin(model) == dense_twin(dataclasses.replace(model, moe=few))


LATENT = MoE(
    experts=32,
    width=96,
    latent=48,
    activation="squared_relu",
    router=Router(select=TopK(k=8)),
    shared=AlwaysOn(width=64),
)
LEVELS = MoE(
    experts=32,
    width=64,
    router=Router(select=TwoLevel(groups=8), weight=SoftmaxOfSelected()),
)
ROTATED = GQA(heads=6, kv_heads=2, head_dim=32, rope=Rope(fraction=0.5))


def with_axes(moe: MoE) -> Model:
    return dataclasses.replace(recipe("mixtral:tiny"), moe=moe, attention=ROTATED, norms="around")


@pytest.mark.parametrize("moe", [LATENT, LEVELS], ids=["latent", "two levels"])
def test_the_dense_twin_counts_a_latent_space_and_both_levels(moe: MoE) -> None:
    model = with_axes(moe)
    twin = dense_twin(model)
    assert (twin.moe, twin.attention, twin.norms) == (None, ROTATED, "around")
    assert parameters(twin).total == pytest.approx(parameters(model).active, rel=0.02)


@pytest.mark.parametrize("moe", [LATENT, LEVELS], ids=["latent", "two levels"])
@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0, 2.0, 3.7])
def test_scaling_keeps_levels_and_the_rotated_share_and_follows_with_the_latent(
    moe: MoE, factor: float
) -> None:
    model = with_axes(moe)
    after = scaled(model, factor)
    assert after.moe is not None
    assert isinstance(after.attention, GQA)
    assert after.moe.router == moe.router
    assert after.attention.rope == ROTATED.rope
    if moe.latent is None:
        assert after.moe.latent is None
    else:
        assert after.moe.latent == pytest.approx(moe.latent * factor, abs=4)
    assert after != model or factor == 1.0


@pytest.mark.parametrize(("factor", "full"), [(0.2, (1,)), (1.0, (1, 3, 5)), (3.0, (1, 3, 5))])
def test_scaling_keeps_the_window_of_the_layers_that_are_left(factor: float, full: tuple[int, ...]) -> None:
    attention = dataclasses.replace(ROTATED, window=64, full_layers=(1, 3, 5))
    after = scaled(dataclasses.replace(with_axes(LATENT), layers=6, attention=attention), factor).attention
    assert isinstance(after, GQA)
    assert (after.window, after.full_layers) == (64, full)


def test_a_balance_that_a_router_cannot_have_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConsiliumError, match=r"--balance bias: moe\.router: select 'two_level' has two sets"):
        with_balance(with_axes(LEVELS), "bias")
    with pytest.raises(ConsiliumError, match=r"--balance switch-z: moe\.balance: with moe\.router\.select"):
        with_balance(with_axes(LEVELS), "switch-z")


def test_a_balance_that_reads_drops_brings_a_capacity_only_where_there_is_none() -> None:
    dropless, dropping = recipe("mixtral:tiny").moe, recipe("gshard:tiny").moe
    assert dropless is not None
    assert dropping is not None
    assert dropless.admission == Dropless()
    for name, wanted in (("mixtral:tiny", Capacity(factor=1.25)), ("gshard:tiny", dropping.admission)):
        after = with_balance(recipe(name), "adaptive").moe
        assert after is not None
        assert after.admission == wanted


@pytest.mark.parametrize("name", ["hash:tiny", "expert-choice:tiny"])
@pytest.mark.parametrize("balance", ["bias", "bias-linear"])
def test_a_bias_is_refused_where_loads_are_fixed_without_it(name: str, balance: str) -> None:
    with pytest.raises(
        ConsiliumError, match=f"^--balance {balance}: moe.router: select .* nothing to balance"
    ):
        with_balance(recipe(name), balance)


@pytest.mark.parametrize("name", TINY)
def test_scaling_down_keeps_a_layer_of_experts(name: str) -> None:
    model = recipe(name)
    assert bool(scaled(model, 0.02).moe_layers) == bool(model.moe_layers)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("wanted", [4_000_000, 20_000_000, 60_000_000])
def test_the_dial_reaches_the_wanted_size(name: str, wanted: int) -> None:
    counts = parameters(scale_to(recipe(name), wanted))
    assert counts.total + counts.mtp == pytest.approx(wanted, rel=0.25)


def test_scaling_by_one_is_the_model_itself() -> None:
    for name in TINY:
        assert scaled(recipe(name), 1.0) == recipe(name)


def test_scaling_keeps_experts_and_k() -> None:
    model = scaled(recipe("deepseek-v3:tiny"), 2.0)
    assert model.moe is not None
    assert (model.moe.experts, model.moe.most_active) == (32, 4)
    assert model.hidden_size == 384


def test_a_size_below_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConsiliumError, match="comes no nearer than"):
        scale_to(recipe("deepseek-v3:tiny"), 10_000)


def test_balance_needs_experts_and_a_known_name() -> None:
    with pytest.raises(ConsiliumError, match="nothing to balance"):
        with_balance(recipe("llama:tiny"), "switch")
    with pytest.raises(ConsiliumError, match="Did you mean 'sequence'"):
        with_balance(recipe("mixtral:tiny"), "sequense")


def test_offsets_on_logits_survive_another_balance() -> None:
    base = recipe("mixtral:tiny")
    router = Router(score=Sigmoid(), offset="logits", select=TopK(k=2))
    moe = MoE(experts=4, width=8, router=router)
    changed = with_balance(type(base)(**{**vars(base), "moe": moe}), "bias")
    assert changed.moe is not None
    assert changed.moe.router.offset == "logits"
