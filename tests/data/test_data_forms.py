"""What is learned of a prompt with its completion and of a conversation, and what is only read."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from data_corpora import BYTES, corpus_of
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.config.data import Data
from consilium.data import render
from consilium.data.documents import Document
from consilium.data.forms import Completion, Content, Message, Talk, plain, plain_turn
from consilium.data.loader import Loader, held_out_batches
from consilium.data.template import Template, find_template
from consilium.data.tokenizer import Tokenizer
from consilium.data.writing import Writer
from consilium.errors import ConsiliumError
from engine.templates import END, TEMPLATES, write_tokenizer

every = pytest.mark.parametrize("name", TEMPLATES)


@functools.cache
def ours(name: str) -> tuple[Template, Tokenizer]:
    folder = write_tokenizer(Path(tempfile.mkdtemp()) / name, name)
    tokenizer = Tokenizer.load(folder)
    template = find_template(folder, tokenizer)
    assert template is not None
    return template, tokenizer


@functools.cache
def compiled(source: str) -> Any:
    return render.environment().from_string(source)


def rendered_here(template: Template, context: Mapping[str, Any]) -> str:
    return compiled(template.source).render(**context)


def talk(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts))


CONVERSATIONS = [
    talk("hello world", "Fine."),
    talk("say <|im_end|> now", "  It is <|im_end|>. \n", "and 你好?", "<think>\nwell\n</think>\n\nYes."),
    talk("a", "", "b", "c"),
]


@every
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["short", "long", "empty"])
def test_segments_are_the_parts_of_the_conversation(
    name: str, messages: tuple[Message, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marks around answers change nothing of what is rendered."""
    monkeypatch.setattr("consilium.data.template._render", rendered_here)
    template, tokenizer = ours(name)
    segments = template.segments(messages, tokenizer, rendered_here)
    assert joined([part for segment in segments for part in segment.parts]) == joined(
        template.parts(messages, tokenizer, opened=False)
    )


def joined(parts: list[str | int]) -> list[str | int]:
    """Parts with neighbouring texts put together."""
    found: list[str | int] = []
    for part in parts:
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@every
def test_what_is_read_before_an_answer_is_what_the_model_is_asked_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.data.template._render", rendered_here)
    template, tokenizer = ours(name)
    messages = talk("hello world", "Fine.")
    opening = template.opening(tokenizer, rendered_here)
    first, second, *rest = template.segments(messages, tokenizer, rendered_here, opening=opening)
    assert (first.learned, second.learned) == (False, True)
    assert not any(segment.learned for segment in rest)
    asked = template.parts(messages[:1], tokenizer, opened=True)
    text = [part for part in second.parts if isinstance(part, str)]
    assert "".join(text).strip() == "Fine."
    assert second.parts[-1] == tokenizer.markers[END[name]]
    assert tokenizer.encode_parts(first.parts) == tokenizer.encode_parts(asked)


@every
@settings(max_examples=10)
@given(
    said=st.lists(
        st.sampled_from(["a", "<|im_end|>", "</s>", " ", "<think>", "\ufdd0", "[INST]"]), min_size=1
    )
)
def test_no_text_of_a_user_is_learned_or_becomes_a_marker(name: str, said: list[str]) -> None:
    template, tokenizer = ours(name)
    asked, answered = "ask " + "".join(said), "ok"
    found = template.segments(talk(asked, answered), tokenizer, rendered_here)
    plain_one = template.segments(talk("ask", answered), tokenizer, rendered_here)
    markers = [
        [p for s in segments for p in s.parts if isinstance(p, int)] for segments in (found, plain_one)
    ]
    assert markers[0] == markers[1]
    assert [s for s in found if s.learned] == [s for s in plain_one if s.learned]


@pytest.mark.parametrize("name", ["qwen3", "thinking", "chatml"])
@pytest.mark.parametrize("said", ["<think>\nwell\n</think>\n\nYes.", "well\n</think>\n\nYes.", "Yes."])
@pytest.mark.parametrize("earlier", [(), ("before", "<think>\nhm\n</think>\n\nNo.")], ids=["one", "two"])
def test_all_that_a_model_would_write_is_learned(name: str, said: str, earlier: tuple[str, ...]) -> None:
    """What transformers renders behind the question, thoughts and their borders included."""
    template, tokenizer = ours(name)
    theirs = transformers.AutoTokenizer.from_pretrained(
        write_tokenizer(Path(tempfile.mkdtemp()) / name, name), local_files_only=True
    )
    messages = talk(*earlier, "asked", said)
    given = [{"role": message.role, "content": message.content} for message in messages]
    asked = theirs.apply_chat_template(given[:-1], tokenize=False, add_generation_prompt=True)
    told = theirs.apply_chat_template(given, tokenize=False)
    assert told.startswith(asked)
    opening = template.opening(tokenizer, rendered_here)
    found = template.segments(messages, tokenizer, rendered_here, opening=opening)
    *_, last = (segment for segment in found if segment.learned)
    marker_of = {index: text for text, index in tokenizer.markers.items()}
    written = "".join(part if isinstance(part, str) else marker_of[part] for part in last.parts)
    assert written == told.removeprefix(asked).rstrip("\n")


@pytest.mark.parametrize("content", ["message.content[:5]", "message.content | length"])
def test_a_template_that_changes_answers_is_refused(content: str) -> None:
    _, tokenizer = ours("chatml")
    source = "{% for message in messages %}<|im_start|>{{ " + content + " }}<|im_end|>{% endfor %}"
    answered = Template(source, "chat_template.jinja")
    with pytest.raises(ConsiliumError, match="what of it is learned cannot be told"):
        answered.segments(talk("a", "bcdefg"), tokenizer, rendered_here)


