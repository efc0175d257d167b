"""Documents are tested: their commands parse, their links lead somewhere, their numbers come from records."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from consilium.cli.arguments import Parser
from consilium.cli.main import VERBS
from house.tree import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(page: Path) -> list[str]:
    """Every ``consilium`` command in the page's shell blocks."""
    blocks = [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "sh"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [line.partition(" #")[0].strip() for line in lines]
    return [
        line.replace("python -m consilium", "consilium")
        for line in found
        if line.startswith(("consilium ", "python -m consilium "))
    ]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_in_the_documents_parses(page: Path) -> None:
    for command in commands(page):
        _, verb, *words = shlex.split(command)
        if verb.startswith("--"):
            assert verb in {"--help", "--version", "--completion"}, command
            continue
        assert verb in VERBS, command
        parser = Parser(prog=f"consilium {verb}", description="", example="")
        importlib.import_module(f"consilium.cli.{verb}").arguments(parser)
        parser.read(words)


def test_the_readme_shows_every_verb() -> None:
    shown = {shlex.split(command)[1] for command in commands(ROOT / "README.md")}
    assert set(VERBS) <= shown


def uncommented(page: Path) -> list[tuple[str, list[str]]]:
    """The blocks of a page by line, without comments, which are in the page's language."""
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    return [
        (language, [re.sub(r" *#.*", "", line) for line in body.splitlines()]) for language, body in blocks
    ]


def test_both_readmes_have_the_same_blocks() -> None:
    assert uncommented(ROOT / "README.md") == uncommented(ROOT / "README.zh.md")


def test_the_chinese_readme_is_chinese_in_its_blocks_and_tables() -> None:
    text = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    comments = re.findall(r"#(?!#) *(\D.*)", "\n".join(body for _, body in FENCE.findall(text)))
    rows = re.findall(r"^\| *([^|]+?) *\|", text, re.MULTILINE)
    english = re.compile(r"^[a-z]+ [a-z]+ [a-z ]+$")
    assert comments
    assert not [line for line in comments if not re.search(r"[\u4e00-\u9fff]", line)]
    assert not [row for row in rows if english.match(row)]


def test_the_python_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = [body for language, body in FENCE.findall(text) if language == "python"]
    monkeypatch.chdir(tmp_path)
    exec(example.replace("max_tokens=64", "max_tokens=2"), {})
    assert (tmp_path / "folder" / "config.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    inside = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in inside if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_that_a_document_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:src|tests|docs|bench)/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_number_in_the_documents_comes_from_its_record() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_decision_has_a_number_of_its_own_a_few_lines_and_its_four_parts() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        parts = re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE)
        assert parts == ["Context", "Choice", "Rejected", "Consequence"], page.name
        assert text.count("\n") <= 16, page.name


def test_the_makefile_has_every_promised_target() -> None:
    targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {"demo", "test", "test-slow", "lint", "bench", "clean"} <= set(" ".join(targets).split())


def test_every_test_that_a_page_names_is_there() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))
        assert set(named) <= there, page_id(page)
