from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from consilium.words.seldom import LOG_SECONDS, QUIET_SECONDS, Seldom


@given(st.lists(st.floats(0, 30), max_size=60))
def test_nothing_is_told_at_first_and_then_seldom(waits: list[float]) -> None:
    now, told = 0.0, list[float]()
    seldom = Seldom(lambda text: told.append(float(text)), clock=lambda: now)
    due = QUIET_SECONDS
    expected = list[float]()
    for wait in waits:
        now += wait
        seldom(repr(now))
        if now >= due:
            expected.append(now)
            due = now + LOG_SECONDS
    assert told == expected