def test_many_conversations_are_written_through_one_process() -> None:
    _, tokenizer = ours("chatml")
    writer = Writer(tokenizer)
    contents = [Talk(talk(f"question {i}", f"answer {i}")) for i in range(5)]
    written = writer.write(contents, measured=True)
    writer.close()
    for i, found in enumerate(written):
        assert found.learned is not None
        assert found.sizes is not None
        answer = [token for token, learned in zip(found.ids, found.learned, strict=True) if learned]
        assert tokenizer.decode(answer) == f"answer {i}"
        assert answer[-1] == tokenizer.markers["<|im_end|>"]
        assert sum(found.sizes) == len(f"answer {i}")


def test_a_template_that_refuses_is_told() -> None:
    _, tokenizer = ours("llama-2")
    with pytest.raises(ConsiliumError, match="roles must alternate"):
        Writer(tokenizer).write([Talk((Message("user", "a"), Message("user", "b")))], measured=False)


def test_without_a_template_a_conversation_is_plain_text() -> None:
    messages = (Message("system", "Be brief."), *talk("1 + 1?", "2", "2 + 2?", "4"))
    (written,) = Writer(BYTES).write([Talk(messages)], measured=True)
    assert (
        BYTES.decode(written.ids)
        == "Be brief.\n\nQ: 1 + 1?\nA: 2\nQ: 2 + 2?\nA: 4\n"
        == plain(Talk(messages))
    )
    assert written.learned is not None
    learned = [token for token, flag in zip(written.ids, written.learned, strict=True) if flag]
    assert BYTES.decode(learned) == " 2\n 4\n"
    with pytest.raises(ConsiliumError, match="without a chat template there is no role 'tool'"):
        plain_turn(Message("tool", "x"))


contents = st.one_of(
    st.text("xyz", min_size=1, max_size=20),
    st.builds(Completion, st.text("pq", min_size=1, max_size=9), st.text("cd", min_size=1, max_size=9)),
    st.builds(
        lambda asked, said: Talk(talk(asked, said)),
        st.text("uv", min_size=1, max_size=9),
        st.text("mn", min_size=1, max_size=9),
    ),
)


@given(found=st.lists(contents, min_size=1, max_size=8), length=st.integers(2, 16), step=st.integers(0, 9))
def test_targets_are_what_is_learned_and_nothing_is_lost(
    found: list[Content], length: int, step: int
) -> None:
    """Letters of prompts and questions are inputs and never targets; all others are both."""
    named = [Document(content, "d", str(i), held_out=False) for i, content in enumerate(found)]
    corpus = corpus_of([*named, Document("xyz" * length, "d", "z", held_out=False)])
    batch = Loader(corpus, Data(sequence_length=length), batch=2, seed=0).batch(step)
    ids, targets = batch.ids_BS.numpy(), batch.targets_BS.numpy()
    for letter in "pquvQ":
        assert not (targets == BYTES.encode(letter)[0]).any()
    for letter in "xyzcdmn":
        token = BYTES.encode(letter)[0]
        inside = np.logical_and(ids[:, 1:] == token, True)
        assert (targets[:, :-1][inside] == token).all()
    closes = ids[:, :-1][ids[:, 1:] == BYTES.eos_id]
    assert (targets[:, :-1][ids[:, 1:] == BYTES.eos_id] == BYTES.eos_id).all() or not len(closes)


def test_a_domain_of_which_nothing_is_learned_is_refused() -> None:
    fine, asked = "xyz" * 20, Completion("p" * 40, "")
    corpus = corpus_of([Document(c, name, name, held_out=False) for name, c in (("a", fine), ("b", asked))])
    with pytest.raises(ConsiliumError, match="nothing of domain 'b' is learned, since all its completions"):
        Loader(corpus, Data(sequence_length=8), batch=2, seed=0)
    answered = [
        Document(asked, "b", "0", held_out=False),
        Document(Completion("p", "c"), "b", "1", held_out=False),
    ]
    assert Loader(corpus_of(answered), Data(sequence_length=8), batch=2, seed=0).domains == ("b",)


@given(found=st.lists(contents, min_size=1, max_size=6), length=st.integers(2, 9), limit=st.integers(1, 30))
def test_a_limit_leaves_windows_that_say_something(found: list[Content], length: int, limit: int) -> None:
    held_out = [Document(content, "d", str(i), held_out=True) for i, content in enumerate(found)]
    batches = list(held_out_batches(corpus_of(held_out), "d", length, 2, limit_tokens=limit))
    assert batches
    assert all((batch.batch.targets_BS >= 0).any(dim=1).all() for batch in batches)


@given(found=st.lists(contents, min_size=1, max_size=6), length=st.integers(2, 12))
def test_held_out_bytes_are_those_of_what_is_learned(found: list[Content], length: int) -> None:
    corpus = corpus_of([Document(content, "d", str(i), held_out=True) for i, content in enumerate(found)])
    batches = list(held_out_batches(corpus, "d", length, 4))
    counted = sum(int(batch.bytes_BS.sum()) for batch in batches)
    targets = [t for batch in batches for t in batch.batch.targets_BS.flatten().tolist() if t >= 0]
    expected = "".join(
        content
        if isinstance(content, str)
        else content.completion
        if isinstance(content, Completion)
        else plain_turn(content.messages[1])
        for content in found
    )
    assert counted == len(expected) == corpus.held_out["d"].byte_count
    assert BYTES.decode(targets) == expected
