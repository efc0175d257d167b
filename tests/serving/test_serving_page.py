"""The page, in a real browser: a conversation, its tokens, and which experts computed them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consilium.checkpoint import store
from consilium.data.tokenizer import Tokenizer
from consilium.serving.gate import PAGE
from serving.served import Server, serving
from small import DEEPSEEK, lively

BROWSER = shutil.which("chromium")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


def test_its_files_are_served_with_what_keeps_others_out(server: Server) -> None:
    with server.http() as client:
        for path, (_, kind) in PAGE.items():
            answer = client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_it_asks_no_other_server(server: Server) -> None:
    with server.http() as client:
        text = "".join(client.get(path).text for path in PAGE)
    assert not re.search(
        r"(https?:)?//[a-z]", re.sub(r"^//.*$|http://www.w3.org/2000/svg", "", text, flags=re.MULTILINE)
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page") / "small"
    store.save(lively(DEEPSEEK), folder, tokenizer=Tokenizer.of_bytes())
    command = [sys.executable, "-m", "consilium", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = (re.search(r"http://\S+(?=/v1)", line) for line in process.stderr)
        yield next(found[0] for found in told if found)
        process.terminate()


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("there is no chromium")
    faults: list[str] = []
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        found = browser.new_page()
        found.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        found.on("pageerror", lambda error: faults.append(str(error)))
        found.goto(address)
        yield found
        browser.close()
    assert faults == []


pytestmark = pytest.mark.enable_socket


def test_a_conversation_shows_its_experts(page: Any, tmp_path: Path) -> None:
    page.get_by_label("Message").fill("What is a list?")
    page.get_by_label("New tokens").fill("30")
    page.get_by_role("button", name="Send").click()
    page.get_by_text(re.compile("tokens in")).wait_for()
    chips = page.locator(".chip")
    assert chips.count() > 3
    chips.first.focus()
    page.keyboard.press("Enter")
    rows = page.locator("#token table").last.locator("tr")
    assert rows.count() == 3, "a head and two layers with experts"
    assert re.search(r"\d+ \(\d\.\d\d\)", rows.nth(1).inner_text())
    assert "2 layers, 8 experts" in page.locator("#heat-note").inner_text()
    before = chips.first.evaluate("chip => chip.style.background")
    page.get_by_label("Colour").select_option("confidence")
    assert chips.first.evaluate("chip => chip.style.background") != before
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    assert '"experts"' in Path(download.value.path()).read_text()
    folder = Path(os.environ.get("CONSILIUM_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / "chat.png", full_page=True)
    page.get_by_role("button", name="Clear").click()
    assert chips.count() == 0


def test_it_fits_a_telephone_and_every_field_has_a_name(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')].filter("
        "field => !(field.labels?.length || field.textContent.trim() || field.ariaLabel)).length"
    )
    assert unnamed == 0
