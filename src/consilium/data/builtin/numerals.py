"""Numbers in English and Chinese words."""

from __future__ import annotations

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
SMALL = f"{UNITS} seventeen eighteen nineteen".split()
DECADES = "zero ten twenty thirty forty fifty sixty seventy eighty ninety"
TENS = DECADES.split()
DIGITS = "零一二三四五六七八九"
ROUND_ZERO = "\u3007"
"""The zero of years and telephone numbers, a circle."""
PLACES = ("", "十", "百", "千")
SECTIONS = ("", "万", "亿")
LIMIT = 10**12


def english(number: int) -> str:
    """Spell 0 <= number < 10**9: ``1,207`` is ``one thousand two hundred and seven``."""
    if number < 20:
        return SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{SMALL[ones]}" if ones else "")
    for size, word in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= size:
            head, rest = divmod(number, size)
            joint = " and " if rest < 100 else " "
            return f"{english(head)} {word}" + (joint + english(rest) if rest else "")
    raise AssertionError(number)


def chinese(number: int) -> str:
    """Spell 0 <= number < 10**12 in Chinese: 10 is 十, 110 is 一百一十, 10101 is 一万零一百零一.

    Digits go in sections of four. Zeros between two other digits are said once, as 零; zeros at the end of a
    section are not said; only a number's leading 一十 loses its 一.
    """
    assert 0 <= number < LIMIT, number
    if number == 0:
        return DIGITS[0]
    words = ""
    for power in range(len(SECTIONS) - 1, -1, -1):
        section = number // 10 ** (4 * power) % 10000
        if section:
            gap = DIGITS[0] if words and section < 1000 else ""
            words += gap + _section(section) + SECTIONS[power]
        elif words and not words.endswith(DIGITS[0]) and number % 10 ** (4 * power) > 0:
            words += DIGITS[0]
    words = words.replace("零零", "零")
    return words.removeprefix("一") if words.startswith("一十") else words


def _section(section: int) -> str:
    words = ""
    for place in (3, 2, 1, 0):
        digit = section // 10**place % 10
        if digit:
            words += DIGITS[digit] + PLACES[place]
        elif words and section % 10**place and not words.endswith(DIGITS[0]):
            words += DIGITS[0]
    return words


def chinese_digits(number: int) -> str:
    """Spell digit by digit, as years are read: 2024 is 二〇二四."""
    return "".join(ROUND_ZERO if digit == "0" else DIGITS[int(digit)] for digit in str(number))


def chinese_count(number: int) -> str:
    """Spell a count before a measure word, where two is 两."""
    return "两" if number == 2 else chinese(number)
