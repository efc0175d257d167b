"""Shares of sources and domains: what a weight means, exactly, and which weights are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from data_corpora import corpus_of, documents
from hypothesis import given
from hypothesis import strategies as st

from consilium.config.data import BuiltIn, Data, Dynamic, Preset, Source, TextPath, read_source, spelled
from consilium.data.corpus import build_corpus
from consilium.data.loader import Loader
from consilium.data.mixture import LLAMA, SHEARED, domain_shares, next_shares, start_shares
from consilium.data.schedule import PERIOD
from consilium.errors import ConsiliumError

A, B, C = (TextPath(path=name) for name in "abc")


def path(name: str, weight: float | None = None, **weights: float) -> TextPath:
    return TextPath(path=name, weight=weight, weights=weights)


def shares(*sources: Source, sizes: dict[str, int], owners: dict[str, list[int]]) -> dict[str, float]:
    return domain_shares(Data(sources=sources, temperature=1), sizes, owners)


sizes = st.dictionaries(st.sampled_from("uvwxyz"), st.integers(1, 10**9), min_size=1)


@given(sizes=sizes, temperature=st.floats(0, 1))
def test_without_weights_shares_follow_size_to_the_temperature(
    sizes: dict[str, int], temperature: float
) -> None:
    found = domain_shares(Data(sources=(A, B), temperature=temperature), sizes, {})
    whole = sum(size**temperature for size in sizes.values())
    assert found == pytest.approx({domain: size**temperature / whole for domain, size in sizes.items()})


@given(sizes=sizes, weight=st.floats(0.01, 0.99), places=st.data())
def test_a_weight_is_the_share_of_its_source_whatever_its_size(
    sizes: dict[str, int], weight: float, places: st.DataObject
) -> None:
    owners = {domain: [places.draw(st.sampled_from([0, 1]))] for domain in sizes}
    owners[min(sizes)] = [0]
    owners["other"] = [1]
    found = shares(path("a", weight), B, sizes=sizes | {"other": 5}, owners=owners)
    assert sum(found.values()) == pytest.approx(1)
    assert sum(share for domain, share in found.items() if owners[domain] == [0]) == pytest.approx(weight)
    for of in (0, 1):
        ratio = {d: share / (sizes | {"other": 5})[d] for d, share in found.items() if owners[d] == [of]}
        assert max(ratio.values()) == pytest.approx(min(ratio.values()))


def test_weights_are_relative_where_every_source_has_one() -> None:
    found = shares(path("a", 3), path("b", 1), sizes={"x": 1, "y": 999}, owners={"x": [0], "y": [1]})
    assert found == {"x": 0.75, "y": 0.25}


def test_a_source_without_a_weight_shares_what_is_left_by_size() -> None:
    owners = {"x": [0], "y": [1], "z": [2]}
    found = shares(path("a", 0.4), B, C, sizes={"x": 1, "y": 10, "z": 20}, owners=owners)
    assert found == pytest.approx({"x": 0.4, "y": 0.2, "z": 0.4})


def test_weights_of_domains_are_shares_of_their_source() -> None:
    owners = {"x": [0], "y": [0], "z": [0], "o": [1]}
    sizes = {"x": 1, "y": 10, "z": 30, "o": 100}
    found = shares(path("a", 0.5, x=0.6), B, sizes=sizes, owners=owners)
    assert found == pytest.approx({"x": 0.3, "y": 0.05, "z": 0.15, "o": 0.5})


def test_weights_of_domains_alone_leave_the_share_of_their_source_to_its_size() -> None:
    owners = {"x": [0], "y": [0], "o": [1]}
    found = shares(path("a", x=1, y=3), B, sizes={"x": 10, "y": 10, "o": 20}, owners=owners)
    assert found == pytest.approx({"x": 0.125, "y": 0.375, "o": 0.5})


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((path("a", 0.5, cod=1), B), r"a:0.5 has no domain 'cod' that fills a sequence\. Did you mean"),
        ((path("a", 1.0), B), r"weights of the sources sum to 1, which leaves nothing"),
        ((path("a", 0.5, code=1.5), B), r"weights of the domains of a:0.5 sum to 1\.5, which leaves nothing"),
        ((A, path("b", 0.5)), r"a and b:0.5 both have text of domain 'both', and one of them has a weight"),
        ((A, B, path("c", 0.5)), r"c:0.5 has a weight, and none of its domains fills a sequence"),
    ],
)
def test_weights_that_do_not_fit_are_refused(sources: tuple[Source, ...], message: str) -> None:
    owners = {"code": [0], "prose": [0], "both": [0, 1] if sources[0] == A and len(sources) == 2 else [1]}
    with pytest.raises(ConsiliumError, match=message):
        shares(*sources, sizes={"code": 5, "prose": 5, "both": 5}, owners=owners)


def test_rows_come_out_in_the_shares_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    for name, size in (("one", 5), ("two", 200)):
        (tmp_path / f"{name}.txt").write_text(f"{name} says so.\n" * 20 * size)
    sources = tuple(read_source(f"{name}={tmp_path / name}.txt:{w}") for name, w in (("one", 3), ("two", 1)))
    data = Data(sources=sources, sequence_length=16)
    loader = Loader(build_corpus(data, 300), data, batch=8, seed=0)
    rows = [domain for step in range(PERIOD // 8) for domain in loader.row_domains(step)]
    assert rows.count("one") == PERIOD * 3 // 4
    assert loader.shares == {"one": 0.75, "two": 0.25}


names = st.lists(st.sampled_from("uvwxyz"), min_size=1, unique=True)
losses = st.floats(0, 12)


@given(names=names, rate=st.floats(1e-3, 3), floor=st.sampled_from([0.0, 1e-4, 0.1]), data=st.data())
def test_shares_follow_losses_as_the_equation_says(
    names: list[str], rate: float, floor: float, data: st.DataObject
) -> None:
    raw = {name: data.draw(st.floats(1e-3, 1)) for name in names}
    shares = {name: value / sum(raw.values()) for name, value in raw.items()}
    loss, reference = ({name: data.draw(losses) for name in names} for _ in range(2))
    found = next_shares(Dynamic(rate=rate, floor=floor), shares, loss, reference)
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= floor * (1 - 1e-12)
    powers = {n: shares[n] * math.exp(rate * (loss[n] - reference[n])) for n in names}
    for name in names:
        free = powers[name] / sum(powers.values())
        assert found[name] == pytest.approx(floor + (1 - floor * len(names)) * free, rel=1e-9, abs=1e-300)


def test_presets_are_the_published_shares_of_the_domains_that_are_there() -> None:
    sizes = dict.fromkeys(LLAMA, 5)
    for name, weights in (("llama", LLAMA), ("sheared", SHEARED)):
        assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
        found = start_shares(Data(mixture=Preset(name=name)), sizes, {})
        assert found == pytest.approx(dict(weights))
    two = start_shares(Data(mixture=Dynamic(start="llama")), {"cc": 1, "c4": 9}, {})
    assert two == pytest.approx({"cc": 0.67 / 0.82, "c4": 0.15 / 0.82})
    assert start_shares(Data(mixture=Dynamic()), {"a": 1, "b": 9}, {}) == {"a": 0.5, "b": 0.5}
    weighted = Data(sources=(path("p", a=1, b=3),), mixture=Dynamic(start="given"))
    assert start_shares(weighted, {"a": 1, "b": 1}, {}) == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(mixture=Preset()), r"no domain 'gitub'.*Did you mean 'github'"),
        (Data(sources=(path("p", 0.5),), mixture=Preset()), r"sets all shares, and p:0.5 has a weight"),
        (Data(sources=(path("p", gitub=1),), mixture=Dynamic()), r"sets all shares"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(data: Data, message: str) -> None:
    with pytest.raises(ConsiliumError, match=message):
        start_shares(data, {"gitub": 1}, {})
    with pytest.raises(ConsiliumError, match="lower the floor"):
        next_shares(Dynamic(floor=0.6), {"a": 0.5, "b": 0.5}, {"a": 1, "b": 1}, {"a": 1, "b": 1})
    with pytest.raises(ConsiliumError, match="domain 'b' has no held-out text that is learned"):
        next_shares(Dynamic(), {"a": 0.5, "b": 0.5}, {"a": 1}, {"a": 1, "b": 1})


def test_a_corpus_without_owners_takes_every_weight_of_one_source() -> None:
    corpus = corpus_of([*documents([40], "code"), *documents([40], "prose")])
    data = Data(sources=(BuiltIn(weights={"code": 1, "prose": 3}),), sequence_length=8)
    assert Loader(corpus, data, batch=4, seed=0).shares == {"code": 0.25, "prose": 0.75}


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("notes.txt", TextPath(path="notes.txt")),
        ("notes.txt:0.25", TextPath(path="notes.txt", weight=0.25)),
        ("code=src:3", TextPath(path="src", domain="code", weight=3)),
        ("two words=a/b", TextPath(path="a/b", domain="two words")),
        ("a/b=c", TextPath(path="a/b=c")),
        ("builtin", BuiltIn()),
        ("builtin:.5", BuiltIn(weight=0.5)),
        ("./builtin", TextPath(path="./builtin")),
        (r"C:\texts", TextPath(path=r"C:\texts")),
    ],
)
def test_a_source_is_read_as_it_is_spelled(text: str, source: Source) -> None:
    assert read_source(text) == source
    assert read_source(spelled(source)) == source


def test_what_exists_under_the_whole_text_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a=b:0.5", "code"):
        Path(name).touch()
    assert read_source("a=b:0.5") == TextPath(path="a=b:0.5")
    with pytest.raises(ConsiliumError, match=r"--data code:70%: '70%' is no weight; write \[NAME=\]PATH"):
        read_source("code:70%")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.txt:0", "a weight is above 0"),
        ("builtin:half", "'half' is no weight"),
        ("code=builtin", "has domains of its own; drop code="),
    ],
)
def test_a_source_that_is_spelled_wrong_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConsiliumError, match=message):
        read_source(text)
