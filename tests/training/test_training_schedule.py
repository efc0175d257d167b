from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.config.training import WSD, Cosine, Schedule, StepDecay
from consilium.training.schedule import learning_rate

SCHEDULES = (
    Cosine(),
    WSD(),
    StepDecay(),
    Cosine(warmup=0.0, final=0.0),
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
    if step < steps - 1:
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
