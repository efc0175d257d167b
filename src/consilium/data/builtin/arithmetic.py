"""The mathematics domain: small sums with their results, made anew from a seed and the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from consilium.data.builtin.numerals import english
from consilium.data.documents import Text

SHARDS = 200
SHARD_CHARACTERS = 2000
NAMES = ("Ana", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goro", "Hana", "Ivan", "Jun", "Kofi", "Lena")
THINGS = ("apples", "books", "coins", "stones", "pencils", "tickets", "shells", "cards", "stamps", "eggs")


def mathematics_texts(shards: int = SHARDS) -> list[Text]:
    """Return texts of about 2 kB. A shard is a unit of the split and depends on its number alone."""
    return [_shard(number) for number in range(shards)]


def _shard(number: int) -> Text:
    random = Random(f"mathematics {number}")
    lines: list[str] = []
    while sum(map(len, lines)) < SHARD_CHARACTERS:
        lines.append(random.choice(FORMS)(random) + "\n")
    name = f"shard {number}"
    return Text("".join(lines), "mathematics", name, f"mathematics {name}")


def _size(random: Random) -> int:
    """Draw a number of one to four digits, each length equally often."""
    return random.randrange(10 ** random.randint(1, 4))


def _sum(random: Random) -> str:
    a, b = _size(random), _size(random)
    return f"{a} + {b} = {a + b}"


def _difference(random: Random) -> str:
    a, b = _size(random), _size(random)
    return f"{a} - {b} = {a - b}"


def _product(random: Random) -> str:
    a, b = random.randrange(100), random.randrange(13)
    return f"{a} * {b} = {a * b}"


def _quotient(random: Random) -> str:
    a, b = random.randrange(200), random.randint(2, 12)
    return f"{a} / {b} = {a // b} remainder {a % b}"


def _comparison(random: Random) -> str:
    a, b = _size(random), _size(random)
    sign = "<" if a < b else ">" if a > b else "="
    return f"{a} {sign} {b}"


def _order(random: Random) -> str:
    numbers = [_size(random) for _ in range(random.randint(3, 5))]
    return f"sort {numbers} = {sorted(numbers)}"


def _words(random: Random) -> str:
    a, b = random.randrange(100), random.randrange(100)
    return f"{english(a).capitalize()} plus {english(b)} is {english(a + b)}."


def _bought(random: Random) -> str:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    a, b = random.randint(2, 50), random.randint(2, 50)
    return f"{name} has {a} {thing} and gets {b} more. Now {name} has {a} + {b} = {a + b} {thing}."


def _shared(random: Random) -> str:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    friends, each = random.randint(2, 9), random.randint(2, 12)
    total = friends * each
    return f"{name} shares {total} {thing} among {friends} friends. Each gets {total} / {friends} = {each}."


FORMS: tuple[Callable[[Random], str], ...] = (
    _sum,
    _difference,
    _product,
    _quotient,
    _comparison,
    _order,
    _words,
    _bought,
    _shared,
)
