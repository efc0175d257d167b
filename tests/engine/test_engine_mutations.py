"""What no output shows: rows that have finished cost the experts nothing and reach none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from consilium.config.model import Model
from consilium.engine.engine import Engine
from consilium.moe.types import Activations, Mode, Routing, Tokens
from consilium.ops.rows import Rows
from small import DEEPSEEK, SWITCH, lively


@dataclass
class Ends:
    """A codec of which only the end token matters; it is its own stream."""

    eos_id: int
    opening_id: int | None = None
    known_ids: range = range(300)
    markers: Mapping[str, int] = field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return ""

    def stream(self) -> Ends:
        return self

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


@dataclass
class Watcher:
    """Counts, for each pass of one layer, the tokens that routed and the rows that experts computed."""

    layer: int
    tokens: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        if layer == self.layer:
            self.tokens.append(int(tokens.valid_T.sum()))

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        if layer == self.layer:
            self.computed.append(len(activations.input_RD))


@pytest.mark.parametrize(("config", "k"), [(DEEPSEEK, 2), (SWITCH, 1)], ids=["deepseek", "switch"])
def test_padding_and_finished_rows_take_part_in_nothing(config: Model, k: int) -> None:
    model, prompts = lively(config), [[5, 17, 255, 3], [9], [8, 8]]
    alone = [Engine(model).complete([prompt], max_tokens=8)[0] for prompt in prompts]
    end = next(token for token in alone[0] if token not in alone[1])
    cut = [row[: row.index(end) + 1] if end in row else row for row in alone]
    watcher = Watcher(layer=next(iter(model.moe_modules())))
    engine = Engine(model, Ends(end), mode=Mode(observer=watcher))
    assert engine.complete(prompts, max_tokens=8) == cut
    assert len(cut[0]) < len(cut[1]) == 8
    running = [sum(len(row) > step for row in cut) for step in range(1, 8)]
    assert watcher.tokens == [4, 1, 2, *running], "each prompt is a pass of its own"
    assert watcher.computed == [k * count for count in watcher.tokens]
