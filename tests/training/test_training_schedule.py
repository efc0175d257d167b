from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.config.optimizer import WSD, Constant, Cosine, Schedule, StepDecay
from consilium.training.schedule import learning_rate

SCHEDULES = (
    Cosine(),
    WSD(),
    StepDecay(),
    Cosine(warmup=0.0, final=0.0),
    WSD(warmup=0.0, final=0.0),
    Constant(),
    WSD(decay=1.0),
    StepDecay(warmup=0.5),
)


@given(st.sampled_from(SCHEDULES), st.integers(1, 500), st.data())
def test_the_rate_is_positive_up_to_the_end_and_never_above_the_peak(
    schedule: Schedule, steps: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps - 1))
    rate = learning_rate(schedule, 2.0, step, steps)
    assert 0 <= rate <= 2.0
    if step == 0 or step < steps - 1:
        assert rate > 0


@given(st.sampled_from(SCHEDULES), st.integers(10, 500))
def test_the_rate_rises_to_the_peak_and_then_never_rises(schedule: Schedule, steps: int) -> None:
    rates = [learning_rate(schedule, 1.0, step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_cosine_ends_at_its_final_fraction() -> None:
    assert learning_rate(Cosine(final=0.1), 3.0, 99, 100) == pytest.approx(0.3)


@pytest.mark.parametrize("kind", [Cosine, WSD])
def test_a_run_of_one_step_trains_at_the_peak(kind: type[Cosine | WSD]) -> None:
    """It is the first step as well as the last: at the final rate, which may be 0, it would do nothing."""
    schedule = kind(warmup=0.0, final=0.0)
    assert learning_rate(schedule, 2.0, 0, 1) == 2.0
    assert [learning_rate(schedule, 2.0, step, 2) for step in range(2)] == [2.0, 0.0]


def test_wsd_is_flat_until_the_decay() -> None:
    schedule = WSD(warmup=0.1, decay=0.2, final=0.0)
    rates = [learning_rate(schedule, 1.0, step, 100) for step in range(100)]
    assert rates[10:81] == [1.0] * 71
    assert rates[99] == pytest.approx(0.0)


def test_steps_multiply_at_each_fraction() -> None:
    schedule = StepDecay(warmup=0.0, at=(0.8, 0.9), factor=0.316)
    assert [learning_rate(schedule, 1.0, step, 10) for step in (7, 8, 9)] == pytest.approx(
        [1.0, 0.316, 0.316**2]
    )


def test_shares_of_the_run_are_not_rounded_up_by_binary_fractions() -> None:
    """0.07 * 100 is 7.000000000000001: seven steps of warm-up, the seventh at the peak."""
    rates = [learning_rate(Cosine(warmup=0.07), 1.0, step, 100) for step in range(8)]
    assert rates[6] == rates[7] == 1.0
    assert rates[5] < 1.0
    for steps in (100, 1000, 10_000):
        for percent in range(100):
            fraction, whole = percent / 100, steps * percent // 100
            assert learning_rate(StepDecay(warmup=0, at=(fraction,)), 1.0, whole, steps) < 1.0


@given(st.integers(2, 400), st.sampled_from((Cosine(), WSD(), WSD(decay=0.001), Cosine(warmup=0.9))))
def test_the_last_step_reaches_the_end_of_its_decay(steps: int, schedule: Schedule) -> None:
    warm = -(-round(schedule.warmup * steps, 6) // 1)
    if warm < steps:
        assert learning_rate(schedule, 1.0, steps - 1, steps) == pytest.approx(schedule.final)
