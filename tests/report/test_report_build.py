from __future__ import annotations

import dataclasses
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from run_folders import DOMAINS, Kind, MakeRun, association, specialisation

from consilium.cli.main import verb_parser
from consilium.config.io import to_yaml
from consilium.config.training import Training
from consilium.errors import ConsiliumError
from consilium.recipes.catalogue import recipe
from consilium.records.io import read_json, write_json
from consilium.records.metrics import METRICS_FILE, read_metrics, to_line
from consilium.records.run import SUMMARY_FILE, Summary
from consilium.records.specialisation import LayerSpecialisation, Specialisation
from consilium.report.build import build_report, spaced
from consilium.report.source import newest_checkpoint, read_run
from consilium.report.tables import commands, specialists
from consilium.report.words import balance
from consilium.report.words import specialisation as sentence


class Page(HTMLParser):
    """Collects what a page loads, its text, and whether its tags close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data"}]
        if tag not in {"meta", "link", "br"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"meta", "link", "br"}:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: Path, beside: Path | None = None) -> tuple[str, Page]:
    html = build_report(run, beside).read_text(encoding="utf-8")
    return html, Page(html)


def test_the_page_loads_nothing(make_run: MakeRun) -> None:
    html, page = page_of(make_run("demo", Kind()))
    assert page.sources
    assert all(source.startswith("data:") for source in page.sources)
    assert "script" not in page.tags
    assert "@import" not in html
    assert "url(" not in html
    assert set(re.findall(r"https?://[^\"'< ]*", html)) == {"http://www.w3.org/2000/svg"}


def test_every_picture_is_valid_xml(make_run: MakeRun) -> None:
    html, _ = page_of(make_run("demo", Kind()))
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    # Bits, loss, bars, two strips, balance, entropy, two layers by domain and syntax, two
    # colour bars, the run.
    assert len(pictures) == 16
    for picture in pictures:
        ET.fromstring(picture)


def test_the_page_says_what_was_measured(make_run: MakeRun) -> None:
    _, page = page_of(make_run("demo", Kind()))
    for said in (
        "deepseek-v3:tiny",
        "8.12M, 2.31M active a token",
        "builtin, SHA-256 ab12ab12ab12",
        "a CPU, 2 threads, 16 GiB",
        "6.000 before training, so 33% of it",
        "this run is below it",
        "No expert is dead",
        "On this run experts follow syntax more than domain",
        "return x < 3 & 今天",
        "steps: 20",
    ):
        assert said in page.text, said
    assert "has not ended" not in page.text


def test_the_selection_bias_is_drawn_where_it_is_recorded(make_run: MakeRun) -> None:
    assert "Selection bias" not in page_of(make_run("none", Kind()))[1].text
    _, page = page_of(make_run("biased", Kind(bias=0.001)))
    assert "Selection bias" in page.text
    assert "highest less lowest, worst layer" in page.text


def test_text_from_outside_stays_text(make_run: MakeRun) -> None:
    evil = '</pre><script>alert("x")</script>&amp;'
    html, page = page_of(make_run("demo", Kind(prompt=evil, model=evil)))
    assert "script" not in page.tags
    assert evil in page.text
    assert evil not in html


def test_a_page_of_a_long_run_is_small(make_run: MakeRun) -> None:
    path = build_report(make_run("long", Kind(steps=2000, layers=4, experts=32)))
    assert path.stat().st_size < 1_500_000


def test_a_page_of_many_layers_and_experts_is_small(make_run: MakeRun) -> None:
    html, page = page_of(make_run("wide", Kind(steps=120, layers=40, experts=128)))
    assert len(html) < 3_000_000
    assert "24 layers between the ones drawn are left out" in page.text


def test_two_runs_stand_beside_each_other(make_run: MakeRun) -> None:
    demo, off = make_run("demo", Kind()), make_run("balance-off", Kind(dead=(1,)))
    _, page = page_of(demo, off)
    assert "demo: Over the last 20 recorded steps" in page.text
    assert "balance-off: Over the last 20 recorded steps" in page.text
    assert "2 of 8 experts are dead" in page.text
    assert page.text.count("layer 1: domain") == 2


def test_a_dense_run_beside_needs_no_routing(make_run: MakeRun) -> None:
    html, page = page_of(make_run("moe", Kind()), make_run("dense", Kind(layers=0)))
    assert "moe: Over the last" in page.text
    assert "dense: Over the last" not in page.text
    _, page = page_of(make_run("alone", Kind(layers=0)))
    assert "Who does the work" not in page.text
    assert "Who knows what" not in page.text
    assert html.count("<svg") > 10


def test_a_dense_run_can_have_a_routed_one_beside(make_run: MakeRun) -> None:
    _, page = page_of(make_run("dense", Kind(layers=0)), make_run("moe", Kind()))
    assert "moe: On this run experts follow" in page.text
    assert "Mutual information" not in page.text


def test_a_running_and_torn_run_has_a_page(make_run: MakeRun) -> None:
    run = make_run("demo", Kind(ended=False))
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 21, "tok')
    _, page = page_of(run)
    assert "has not ended: the page shows its records up to step 20" in page.text
    assert "demo/metrics.jsonl was cut short" in page.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text("")
    _, page = page_of(tmp_path)
    assert "no data yet" in page.text


def test_the_old_page_stays_when_a_record_is_damaged(make_run: MakeRun) -> None:
    run = make_run("demo", Kind())
    before = build_report(run).read_bytes()
    (run / "summary.json").write_text("{")
    with pytest.raises(ConsiliumError, match=r"summary\.json: content"):
        build_report(run)
    assert (run / "report.html").read_bytes() == before


def configured(run: Path, model: str) -> Path:
    found = Training(name=model, model=recipe(model), steps=20)
    (run / "config.yaml").write_text(to_yaml(found))
    return run


def suggested(run: Path) -> list[list[str]]:
    """The commands of the page, as a shell splits them; each is one that the command takes."""
    words = [shlex.split(command) for command, _ in commands(read_run(run))]
    for program, verb, *rest in words:
        assert program == "consilium"
        options = verb_parser(verb).read(rest)
        assert Path(options.out if verb == "train" else options.folder) == run
    return [[verb, *rest] for _, verb, *rest in words]


def test_a_finished_run_is_not_continued(make_run: MakeRun) -> None:
    run = configured(make_run("it's a demo", Kind()), "deepseek-v3:tiny")
    assert [verb for verb, *_ in suggested(run)] == ["generate", "chat", "eval"]


def test_a_run_that_has_not_ended_is_continued_and_no_more_than_it_can(make_run: MakeRun) -> None:
    run = configured(make_run("a run", Kind(ended=False)), "deepseek-v3:tiny")
    assert suggested(run) == [["train", f"{run}/config.yaml", "--out", str(run), "--resume"]]
    (run / "checkpoints/step-9").mkdir(parents=True)
    assert [verb for verb, *_ in suggested(run)] == ["generate", "chat", "eval", "train"]


@pytest.mark.parametrize("model", ["expert-choice:tiny", None])
def test_what_the_engine_refuses_is_not_suggested(model: str | None, make_run: MakeRun) -> None:
    """A configuration that this version cannot read is of a model that it cannot load."""
    run = make_run("run", Kind())
    assert suggested(run if model is None else configured(run, model)) == [["eval", str(run)]]


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="is not a folder"):
        build_report(tmp_path / "missing")
    with pytest.raises(ConsiliumError, match=r"has no metrics\.jsonl"):
        build_report(tmp_path)


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(make_run: MakeRun) -> None:
    run = make_run("demo", Kind(steps=100))
    (run / "checkpoints" / "step-200.tmp").mkdir()
    assert newest_checkpoint(run) == run / "checkpoints" / "step-100"
    assert read_run(run).name == "demo"


@pytest.mark.parametrize(
    ("domain", "syntax", "said"),
    [
        (0.1, 0.3, "follow syntax more than domain"),
        (0.3, 0.1, "follow domain more than syntax"),
        (0.2, 0.2, "Domain and syntax say the same amount"),
        (0.0, 0.0, "Neither says anything"),
        (-0.1, -0.2, "Neither says anything"),
    ],
)
def test_the_larger_labelling_is_computed(domain: float, syntax: float, said: str) -> None:
    assert said in sentence(specialisation(Kind(), domain=domain, syntax=syntax))


def test_labels_that_never_occur_are_not_compared() -> None:
    silent = association(4, 3, 0.0)
    zeros = tuple(tuple(0 for _ in row) for row in silent.counts_EL)
    layer = LayerSpecialisation(
        layer=1,
        domain=association(4, 2, 0.2),
        syntax=type(silent)(counts_EL=zeros, bits=0.0, shuffled_bits=0.0, shuffles=8),
    )
    record = Specialisation(domains=DOMAINS, syntaxes=("a", "b", "c"), tokens=1, layers=(layer,))
    assert "no two labels of a kind for: syntactic class" in sentence(record)
    assert specialists(record, "syntax") == []


def test_specialists_carry_the_most_information() -> None:
    first = specialists(specialisation(Kind(layers=1, experts=4)), "domain")[0]
    assert (first.layer, first.share) == (1, 0.8)
    assert first.usual == pytest.approx(0.5)
    assert first.label == DOMAINS[first.expert % 2]


def test_collapse_is_said_with_its_number(make_run: MakeRun) -> None:
    run = read_run(make_run("off", Kind(dead=(0, 1, 2))))
    assert run.loads is not None
    assert "carried 4.00 times its fair share, above the limit of 1.5" in balance(run, run.loads)
    assert "6 of 8 experts are dead" in balance(run, run.loads)


def with_records(run: Path, **fields: object) -> Path:
    """``run``, whose steps also measured ``fields``."""
    metrics = read_metrics(run / METRICS_FILE).records
    lines = [to_line(dataclasses.replace(record, **fields)) for record in metrics]  # pyright: ignore[reportArgumentType]
    (run / METRICS_FILE).write_text("".join(line + "\n" for line in lines))
    return run


def test_everything_that_is_recorded_is_drawn(make_run: MakeRun) -> None:
    fields = {"lr": 3e-3, "grad_norm": 1.5, "dropped_frac": 0.125, "losses": {"switch": 0.01, "z": 0.002}}
    html, _ = page_of(with_records(make_run("all", Kind()), **fields))
    for title in ("Learning rate", "Gradient norm", "Dropped tokens", "Losses beside"):
        assert f"<h3>{title}" in html
    assert "dropped tokens, step 19: 12.5 percent of the copies wanted" in html
    assert ">switch</text>" in html
    assert "<h3>Dropped tokens" not in page_of(make_run("none", Kind()))[0]


def test_a_layer_behind_the_last_block_is_a_prediction_module(make_run: MakeRun) -> None:
    run = make_run("mtp", Kind(layers=2))
    (run / "config.yaml").write_text("model:\n  family: deepseek-v3\n  layers: 2\n  moe:\n    experts: 4\n")
    html, _ = page_of(run)
    assert "prediction module 1" in html
    assert "layer 2" not in re.sub(r"<title>.*?</title>", "", html)
    (run / "config.yaml").write_text("model: [torn")
    assert "layer 2" in page_of(run)[0]


def test_empty_lines_of_a_sample_are_counted_and_a_rival_is_no_success(make_run: MakeRun) -> None:
    run = make_run("blank", Kind())
    summary = read_json(Summary, run / SUMMARY_FILE)
    assert summary.sample is not None
    blank = dataclasses.replace(summary.sample, text="a" + "\n" * 81 + "b\n\nc")
    write_json(run / SUMMARY_FILE, dataclasses.replace(summary, sample=blank))
    html, _ = page_of(run)
    assert "a\n… 80 empty lines …\nb\n\nc" in html
    assert not re.search(r'class="tile (good|bad)"><div class="label">(byte trigram|dense)', html)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 60, 1000])
def test_drawn_layers_are_spread_over_all(count: int) -> None:
    rows = spaced(count, 16)
    assert len(rows) == len(set(rows)) == min(count, 16)
    assert rows == sorted(rows)
    assert count == 0 or (rows[0], rows[-1]) == (0, count - 1)
