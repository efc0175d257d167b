"""Which experts a token uses: what the model's own routing says, and a page that shows it and no more."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.analysis.tokens import MOST_TOKENS, observe_tokens, pieces_of
from consilium.config.moe import Capacity
from consilium.data.corpus import measured_corpus, whole_documents
from consilium.data.documents import Text
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.model.types import Inputs, Options
from consilium.records.tokens import ReadPassage, TokensRead
from consilium.report.tokens import build_tokens_page
from small import DEEPSEEK, SWITCH, lively

WORDS = "a <b>bold</b> & é 专家 token.\n"


def corpus_of(*texts: str):  # noqa: ANN201
    documents = [Text(text, f"d{n}", f"n{n}", f"n{n}") for n, text in enumerate(texts)]
    return measured_corpus(whole_documents(documents), Tokenizer.of_bytes())


def test_what_is_used_is_what_the_routing_keeps_by_falling_weight() -> None:
    assert SWITCH.moe is not None
    tight = dataclasses.replace(SWITCH.moe, admission=Capacity(factor=0.5, scope="always"))
    for config in (DEEPSEEK, dataclasses.replace(SWITCH, moe=tight)):
        model = lively(config, seed=3).eval()
        read = observe_tokens(model, corpus_of(WORDS * 2), "x")
        assert read.layers == tuple(i for i in range(config.layers) if config.is_moe(i))
        [passage] = read.passages
        ids = [Tokenizer.of_bytes().open_id, *Tokenizer.of_bytes().encode(WORDS * 2)]
        ids = ids[: len(passage.pieces)]
        with torch.no_grad():
            out = model(Inputs(torch.tensor([ids])), options=Options(routings=True))
        for place, layer in enumerate(read.layers):
            routing = out.routings[layer]
            for token, used in enumerate(passage.used[place]):
                pairs = [
                    (float(routing.weights_TK[token, k]), int(routing.experts_TK[token, k]))
                    for k in range(routing.experts_TK.shape[1])
                    if routing.keep_TK[token, k]
                ]
                assert sorted(expert for _, expert in pairs) == sorted(used)
                weight = {expert: weight for weight, expert in pairs}
                assert [weight[e] for e in used] == sorted(weight.values(), reverse=True)
    assert any(not used for used in passage.used[0]), "the capacity drops some"


def test_no_more_is_read_than_a_person_looks_at() -> None:
    read = observe_tokens(lively(SWITCH, seed=1).eval(), corpus_of(WORDS * 90, WORDS * 70), "x")
    tokens = sum(len(passage.pieces) for passage in read.passages)
    assert 0.5 * MOST_TOKENS < tokens <= MOST_TOKENS + len(read.passages)
    assert {passage.domain for passage in read.passages} == {"d0", "d1"}


@given(st.text(min_size=1, max_size=40))
def test_pieces_joined_are_the_text(text: str) -> None:
    tokenizer = Tokenizer.of_bytes()
    try:
        ids = tokenizer.encode(text)
    except ConsiliumError:
        return  # half a surrogate pair is no text
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert len(pieces) == len(ids)


def test_a_dense_model_is_told_in_one_sentence() -> None:
    dense = dataclasses.replace(SWITCH, moe=None)
    with pytest.raises(ConsiliumError, match="x is dense"):
        observe_tokens(lively(dense, seed=1).eval(), corpus_of(WORDS), "x")


class Spans(HTMLParser):
    """Every span of a page: class, title and text; whatever else could run or load something."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, str, str]] = []
        self.others: set[str] = set()
        self._open: tuple[str, str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.others.add(tag)
        if tag == "span":
            self._open = (found.get("class") or "", found.get("title") or "")

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.spans.append((*self._open, data))

    def handle_endtag(self, tag: str) -> None:
        self._open = None if tag == "span" else self._open


def test_a_page_shows_each_token_with_its_experts_and_escapes_all_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    passage = ReadPassage(
        domain="d", pieces=(hostile, "", "b", "c"), used=(((9, 1), (0,), (), (1,)), ((0,), (1,), (2,), (3,)))
    )
    read = [
        TokensRead(model=name, experts=10, layers=(1, 3), passages=(passage,))
        for name in ("<i>after", "before")
    ]
    page = build_tokens_page(read, tmp_path / "page.html").read_text(encoding="utf-8")
    spans = Spans()
    spans.feed(page)
    titled = [span for span in spans.spans if span[1]]
    one = [("c2", "expert 9, 1", hostile), ("none", "no expert", "b"), ("c1", "expert 1", "c")]
    other = [("c0", "expert 0", hostile), ("c2", "expert 2", "b"), ("c3", "expert 3", "c")]
    assert titled == [*one, *one, *other, *other]
    assert not spans.others & {"script", "i", "img", "iframe"}
    assert "have a colour of their own" not in page
    assert ("c2", "", "expert 9: 33%") in spans.spans


def test_the_experts_used_most_have_colours_of_their_own_in_all_models(tmp_path: Path) -> None:
    """Of virtual groups the first shard of each weighs most, and those are eight apart, too."""

    def one(model: str, used: list[int]) -> TokensRead:
        passage = ReadPassage(
            domain="d", pieces=("x",) * len(used), used=(tuple((expert,) for expert in used),)
        )
        return TokensRead(model=model, experts=64, layers=(0,), passages=(passage,))

    often, seldom = [8 * n for n in range(8)], [1, 2, 3]
    page = build_tokens_page([one("a", often * 3), one("b", often + seldom)], tmp_path / "page.html")
    spans = Spans()
    spans.feed(page.read_text(encoding="utf-8"))
    found = {(title, css) for css, title, _ in spans.spans if title}
    assert len(found) == len(often + seldom)
    assert len({css for title, css in found if title in {f"expert {expert}" for expert in often}}) == 8
    assert "The eight experts used most have a colour of their own." in page.read_text(encoding="utf-8")


def test_blank_lines_are_signs_and_no_empty_screen(tmp_path: Path) -> None:
    pieces = ("a", "\n" * 5, "\n", "b", "\n")
    passage = ReadPassage(domain="d", pieces=pieces, used=(((0,),) * len(pieces),))
    read = TokensRead(model="m", experts=1, layers=(0,), passages=(passage,))
    spans = Spans()
    spans.feed(build_tokens_page([read], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [text for _, title, text in spans.spans if title] == ["a", "\n\n⏎⏎⏎", "⏎", "b", "\n"]


def test_shares_are_of_first_choices() -> None:
    passage = ReadPassage(domain="d", pieces=("a", "b", "c"), used=(((2, 0), (2,), (0, 2)),))
    read = TokensRead(model="m", experts=3, layers=(0,), passages=(passage,))
    assert read.shares(0) == (1 / 3, 0, 2 / 3)


def test_records_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        ReadPassage(domain="d", pieces=("a",), used=((),))
    with pytest.raises(ValueError, match="do not fit"):
        TokensRead(
            model="m", experts=1, layers=(), passages=(ReadPassage(domain="d", pieces=(), used=((),)),)
        )
