from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.data.forms import Message
from consilium.engine.chat import (
    Conversation,
    Questions,
    fitted,
    read_conversation,
    write_conversation,
)
from consilium.errors import ConsiliumError
from engine.codecs import Bytes

texts = st.text("ab é\n", max_size=9)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Perhaps a system message, whole exchanges, and a question that waits for its answer."""
    made = Conversation().with_system(draw(texts))
    for _ in range(draw(st.integers(0, 5))):
        made = made.with_message("user", draw(texts)).with_message("assistant", draw(texts))
    return made.with_message("user", draw(texts))


@dataclass
class Lengths:
    """A format of one token a character and two a message."""

    name: str = "lengths"
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def ids(self, messages: Sequence[Message]) -> list[int]:
        return [ord(c) for m in messages for c in f"<{m.content}>"]


@given(conversations(), st.integers(0, 60))
def test_what_fits_is_the_system_message_and_as_many_of_the_last_turns_as_possible(
    whole: Conversation, most: int
) -> None:
    left, ids, gone = fitted(whole, Lengths(), most)
    exchanges = len(whole.turns) // 2
    found = next(
        (n for n in range(exchanges + 1) if len(Lengths().ids(whole.without_oldest(n).messages)) <= most),
        exchanges,
    )
    assert gone == found
    assert left == whole.without_oldest(found)
    assert ids == Lengths().ids(left.messages)
    assert left.system == whole.system
    assert left.messages[-1] == whole.messages[-1]


@given(conversations())
def test_a_conversation_comes_back_from_its_file(whole: Conversation) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.json"
        for _ in range(2):
            write_conversation(whole, path)
        assert read_conversation(path) == whole


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"notes of somebody",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 100_000,
        json.dumps({"kind": "consilium-chat", "version": 2, "messages": []}).encode(),
        json.dumps({"kind": "consilium-chat", "version": 1, "messages": [{"role": "user"}]}).encode(),
        json.dumps(
            {"kind": "consilium-chat", "version": 1, "messages": [{"role": "user", "content": 3}]}
        ).encode(),
        json.dumps(
            {"kind": "consilium-chat", "version": 1, "messages": [{"role": "tool", "content": "x"}]}
        ).encode(),
    ],
)
def test_a_foreign_file_is_neither_read_nor_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "theirs.json"
    path.write_bytes(content)
    with pytest.raises(ConsiliumError, match="is no conversation; give a file that /save wrote"):
        read_conversation(path)
    with pytest.raises(ConsiliumError, match="so it is left alone"):
        write_conversation(Conversation(), path)
    assert path.read_bytes() == content


def test_places_where_nothing_can_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="left alone"):
        write_conversation(Conversation(), tmp_path)
    with pytest.raises(ConsiliumError, match="cannot read"):
        read_conversation(tmp_path / "absent.json")
    write_conversation(Conversation(), tmp_path / "new/folder/c.json")
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["c.json"]


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "system"], ["tool"]])
def test_turns_alternate(roles: list[str]) -> None:
    with pytest.raises(ConsiliumError, match="user and assistant in turn"):
        Conversation(tuple(Message(role, "x") for role in roles))


def test_without_a_template_a_question_is_written_as_the_built_in_text_writes_it() -> None:
    asked = Conversation().with_message("user", "1+1?").with_message("assistant", " 2")
    asked = asked.with_message("user", "2+2?").with_system("Count.")
    ids = Questions(Bytes()).ids(asked.messages)
    assert ids[0] == 256
    assert bytes(ids[1:]).decode() == "Count.\n\nQ: 1+1?\nA: 2\nQ: 2+2?\nA:"
