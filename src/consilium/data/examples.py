"""Labelled examples for the filters, generated: templates of sentences, and what spoils a fluent text.

Every list is in two halves: a classifier is trained on the first, and measured on the second, of which it
has seen neither the sentences nor the words in them. The ways to spoil a text are the same in both.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from consilium.data.builtin.domains import prose_texts
from consilium.data.documents import stable_fraction
from consilium.errors import ConsiliumError

_SHORTEST, _LONGEST = 150, 1500
"""Characters of a passage."""
Halves = tuple[Sequence[str], Sequence[str]]

ADVERTISEMENTS: Final[Halves] = (
    (
        "Buy the new {thing} now and save {number}% on your first order!",
        "Limited time offer: get a free {thing} with every purchase over ${number}.",
        "Our {thing} is the best on the market, and shipping is free today only.",
        "Click here to order your {thing} before the sale ends at midnight.",
        "Call 1-800-555-0{number} now, our friendly team is waiting for you!",
        "Sign up today and receive a {number}% discount code by e-mail.",
        "Why pay more? Prices for every {thing} start at just ${number}.99.",
        "Don't miss this exclusive deal on our award-winning {thing}!",
        "100% satisfaction guaranteed, or your money back within {number} days.",
        "Visit our store in {place} for special prices on every {thing}.",
        "Add the {thing} to your cart and enjoy fast, free delivery to {place}.",
        "Join thousands of happy customers who love their {thing}.",
    ),
    (
        "Grab your {thing} while stocks last, only {number} left!",
        "Use coupon code SAVE{number} at checkout for an extra discount.",
        "Subscribe to our newsletter for the hottest offers from {place}.",
        "Order online and get your {thing} at half price this weekend!",
        "The best deals on every {thing}, from only ${number} a month.",
        "Act now: this special offer for new customers ends on Sunday.",
        "Free returns, free shipping, and a {number} year warranty on each {thing}!",
        "Shop the new collection today and save big on your {thing}.",
    ),
)
INFORMATION: Final[Halves] = (
    (
        "The {thing} was first described by a teacher in {place} about {number} years ago.",
        "In {place} the winters are long, and most people walk to work.",
        "A {thing} consists of a frame, a cover and a number of smaller parts.",
        "The study compared {number} villages near {place} over several seasons.",
        "Many historians think that the road to {place} followed the river.",
        "When the water is warm enough, the mixture begins to thicken.",
        "She kept the {thing} in a drawer, and nobody asked about it again.",
        "The council of {place} decided in March to repair the old bridge.",
        "To measure the length of a {thing}, lay it flat and use a ruler.",
        "Most of the {number} letters in the archive are about the harvest.",
        "If a function is given an empty list, it returns nothing at all.",
        "The museum in {place} keeps a {thing} that was found in a field.",
    ),
    (
        "Geologists found {number} layers of clay below the town of {place}.",
        "The word for {thing} comes from an older language of the coast.",
        "After the war the railway between {place} and the sea was closed.",
        "He opened the window, looked at the {thing} and said nothing.",
        "A loop ends as soon as its condition no longer holds.",
        "The bird builds its nest in reeds and lays up to {number} eggs.",
        "Part of the {thing} is made of wood, the rest of iron.",
        "Farmers around {place} plant beans in spring and wheat in autumn.",
    ),
)
THINGS: Final[Halves] = (
    ("lamp", "kettle", "jacket", "bicycle", "camera", "carpet", "clock", "tent", "mattress", "guitar"),
    ("blender", "suitcase", "telescope", "bracelet", "keyboard", "umbrella", "ladder", "sofa"),
)
PLACES: Final[Halves] = (
    ("Lyon", "Bergen", "Kyoto", "Quito", "Leeds", "Porto", "Bremen", "Salem"),
    ("Turku", "Ghent", "Tampa", "Nantes", "Osaka", "Cork"),
)
Spoil = Callable[[str, random.Random], str]


def _shuffled(text: str, draw: random.Random) -> str:
    words = text.split()
    draw.shuffle(words)
    return " ".join(words)


def _stuttered(text: str, draw: random.Random) -> str:
    return " ".join(f"{word} " * draw.randint(1, 4) for word in text.split()).strip()


def _mistyped(text: str, draw: random.Random) -> str:
    letters = list(text)
    for place in draw.sample(range(len(letters)), len(letters) // 5):
        letters[place] = draw.choice("qzxjk#~|;")
    return "".join(letters)


def _listed(text: str, draw: random.Random) -> str:
    words = [word.strip(".,!") for word in text.split() if len(word) > 3]
    return " | ".join(draw.sample(words, len(words)))


def _unspaced(text: str, draw: random.Random) -> str:
    return "".join(c for c in text if c != " " or draw.random() < 0.2)


def _looped(text: str, draw: random.Random) -> str:
    words = text.split()
    start = draw.randrange(max(len(words) - 3, 1))
    return " ".join(words[start : start + 3] * (len(words) // 3 + 2))


def _garbled(text: str, draw: random.Random) -> str:
    return "".join(draw.choice("0123456789{}<>/=%&") if draw.random() < 0.25 else c for c in text)


SPOILS: Final[Mapping[str, Spoil]] = MappingProxyType(
    {
        "shuffled": _shuffled,
        "stuttered": _stuttered,
        "mistyped": _mistyped,
        "listed": _listed,
        "looped": _looped,
        "garbled": _garbled,
        "unspaced": _unspaced,
    }
)


def examples(kind: str, count: int, *, seen: bool, seed: int = 0) -> list[tuple[str, bool]]:
    """Return ``count`` texts, half of them good, of the half of the lists that training sees or of the other.

    ``kind`` is ``advertisement`` or ``fluency``. Half of what is good is generated, half are passages of
    Python's language reference, where this Python has it: what people write is more varied than templates.
    """
    half = 0 if seen else 1
    draw = random.Random(f"{kind} {half} {seed}")
    found = passages(half)
    return [(_example(kind, half, draw, found, good=i % 2 == 0), i % 2 == 0) for i in range(count)]


@functools.cache
def passages(half: int) -> tuple[str, ...]:
    """Return the paragraphs of one half by their hash, since topics repeat some of each other's."""
    try:
        topics = prose_texts()
    except ConsiliumError:
        return ()
    paragraphs = {part.strip()[:_LONGEST] for text in topics for part in text.text.split("\n\n")}
    return tuple(
        part
        for part in sorted(paragraphs)
        if len(part) > _SHORTEST and (stable_fraction(part, salt="half") < 0.5) == (half == 0)
    )


def _example(kind: str, half: int, draw: random.Random, found: Sequence[str], *, good: bool) -> str:
    own = draw.choice(found) if found and draw.random() < 0.5 else _text(INFORMATION[half], half, draw)
    if good:
        return own
    if kind == "advertisement":
        return _text(ADVERTISEMENTS[half], half, draw)
    return SPOILS[draw.choice(sorted(SPOILS))](own, draw)


def _text(templates: Sequence[str], half: int, draw: random.Random) -> str:
    chosen = draw.sample(templates, draw.randint(3, 6))
    return " ".join(
        template.format(
            thing=draw.choice(THINGS[half]), place=draw.choice(PLACES[half]), number=draw.randint(5, 95)
        )
        for template in chosen
    )
