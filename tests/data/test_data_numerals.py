from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.data.builtin.numerals import LIMIT, chinese, chinese_count, chinese_digits, english

DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")}
SIZES = {"十": 10, "百": 100, "千": 1000}
SECTIONS = {"万": 10**4, "亿": 10**8}


def read(words: str) -> int:
    """Read a Chinese number, a section of four digits at a time."""
    total = section = digit = 0
    for word in words:
        if word in DIGITS:
            digit = DIGITS[word]
        elif word in SIZES:
            section += (digit or 1) * SIZES[word]
            digit = 0
        else:
            total += (section + digit) * SECTIONS[word]
            section = digit = 0
    return total + section + digit


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "零"),
        (2, "二"),
        (10, "十"),
        (11, "十一"),
        (20, "二十"),
        (21, "二十一"),
        (100, "一百"),
        (101, "一百零一"),
        (110, "一百一十"),
        (115, "一百一十五"),
        (1001, "一千零一"),
        (1010, "一千零一十"),
        (1100, "一千一百"),
        (9999, "九千九百九十九"),
        (10000, "一万"),
        (10010, "一万零一十"),
        (10101, "一万零一百零一"),
        (11000, "一万一千"),
        (100000, "十万"),
        (110000, "十一万"),
        (200010, "二十万零一十"),
        (1010000, "一百零一万"),
        (10010000, "一千零一万"),
        (100000001, "一亿零一"),
        (100010000, "一亿零一万"),
        (1000000000, "十亿"),
    ],
)
def test_numbers_are_spelt_as_in_chinese(number: int, words: str) -> None:
    assert chinese(number) == words


@given(st.integers(0, LIMIT - 1))
def test_a_chinese_number_reads_back(number: int) -> None:
    words = chinese(number)
    assert read(words) == number
    assert "零零" not in words
    assert number == 0 or not words.endswith("零")


def test_counts_and_years_have_their_own_words() -> None:
    assert chinese_count(2) == "两"
    assert chinese_count(12) == "十二"
    assert chinese_digits(2040) == "二\u3007四\u3007"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (1207, "one thousand two hundred and seven"),
        (100_000, "one hundred thousand"),
        (1_000_001, "one million and one"),
    ],
)
def test_numbers_are_spelt_as_in_english(number: int, words: str) -> None:
    assert english(number) == words
