"""Training runs and plans in a real browser, by the page that needs no model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consilium.records.io import write_json
from consilium.records.loads import LoadFile
from consilium.records.metrics import METRICS_FILE, append_step
from consilium.records.run import META_FILE, SUMMARY_FILE
from report.run_folders import Kind, MakeRun, make_run, meta, step_record, summary
from serving.browser import command, opened, picture, unnamed

__all__ = ["make_run"]

pytestmark = pytest.mark.enable_socket

KIND = Kind(steps=200, experts=8, dead=(5,), bias=0.001)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    with command("runs", str(place), "--open", said=r"http://[^;]+/", cwd=place) as found:
        yield found


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with opened(address) as found:
        yield found


class Growing:
    """A run folder of which a step at a time is written, as training does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.step = 0
        write_json(folder / META_FILE, meta(KIND))
        (folder / "config.yaml").write_text("steps: 200\n")
        self.loads = LoadFile.create(folder, layers=(1, 2), experts=KIND.experts)

    def to(self, step: int) -> None:
        while self.step < step:
            self.step += 1
            append_step(self.folder / METRICS_FILE, step_record(self.step, KIND))
            self.loads.append(self.step, [[100 + 7 * e * (e != 5) - 100 * (e == 5) for e in range(8)]] * 2)

    def end(self) -> None:
        write_json(self.folder / SUMMARY_FILE, summary(KIND))


def shows(page: Any, text: str) -> None:
    page.get_by_text(re.compile(text)).first.wait_for()


def test_a_run_is_watched_while_it_grows(page: Any, place: Path, tmp_path: Path) -> None:
    shows(page, "no runs in")
    assert page.get_by_role("tab", name="Chat").is_hidden(), "there is no model to talk to"
    run = Growing(place / "live")
    run.to(50)
    shows(page, "not finished, at step 50")
    assert page.locator("#run-view svg").count() > 6
    before = page.locator("#run-view").inner_html()
    run.to(120)
    shows(page, "not finished, at step 120")
    assert page.locator("#run-view").inner_html() != before
    shows(page, "2 of 16 experts are dead")
    assert unnamed(page) == []
    picture(page, "train", tmp_path)
    run.end()
    shows(page, "finished")
    shows(page, "What it writes")
    shutil.rmtree(run.folder)


def test_two_runs_in_the_same_curves(
    page: Any, address: str, place: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    for name, kind in (("one", Kind(experts=8)), ("two", Kind(experts=8, dead=(1,)))):
        shutil.copytree(make_run(name, kind), place / name)
    page.goto(f"{address}#train/two")
    page.reload()
    page.get_by_label("beside").select_option("one")
    page.locator("#run-view .card", has_text="training loss").get_by_text("one").first.wait_for()
    assert page.get_by_label("Run", exact=True).input_value() == "two"
    assert page.locator("#run-view h3", has_text=re.compile("^(one|two)$")).count() >= 2
    picture(page, "two-runs", tmp_path)
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("one", "two"):
        shutil.rmtree(place / name)


def test_a_damaged_run_is_told_and_the_next_one_shown(address: str, place: Path, make_run: MakeRun) -> None:
    shutil.copytree(make_run("good", Kind()), place / "good")
    shutil.copytree(make_run("bad", Kind()), place / "bad")
    (place / "bad" / SUMMARY_FILE).write_text("{")
    with opened(f"{address}#train/bad", refused=400) as page:
        shows(page, "summary.json.*damaged")
        assert page.locator("#run-view svg").count() == 0
        page.get_by_label("Run", exact=True).select_option("good")
        page.locator("#run-view svg").first.wait_for()
        assert "damaged" not in page.locator("#run-status").inner_text()
    for name in ("good", "bad"):
        shutil.rmtree(place / name)


def test_a_plan_follows_its_sliders(page: Any, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Plan").click()
    page.get_by_label("Model").fill("mixtral:8x7b")
    shows(page, "46,702,792,704")
    shows(page, "All 8 experts of each layer have to be in memory")
    page.get_by_role("slider", name="Experts", exact=True).focus()
    page.keyboard.press("ArrowRight")
    shows(page, "All 16 experts of each layer")
    page.get_by_label("Context").focus()
    page.keyboard.press("Home")
    shows(page, "serving 1 x 128 tokens")
    page.get_by_label("Processes").focus()
    page.keyboard.press("ArrowRight")
    shows(page, "sent between 2 processes")
    page.get_by_label("Weights").select_option("int4")
    shows(page, "weights, int4")
    page.get_by_label("Model").fill("deepseek-v3")
    shows(page, "671,026,404,352")
    assert page.locator("#experts-name").inner_text() == "256", "sliders begin at the model's own numbers"
    assert unnamed(page) == []
    picture(page, "plan", tmp_path)
