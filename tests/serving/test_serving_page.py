"""The page, in a real browser: a conversation, its tokens, and which experts computed them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consilium.checkpoint import store
from consilium.data.tokenizer import Tokenizer
from consilium.serving.gate import PAGE
from serving.browser import command, opened, picture, unnamed
from serving.served import Server, serving
from small import DEEPSEEK, lively

MANY = 10_000
SMOOTH_SECONDS = 4.0
"""In which a browser on a shared core adds MANY chips, paints them anew, scrolls and opens one."""


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
            assert "unsafe" not in answer.headers["content-security-policy"]


def test_it_asks_no_other_server(server: Server) -> None:
    with server.http() as client:
        text = "".join(client.get(path).text for path in PAGE)
    assert not re.search(
        r"(https?:)?//[a-z]", re.sub(r"^//.*$|http://www.w3.org/2000/svg", "", text, flags=re.MULTILINE)
    )


def test_every_script_that_is_imported_is_served(server: Server) -> None:
    with server.http() as client:
        for path in (path for path in PAGE if path.endswith(".js")):
            text = client.get(path).text
            assert all(f"/{name}" in PAGE for name in re.findall(r'(?:from|import) "\./([^"]+)"', text))
            assert text.count("\n") < 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("page") / "small"
    store.save(lively(DEEPSEEK), made, tokenizer=Tokenizer.of_bytes())
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with command("serve", str(folder), "--port", "0", cwd=folder.parent) as found:
        yield found


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with opened(address) as found:
        yield found


pytestmark = pytest.mark.enable_socket


def ask(page: Any, text: str = "What is a list?", tokens: int = 30) -> Any:
    page.get_by_label("Message").fill(text)
    page.get_by_label("New tokens").fill(str(tokens))
    page.get_by_role("button", name="Send").click()
    page.get_by_text(re.compile("tokens in")).wait_for()
    return page.locator("#talk div.turn .chip")


def test_a_conversation_shows_its_experts(page: Any, tmp_path: Path) -> None:
    chips = ask(page)
    assert chips.count() > 3
    chips.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert chips.nth(1).get_attribute("aria-pressed") == "true"
    rows = page.locator("#token table").last.locator("tr")
    assert rows.count() == 3, "a head and two layers with experts"
    assert re.search(r"\d+ \(\d\.\d\d\)", rows.nth(1).inner_text())
    runner, margin = rows.nth(1).locator("td").all_inner_texts()[2:]
    assert 0 <= int(runner) < 8
    assert -1 < float(margin) < 2
    assert page.locator("#token table").first.locator("tr").count() == 6, "five tokens that might have come"
    assert "2 layers, 8 experts" in page.locator("#heat").inner_text()
    before = chips.first.evaluate("chip => chip.style.background")
    page.get_by_label("Colour").select_option("confidence")
    assert chips.first.evaluate("chip => chip.style.background") != before
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    assert '"experts"' in Path(download.value.path()).read_text()
    picture(page, "chat", tmp_path)
    page.get_by_role("button", name="Clear").click()
    assert chips.count() == 0


def test_tokens_of_the_prompt_are_shown_as_the_model_read_them(page: Any) -> None:
    ask(page, "Why 今?")
    page.get_by_text("the prompt as the model reads it").click()
    chips = page.locator("#talk details .chip")
    texts = "".join(chips.all_text_contents())
    assert "Q: Why " in texts
    assert "今" in texts, "its last byte brings the character"
    chips.nth(2).click()
    assert "of the prompt" in page.locator("#token").inner_text()
    page.get_by_text("likeliest here").wait_for()
    assert "probability" in page.locator("#token p").first.inner_text()
    assert page.locator("#token table").first.locator("tr").count() == 6, "five that might have come instead"
    assert page.locator("#token table").last.locator("tr").count() == 3


def test_the_map_of_loads_can_be_read_without_seeing_it(page: Any) -> None:
    ask(page)
    page.locator("#heat .heat-map").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    told = page.locator("#heat output").inner_text()
    assert re.fullmatch(r"layer 2, expert 1: \d+\.\d\d of a fair share", told)
    page.get_by_text("As a table").first.click()
    cells = page.locator("#heat table tr").nth(2).locator("td").all_inner_texts()
    assert cells[0] == "2"
    assert told.endswith(f"{cells[2]} of a fair share")
    assert sum(map(float, cells[1:])) == pytest.approx(8, abs=0.1)


def test_a_muted_expert_is_not_used_again(page: Any, tmp_path: Path) -> None:
    chips = ask(page)
    count = chips.count()
    chips.nth(3).click()
    button = page.locator("#token table").last.get_by_role("button").first
    name = button.get_attribute("aria-label")
    expert, layer = re.findall(r"\d+", name)
    button.click()
    assert page.get_by_role("button", name=f"use expert {expert} of layer {layer} again").is_visible()
    page.get_by_role("button", name="Generate again").click()
    page.get_by_text(re.compile("as before|than before")).wait_for()
    assert f"without {layer}/{expert}" in page.locator("#talk").inner_text()
    chips.nth(count + 3).click()
    assert name not in [
        found.get_attribute("aria-label")
        for found in page.locator("#token table").last.get_by_role("button").all()
    ]
    picture(page, "muted", tmp_path)
    page.get_by_role("button", name=f"use expert {expert} of layer {layer} again").click()
    assert page.locator("#muted").is_hidden()


def test_fewer_experts_a_token_and_what_cannot_be(page: Any) -> None:
    page.get_by_label("Experts a token").first.fill("1")
    chips = ask(page)
    chips.first.click()
    assert page.locator("#token table").last.get_by_role("button").count() == 2, "one in each layer"


def test_domains_are_measured_and_colour_tokens(page: Any) -> None:
    chips = ask(page)
    page.get_by_role("button", name="Measure domains").click()
    page.get_by_text("measured", exact=True).wait_for()
    assert page.locator("#legend").inner_text().split() == ["prose", "code", "mathematics", "dialogue"]
    legend = set(page.locator("#legend span").evaluate_all("all => all.map(one => one.style.background)"))
    found = set(chips.evaluate_all("all => all.map(one => one.style.background)")) - {""}
    assert found
    assert found <= legend
    chips.first.click()
    assert "nearest to" in page.locator("#token").inner_text()


def test_two_prompts_beside_each_other(page: Any, tmp_path: Path) -> None:
    page.get_by_text("Compare two prompts").click()
    page.get_by_label("Prompt A").fill("def f(x): return")
    page.get_by_label("Prompt B").fill("It rained all day.")
    page.get_by_label("New tokens").fill("10")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text("compared", exact=True).wait_for()
    assert "def f(x)" in page.locator("#answer-a").inner_text()
    page.locator("#answer-b .chip").first.click()
    assert "of the prompt" in page.locator("#token").inner_text()
    page.locator("#heat-difference .heat-map").focus()
    first = page.locator("#heat-difference output").inner_text()
    values = [page.locator(f"#heat-{side} .heat-map").focus() or _share(page, side) for side in "ab"]
    told = re.search(r"[+-]\d+\.\d+", first)
    assert told is not None
    assert float(told[0]) == pytest.approx(values[0] - values[1], abs=0.011)
    picture(page, "compare", tmp_path)


def _share(page: Any, side: str) -> float:
    told = re.search(r"\d+\.\d\d", page.locator(f"#heat-{side} output").inner_text())
    assert told is not None
    return float(told[0])


def test_it_fits_a_telephone_and_everything_has_a_name(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    ask(page).first.click()
    page.get_by_text("Compare two prompts").click()
    for name in ("Chat", "Train", "Plan"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
        assert unnamed(page) == [], name
        picture(page, f"phone-{name.lower()}", tmp_path)


def test_tabs_are_walked_with_the_arrow_keys(page: Any) -> None:
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tabpanel", name="Train").is_visible()
    assert page.locator("#chat").is_hidden()
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("tabpanel", name="Chat").is_visible()


def test_a_key_is_asked_for_and_opens_the_page(folder: Path) -> None:
    words = ("serve", str(folder), "--port", "0", "--api-key", "secret")
    with command(*words, cwd=folder.parent) as address, opened(address, refused=401) as page:
        page.get_by_text("this server needs a key").wait_for()
        assert page.locator("#main").is_hidden()
        page.get_by_label("Key", exact=True).fill("secret")
        page.keyboard.press("Enter")
        assert ask(page, tokens=4).count() == 4
        assert page.get_by_label("Key", exact=True).is_hidden()
        page.get_by_role("tab", name="Plan").click()
        page.get_by_text("671,026,404,352").wait_for()


def test_which_of_several_workers_answers_makes_no_difference(folder: Path) -> None:
    words = ("serve", str(folder), "--port", "0", "--workers", "2")
    with command(*words, cwd=folder.parent) as address:
        said = set()
        for _ in range(4):
            with opened(address) as page:
                page.get_by_label("Temperature").fill("0")
                chips = ask(page)
                count = chips.count()
                said.add("".join(chips.all_text_contents()))
                chips.nth(3).click()
                page.locator("#token table").last.get_by_role("button").first.click()
                page.get_by_role("button", name="Generate again").click()
                page.get_by_text(re.compile("as before|than before")).wait_for()
                assert chips.count() > count
        assert len(said) == 1


def test_a_dark_page_is_dark(address: str, tmp_path: Path) -> None:
    with opened(address, color_scheme="dark") as page:
        ask(page)
        picture(page, "dark", tmp_path)
        ground, ink = page.evaluate(
            "(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))"
        )
        assert max(map(int, re.findall(r"\d+", ground))) < 60
        assert min(map(int, re.findall(r"\d+", ink))) > 180


@pytest.mark.parametrize("line", [12, MANY], ids=["lines", "one line"])
def test_many_chips_stay_smooth(page: Any, line: int) -> None:
    seconds = page.evaluate(
        """async ([many, line]) => {
          const { Strip, repaint } = await import("/chips.js");
          const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
          const box = document.getElementById("talk");
          const strip = new Strip(box);
          await frame();
          const began = performance.now();
          for (let i = 0; i < many; i += 1) {
            const text = i % line === line - 1 ? "\\n" : ` word${i}`;
            const routed = { experts: [[i % 8, 3]], weights: [[0.6, 0.4]] };
            strip.add([{ text, logprob: -0.1, top: [], prompt: true, ...routed }]);
            if (i % 500 === 499) await frame();
          }
          await frame();
          repaint();
          await frame();
          box.scrollTop = box.scrollHeight;
          await frame();
          box.querySelectorAll(".chip")[many - 2].click();
          await frame();
          return (performance.now() - began) / 1000;
        }""",
        [MANY, line],
    )
    assert page.locator(".chip").count() == MANY
    assert page.locator(".chip[aria-pressed]").count() == 1
    print(f"{MANY:,} chips: {seconds:.2f} s")
    assert seconds < SMOOTH_SECONDS
