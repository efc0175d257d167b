"""``runs --open`` and ``train --open``: a page beside, which no training waits for or fails with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from runs import write_config, write_text

from consilium.checkpoint import store
from consilium.cli import installed, opened
from consilium.cli.main import main
from consilium.data.tokenizer import Tokenizer
from consilium.machine.browser import has_screen
from serving.browser import command
from small import DEEPSEEK, lively

pytestmark = pytest.mark.enable_socket

SECONDS = 30


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return write_config(folder, write_text(folder))


def gone(place: str) -> bool:
    """Whether nobody answers there, before long."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        try:
            httpx.get(place, timeout=5)
        except httpx.HTTPError:
            return True
        time.sleep(0.05)
    return False


def test_runs_are_shown_on_this_machine_alone_until_ctrl_c(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "consilium", "runs", str(tmp_path), "--open"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        place = line.split(": ")[1].split(";")[0]
        assert place.startswith("http://127.0.0.1:")
        about = httpx.get(f"{place}page/about", timeout=SECONDS).json()
        assert about["model"] is None
        assert httpx.get(f"{place}page/runs", timeout=SECONDS).json() == {"folder": str(tmp_path), "runs": []}
        assert httpx.get(place, headers={"Host": "elsewhere.example"}, timeout=SECONDS).status_code == 421
        assert httpx.post(f"{place}v1/completions", json={}, timeout=SECONDS).status_code == 404
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
        assert process.stderr.read() == ""


def test_a_server_shows_the_runs_of_its_working_directory_or_those_of_another(tmp_path: Path) -> None:
    store.save(lively(DEEPSEEK), tmp_path / "model", tokenizer=Tokenizer.of_bytes())
    (tmp_path / "runs" / "own").mkdir(parents=True)
    (tmp_path / "runs" / "own" / "config.yaml").write_text("steps: 1\n")
    (tmp_path / "others").mkdir()
    for options, names in (((), ["own"]), (("--runs", "others"), [])):
        with command("serve", "model", "--port", "0", *options, cwd=tmp_path) as place:
            found = httpx.get(f"{place}/page/runs", timeout=SECONDS).json()["runs"]
        assert [run["name"] for run in found] == names


def test_a_page_is_of_a_folder_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "none"), "--open"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--runs", str(tmp_path / "none")]) == 2


def test_without_the_extra_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    assert main(["runs", str(tmp_path), "--open"]) == 2
    assert "pip install 'consilium-moe[serve]'" in capsys.readouterr().err


def test_a_training_is_shown_while_it_runs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def show(place: str) -> None:
        told.append(place)
        assert httpx.get(f"{place.partition('#')[0]}page/runs", timeout=SECONDS).status_code == 200

    monkeypatch.setattr(opened, "show", show)
    assert main(["train", str(config), "--out", str(tmp_path / "first"), "--open"]) == 0
    (place,) = told
    assert place.endswith("#train/first")
    assert f"page       {place}" in capsys.readouterr().out
    assert gone(place)


@pytest.mark.parametrize("executable", ["/no/such/python", "/bin/false", "/bin/cat"])
def test_a_page_that_cannot_start_is_a_note(
    executable: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(opened.sys, "executable", executable)
    assert main(["train", str(config), "--out", str(tmp_path / "run"), "--open", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["steps"] == 3
    assert output.err.count("no page of this run") == 1


def test_a_page_that_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o700)
    monkeypatch.setattr(opened.sys, "executable", str(silent))
    monkeypatch.setattr(opened, "SECONDS", 0.5)
    told: list[str] = []
    began = time.monotonic()
    with opened.page_of(tmp_path / "run", told.append):
        pass
    assert time.monotonic() - began < 10
    assert told == ["no page of this run: its process told no address"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_page_of_a_training_that_was_killed_ends(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom consilium.cli.opened import page_of\n"
        "tell = lambda text: print(text, file=sys.stderr, flush=True)\n"
        "with page_of(Path(sys.argv[1]), tell): time.sleep(600)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        place = process.stderr.readline().removeprefix("page").strip()
        assert httpx.get(place, timeout=SECONDS).status_code == 200
        process.send_signal(number)
        process.wait(SECONDS)
        assert gone(place)


@pytest.mark.parametrize(
    ("platform", "settings", "expected"),
    [
        ("linux", {}, False),
        ("linux", {"DISPLAY": ":0"}, True),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("linux", {"DISPLAY": ""}, False),
        ("darwin", {}, True),
        ("win32", {}, True),
    ],
)
def test_a_browser_of_text_never_takes_the_terminal(
    platform: str, settings: dict[str, str], expected: bool
) -> None:
    assert has_screen(platform, settings) is expected
