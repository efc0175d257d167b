"""Every law gives the figures that are known of it, and its slopes are those of its own values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import ConsiliumError
from consilium.planner.formulas import Abnar, Chinchilla, Clark, Joint, Kaplan, Krajewski, Leverage, Power
from consilium.planner.laws import LAWS, Law, find
from consilium.planner.predictions import Point, elasticity, point, predict, size_of_loss
from consilium.recipes.catalogue import recipe
from consilium.records.prediction import Prediction

sizes = st.floats(1e6, 1e12)
experts = st.floats(1, 1024)
ROUTERS = ["s-base", "rl-r", "hash"]


def clark(router: str) -> Clark:
    (law,) = find(f"clark:{router}")
    assert isinstance(law.formula, Clark)
    return law.formula


def only(name: str) -> Law:
    (law,) = find(name)
    return law


def predicted(name: str, at: Point) -> Prediction:
    (found,) = predict(find(name), at).predictions
    return found


# The figures that the papers print, entered a second time

PRINTED = {
    "clark:s-base": "a -.082  b -.108  c .009  d 1.104  start 1.847  most 314.478",
    "clark:rl-r": "a -.083  b -.126  c .012  d 1.111  start 1.880  most 469.982",
    "clark:hash": "a -.087  b -.136  c .012  d 1.157  start 4.175  most 477.741",
    "joint": "a 35.91  alpha -.1889  delta -.2285  gamma .0098  b 35.98  beta -.1775  omega .5529"
    "  zeta -.0259  c 1.3637  start 2.0732  most 290.4521",
    "krajewski": "a 18.1  alpha .115  b 30.8  beta .147  g 2.1  gamma .58  c .47"
    "  dense.a 16.3  dense.alpha .126  dense.b 26.7  dense.beta .127  dense.e .47",
    "abnar": "a 16612.50  alpha .5962  b 5455.67  beta .3954  c .4598  lam -.1666  d 17.26"
    "  delta .1603  gamma .1595  e .94",
    "ling": "a 1.23  d -7.61e-2  gamma 1.67e-2  beta -1.17e-1  start 1.63e-2  most 5.28e16",
    "kaplan:n": "exponent .076  constant 8.8e13",
    "kaplan:d": "exponent .095  constant 5.4e13",
    "kaplan:nd": "alpha_n .076  alpha_d .103  n_c 6.4e13  d_c 1.8e13",
    "chinchilla": "e 1.69  a 406.4  b 410.7  alpha .34  beta .28",
}


def numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        match value:
            case dict():
                yield from numbers(value, "" if name == "saturation" else f"{name}.")
            case float():
                yield prefix + name, value


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_constants_are_those_that_the_papers_print(law: Law) -> None:
    words = PRINTED[law.name].split()
    expected = {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    assert dict(numbers(asdict(law.formula))) == expected


# Clark et al., 2202.01169


@pytest.mark.parametrize(
    ("n", "by_n", "by_e"), [(21e9, -0.0739, -0.0151), (2.1e9, -0.0739, -0.0241), (1.3e9, -0.0739, -0.0260)]
)
def test_raw_slopes_of_s_base_at_eight_experts(n: float, by_n: float, by_e: float) -> None:
    assert round(clark("s-base").raw_by_parameters(8), 4) == by_n
    assert round(clark("s-base").raw_by_experts(n), 4) == by_e


def test_slopes_of_s_base_with_saturation() -> None:
    law = clark("s-base")
    assert round(law.saturation(8), 3) == 8.615
    assert round(law.saturation.slope(8), 3) == 0.878
    assert round(law.by_parameters(8), 4) == -0.0736
    assert round(law.by_experts(21e9, 8), 4) == -0.0133


@pytest.mark.parametrize(("router", "raw"), [("rl-r", -0.0722), ("hash", -0.0762)])
def test_raw_slopes_in_size_of_the_other_routers(router: str, raw: float) -> None:
    assert round(clark(router).raw_by_parameters(8), 4) == raw


def test_the_slope_of_hash_in_size_with_saturation() -> None:
    assert round(clark("hash").by_parameters(8), 4) == -0.0745


@pytest.mark.parametrize(("n", "loss"), [(21e9, 1.752), (2.1e9, 2.075), (1.3e9, 2.150), (370e6, 2.358)])
def test_losses_of_s_base_at_eight_experts(n: float, loss: float) -> None:
    assert round(clark("s-base").loss(n, 8), 3) == loss


@pytest.mark.parametrize(("router", "cutoff"), [("s-base", 1.0e12), ("rl-r", 3.2e10), ("hash", 2.2e11)])
def test_experts_stop_paying_at_the_cutoff(router: str, cutoff: float) -> None:
    law = clark(router)
    assert float(f"{law.cutoff:.1e}") == cutoff
    assert math.isclose(law.loss(law.cutoff, 2), law.loss(law.cutoff, 256))
    assert law.loss(law.cutoff / 2, 2) > law.loss(law.cutoff / 2, 256)
    assert law.loss(law.cutoff * 2, 2) < law.loss(law.cutoff * 2, 256)


@pytest.mark.parametrize("router", ROUTERS)
@given(n=sizes, e=experts)
def test_slopes_are_those_of_the_losses(router: str, n: float, e: float) -> None:
    law = clark(router)
    in_n, in_e = elasticity(lambda x: law.loss(x, e), n), elasticity(lambda x: law.loss(n, x), e)
    assert math.isclose(law.by_parameters(e), in_n, rel_tol=1e-6)
    # Near the cutoff the slope in E passes through zero, so the error is measured against its parts.
    parts = (abs(law.b) + abs(law.c) * math.log10(n)) * law.saturation.slope(e)
    assert abs(law.by_experts(n, e) - in_e) < 1e-6 * parts


@pytest.mark.parametrize("router", ROUTERS)
@given(n=sizes, e=experts)
def test_raw_slopes_are_those_of_the_law_with_e_for_its_saturated_form(
    router: str, n: float, e: float
) -> None:
    law = clark(router)

    def raw(size: float, count: float) -> float:
        x, y = math.log10(size), math.log10(count)
        return 10 ** (law.a * x + law.b * y + law.c * x * y + law.d)

    assert math.isclose(law.raw_by_parameters(e), elasticity(lambda x: raw(x, e), n), rel_tol=1e-6)
    parts = abs(law.b) + abs(law.c) * math.log10(n)
    assert abs(law.raw_by_experts(n) - elasticity(lambda x: raw(n, x), e)) < 1e-6 * parts


@pytest.mark.parametrize("router", ROUTERS)
@given(n=sizes, e=experts)
def test_the_effective_size_is_the_dense_size_of_the_same_loss(router: str, n: float, e: float) -> None:
    law = clark(router)
    effective = law.effective_parameters(n, e)
    assert math.isclose(law.loss(effective), law.loss(n, e), rel_tol=1e-12)
    searched = size_of_loss(law.loss, law.loss(n, e))
    assert searched is not None
    assert math.isclose(searched, effective, rel_tol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
@given(e=experts)
def test_saturation_rises_from_start_and_never_reaches_most(router: str, e: float) -> None:
    form = clark(router).saturation
    assert math.isclose(form(1), form.start)
    assert form.start <= form(e) * (1 + 1e-12)
    assert form(e) < form.most
    assert form(e) < form(e * 1.01)


def test_the_quoted_slope_is_corrected_where_it_is_quoted_and_nowhere_else() -> None:
    (note,) = [n for n in predicted("clark:s-base", Point(active=21e9, experts=8)).notes if "quote" in n]
    assert "-0.0151" in note
    assert "-0.0241 at N = 2.1 B" in note
    for elsewhere in (Point(active=2.1e9, experts=8), Point(active=21e9, experts=16)):
        assert not any("quote" in n for n in predicted("clark:s-base", elsewhere).notes)


# Laws of dense models


def test_kaplan_with_unlimited_text_is_the_power_of_size_alone() -> None:
    joint, size = only("kaplan:nd").formula, only("kaplan:n").formula
    assert isinstance(joint, Kaplan)
    assert isinstance(size, Power)
    assert size.loss(size.constant) == 1
    assert math.isclose(elasticity(size.loss, 1e9), -0.076, rel_tol=1e-7)
    assert math.isclose(joint.loss(1e9, 1e30), (joint.n_c / 1e9) ** joint.alpha_n, rel_tol=1e-9)
    assert math.isclose(joint.loss(1e30, 1e10), (joint.d_c / 1e10) ** joint.alpha_d, rel_tol=1e-4)


def test_a_sum_of_kaplans_two_terms_worked_by_hand() -> None:
    """N = 10^9, D = 10^10: (64000^0.737864 + 1800)^0.103, that is (3518.1 + 1800)^0.103."""
    form = only("kaplan:nd").formula
    assert isinstance(form, Kaplan)
    assert form.loss(1e9, 1e10) == pytest.approx((3518.1 + 1800) ** 0.103, rel=1e-6)


@given(compute=st.floats(1e17, 1e27), away=st.floats(0.2, 5))
def test_chinchillas_optimum_spends_the_compute_and_nothing_near_it_is_better(
    compute: float, away: float
) -> None:
    form = chinchilla()
    n, d = form.optimum(compute)
    assert math.isclose(6 * n * d, compute)
    assert form.loss(n, d) <= form.loss(n * away, d / away) * (1 + 1e-12)
    assert math.isclose(form.alpha * form.a / n**form.alpha, form.beta * form.b / d**form.beta)


def chinchilla() -> Chinchilla:
    form = only("chinchilla").formula
    assert isinstance(form, Chinchilla)
    return form


def test_chinchilla_itself_beats_gopher_at_gophers_compute() -> None:
    """70 B on 1.4 T tokens and 280 B on 300 B tokens are about the same compute (2203.15556)."""
    assert chinchilla().loss(70e9, 1.4e12) < chinchilla().loss(280e9, 300e9)


# Laws of experts


@pytest.mark.parametrize(("e", "loss"), [(1, 2.578), (4, 2.535), (8, 2.509), (32, 2.455)])
def test_losses_of_the_joint_law(e: float, loss: float) -> None:
    form = only("joint").formula
    assert isinstance(form, Joint)
    assert round(form.loss(1e9, 20e9, e), 3) == loss


def test_the_joint_law_at_eight_experts_is_its_reduced_form() -> None:
    """2502.05172 prints the law at E = 8 as 21.833 N^-0.1676 + 119.9126 D^-0.2338 + 1.3637."""
    form = only("joint").formula
    assert isinstance(form, Joint)
    reduced = 21.833 * 1e9**-0.1676 + 119.9126 * 20e9**-0.2338 + 1.3637
    assert math.isclose(form.loss(1e9, 20e9, 8), reduced, rel_tol=1e-3)


def krajewski() -> Krajewski:
    form = only("krajewski").formula
    assert isinstance(form, Krajewski)
    return form


def test_krajewski_counts_all_parameters() -> None:
    """64 experts on a model of 100 M, two thirds of it feed-forward: 4.3 B in all; 4.37 B tokens, G = 8."""
    total = 100e6 * (1 / 3 + 64 * 2 / 3)
    assert round(krajewski().loss(total, 4.37e9, 8), 2) == 3.11
    assert round(krajewski().loss(100e6, 4.37e9, 8), 2) == 3.90


@given(n=sizes, d=st.floats(1e9, 1e13), g=st.floats(1, 16))
def test_finer_experts_always_help_by_krajewskis_law(n: float, d: float, g: float) -> None:
    assert krajewski().loss(n, d, g * 1.01) < krajewski().loss(n, d, g)


def abnar() -> Abnar:
    form = only("abnar").formula
    assert isinstance(form, Abnar)
    return form


def test_a_sum_of_abnars_five_terms_worked_by_hand() -> None:
    """N = 10^9, D = 2 x 10^10, S = 0.9: 0.0715 + 0.4614 + 0.3133 + 0.9156 + 0.94."""
    terms = 0.0715 + 0.4614 + 0.3133 + 0.9156 + 0.94
    assert abs(abnar().loss(1e9, 2e10, 0.9) - terms) < 1e-3


@given(n=sizes, d=st.floats(1e9, 1e13), s=st.floats(0, 0.98))
def test_idle_experts_cost_loss_at_equal_size_exactly_where_abnars_law_says(
    n: float, d: float, s: float
) -> None:
    step = 1e-5
    slope = abnar().loss(n, d, s + step) - abnar().loss(n, d, s)
    # Near the turning point rounding decides the sign of the difference.
    if abs(slope) > 1e-9:
        assert (slope > 0) == abnar().sparsity_costs(n, s)


def ling() -> Leverage:
    form = only("ling").formula
    assert isinstance(form, Leverage)
    return form


@pytest.mark.parametrize(("share", "ratio"), [(0.031, 7.2), (0.05, 5.8), (0.10, 4.0), (0.20, 2.7)])
def test_leverage_at_granularity_twelve_and_1e22_operations(share: float, ratio: float) -> None:
    assert round(ling().ratio(share, 12, 1e22), 1) == ratio


def test_the_best_granularity_is_the_best() -> None:
    best = ling().best_granularity
    assert round(best, 1) == 11.3
    assert ling().ratio(0.03, best, 1e22) > max(ling().ratio(0.03, best * x, 1e22) for x in (0.9, 1.1))


# What is asked of a model


def test_a_switch_model_has_as_many_experts_as_it_has() -> None:
    model = recipe("switch:base")
    assert model.moe is not None
    assert point(model).experts == model.moe.experts
    assert point(model).granularity == 1


def test_shared_experts_count_as_used_width() -> None:
    """DeepSeek-V2: 2 shared and 6 of 160 experts of one width, so 162 / 8."""
    at = point(recipe("deepseek-v2"))
    assert (at.experts, at.granularity) == (162 / 8, 8)
    assert at.sparsity == pytest.approx(1 - 8 / 162)
    assert (at.active, at.total) == (20_327_224_320, 235_741_434_880 - 2 * 102_400 * 5_120)


def test_a_dense_model_is_its_own_dense_equivalent() -> None:
    at = point(recipe("llama:7b"), tokens=10**12)
    for found in predict(LAWS, at).predictions:
        if found.dense_equivalent is not None and found.parameters is not None:
            assert found.loss == found.dense_loss
            assert math.isclose(found.dense_equivalent, found.parameters, rel_tol=1e-9)


@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral:8x7b", "switch:base"])
def test_the_dense_equivalent_has_the_loss_of_the_model(name: str) -> None:
    at = point(recipe(name), tokens=10**12)
    joint, form = predicted("joint", at), only("joint").formula
    assert isinstance(form, Joint)
    assert joint.dense_equivalent is not None
    assert joint.loss is not None
    assert math.isclose(form.loss(joint.dense_equivalent, 1e12), joint.loss, rel_tol=1e-12)


def test_all_laws_answer_about_a_model_and_its_tokens() -> None:
    found = predict(LAWS, point(recipe("deepseek-v3"), tokens=14_800_000_000_000))
    assert [one.law for one in found.predictions] == [law.name for law in LAWS]
    assert not found.unanswered


def test_who_lacks_something_says_what() -> None:
    bare = predict(LAWS, Point(active=1e9, experts=8, tokens=10**10)).unanswered
    assert set(bare) == {"krajewski", "abnar", "ling"}
    assert all("MODEL" in why for why in bare.values())
    dense = predict(LAWS, point(recipe("llama:7b"), tokens=10**10)).unanswered
    assert set(dense) == {"krajewski", "ling"}
    short = predict(LAWS, point(recipe("mixtral"))).unanswered
    assert set(short.values()) == {"needs --tokens"}
    assert set(short) == {law.name for law in LAWS} - {"clark:s-base", "clark:rl-r", "clark:hash", "kaplan:n"}


def test_a_loss_that_no_dense_model_reaches_has_no_dense_equivalent() -> None:
    assert size_of_loss(lambda n: 2 + 1 / n, 1.9) is None


def test_a_name_before_the_colon_is_a_family_and_unknown_names_get_the_nearest() -> None:
    assert [law.name for law in find("clark")] == [f"clark:{router}" for router in ROUTERS]
    assert find("all") == LAWS
    with pytest.raises(ConsiliumError, match=r"unknown scaling law 'chinchila'\. Did you mean 'chinchilla'"):
        find("chinchila")
