"""From contents to tokens: which of them a model is trained to write, and which it only reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from consilium.data.forms import Completion, Content, Message, Talk, plain_turn
from consilium.data.template import Rendering, Segment, find_template
from consilium.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Written:
    """A content as tokens."""

    ids: list[int]
    learned: list[bool] | None
    """None where all are."""
    sizes: list[int] | None = None
    """Bytes of the source behind each token that is learned, 0 for the others; where they were asked for."""


@final
class Writer:
    """Turns contents into tokens, as a tokenizer and its chat template want them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = find_template(Path("the tokenizer"), tokenizer)
        """None: conversations are plain text."""
        self._rendering = Rendering()
        self._opening: str | None = None

    def close(self) -> None:
        self._rendering.close()

    def write(self, contents: Sequence[Content], *, measured: bool) -> list[Written]:
        """Return the tokens of each content; plain text is encoded in parallel.

        Raises ConsiliumError for a conversation that the template refuses.
        """
        whole = [content for content in contents if isinstance(content, str)]
        encoded = iter(self.tokenizer.encode_batch(whole))
        return [
            self._whole(content, next(encoded), measured=measured)
            if isinstance(content, str)
            else self._joined(self.segments(content), measured=measured)
            for content in contents
        ]

    def segments(self, content: Completion | Talk) -> Sequence[Segment]:
        match content:
            case Completion(prompt=prompt, completion=completion):
                return [Segment((prompt,), learned=False), Segment((completion,), learned=True)]
            case Talk(messages=messages) if self.template is None:
                return [Segment(*turn) for turn in _plain_turns(messages)]
            case Talk(messages=messages):
                assert self.template is not None
                render = self._rendering.render
                if self._opening is None:
                    self._opening = self.template.opening(self.tokenizer, render)
                return self.template.segments(messages, self.tokenizer, render, opening=self._opening)

    def _whole(self, text: str, ids: list[int], *, measured: bool) -> Written:
        return Written(ids, None, self.tokenizer.source_sizes(text, ids).tolist() if measured else None)

    def _joined(self, segments: Sequence[Segment], *, measured: bool) -> Written:
        """Segments are encoded apart: an answer begins with tokens of its own, as when a model is asked."""
        before = [(), *(segment.parts[-1:] for segment in segments)]
        parts = [
            (segment, self._encoded(segment, *of)) for segment, of in zip(segments, before, strict=False)
        ]
        if parts and parts[0][1][:1] == [self.tokenizer.open_id]:  # every document is opened with it
            parts[0] = (parts[0][0], parts[0][1][1:])
        learned = [segment.learned for segment, ids in parts for _ in ids]
        sizes = [size for part in parts for size in self._sizes(*part)] if measured else None
        return Written([token for _, ids in parts for token in ids], learned, sizes)

    def _encoded(self, segment: Segment, before: str | int = "") -> list[int]:
        """A marker before it takes the blanks along that are its own."""
        if isinstance(before, int):
            return self.tokenizer.encode_parts((before, *segment.parts))[1:]
        return self.tokenizer.encode_parts(segment.parts)

    def _sizes(self, segment: Segment, ids: list[int]) -> list[int]:
        if not segment.learned:
            return [0] * len(ids)
        if len(segment.parts) == 1 and isinstance(segment.parts[0], str):
            return self.tokenizer.source_sizes(segment.parts[0], ids).tolist()
        markers = frozenset(self.tokenizer.markers.values())
        sizes_V = self.tokenizer.sizes_V
        return [0 if token in markers else int(sizes_V[token]) for token in ids]


def _plain_turns(messages: Sequence[Message]) -> list[tuple[tuple[str], bool]]:
    return [((plain_turn(message),), message.role == "assistant") for message in messages]
