"""The catalogue is complete, nothing in it is idle, and every placeholder has its value in both languages."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import string
import subprocess
import sys
from collections.abc import Iterator

import pytest

from consilium.cli.arguments import Parser
from consilium.cli.main import VERBS, main
from consilium.errors import ConsiliumError
from consilium.report.build import build_report
from consilium.words.say import CATALOGUE, check_language, language, say
from consilium.words.width import padded, width, wrapped
from house.tree import ROOT, sources
from report.run_folders import Kind, MakeRun

COMPUTED = ("src/consilium/cli/arguments.py", "src/consilium/cli/main.py")
"""Where ``say`` is given texts that are declared elsewhere: options and verbs."""
SENTENCE = re.compile(r"(?<![\w`/.'-])[a-z]{2,} [a-z]{2,} [a-z]{2,}")
"""Three English words in a row."""


def catalogue() -> dict[str, str]:
    found: dict[str, str] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return found


def said() -> set[str]:
    """First arguments of every call of ``say`` or ``voice`` in the package and its templates."""
    found = set(template_keys())
    for source in sources("src"):
        for node in ast.walk(source.tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id not in {"say", "voice"}:
                continue
            key = node.args[0] if node.args else None
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                found.add(key.value)
            else:
                assert source.name in COMPUTED, f"{source.name}:{node.lineno} says what no test can find"
    return found


def template_keys() -> Iterator[str]:
    for page in (ROOT / "src/consilium/report/templates").glob("*.j2"):
        text = page.read_text(encoding="utf-8")
        keys = re.findall(r'\bsay\("((?:[^"\\]|\\.)*)"', text)
        assert len(keys) == len(re.findall(r"\bsay\(", text)), page.name
        yield from keys


def helps() -> set[str]:
    """Help of every verb and of every option of it, as declared."""
    found = {verb.help for verb in VERBS.values()}
    for name in VERBS:
        parser = Parser(prog=name, description="", example="")
        importlib.import_module(f"consilium.cli.{name}").arguments(parser)
        found |= {action.help or "" for action in parser.actions()}
    return found - {"", argparse.SUPPRESS}


def placeholders(text: str) -> set[tuple[str, str]]:
    fields = {
        (name, f"{spec}!{conversion}") for _, name, spec, conversion in string.Formatter().parse(text) if name
    }
    return fields | {(name, "%") for name in re.findall(r"%\((\w+)\)", text)}


SECTIONS = {"usage: ", "options", "positional arguments"}


def test_every_text_has_its_chinese_and_none_is_idle() -> None:
    needed = said() | helps() | SECTIONS
    known = set(catalogue())
    assert sorted(needed - known) == []
    assert sorted(known - needed) == []


def test_placeholders_agree() -> None:
    assert {
        english: chinese
        for english, chinese in catalogue().items()
        if placeholders(english) != placeholders(chinese)
    } == {}


def test_every_translation_is_chinese() -> None:
    """A text of names and numbers alone may stay as it is."""
    assert [
        english
        for english, chinese in catalogue().items()
        if not re.search(r"[\u3000-\u9fff\uff00-\uffef]", chinese) and SENTENCE.search(english)
    ] == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de_DE.UTF-8", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "CONSILIUM_LANG": "en"}, "en"),
        ({"LC_ALL": "C", "CONSILIUM_LANG": "zh"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "CONSILIUM_LANG": ""}, "zh"),
    ],
    ids=str,
)
def test_the_language_is_asked_for_or_the_locales(
    settings: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CONSILIUM_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


def test_a_language_that_nobody_speaks_here_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONSILIUM_LANG", "fr")
    with pytest.raises(ConsiliumError, match="fr"):
        check_language()
    assert main(["plan", "--help"]) == 2
    assert "CONSILIUM_LANG=fr" in capsys.readouterr().err
    assert say("none") == "none"  # a page of a run that ends is no place to refuse


def run(*words: str, **settings: str) -> str:
    """What the command prints in Chinese where the locale is C."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "consilium", *words],
        capture_output=True,
        check=True,
        env=kept | {"LANG": "C", "LC_ALL": "C", "CONSILIUM_LANG": "zh", "COLUMNS": "100"} | settings,
    )
    return done.stdout.decode("utf-8")


def untranslated(text: str) -> list[str]:
    return [line for line in text.splitlines() if SENTENCE.search(line) and "consilium " not in line]


def test_help_of_every_verb_is_chinese(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONSILIUM_LANG", "zh")
    monkeypatch.setenv("COLUMNS", "100")
    for words in ([], *([name, "--help"] for name in VERBS)):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "用法：" in shown
        assert untranslated(shown) == []
        assert max(width(line) for line in shown.splitlines() if "用法" not in line) <= 100


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_plan_is_chinese_whatever_the_locale_says_of_the_terminal(encoding: str) -> None:
    plan = ("plan", "deepseek-v3", "--fit", "80G", "--against", "llama")
    shown = run(*plan, PYTHONIOENCODING=encoding)
    assert "参数" in shown
    assert untranslated(shown) == []


def test_the_list_of_systems_is_chinese() -> None:
    assert untranslated(run("systems")) == []


def test_json_is_the_same_in_every_language() -> None:
    for words in (("systems", "--json"), ("plan", "olmoe", "--json")):
        assert run(*words) == run(*words, CONSILIUM_LANG="en"), words
    doctor = json.loads(run("doctor", "--json", "--device", "cpu", "--dtype", "float32"))
    assert "processor" in doctor["facts"]
    assert doctor["facts"]["used"].endswith("float32 in training")


@pytest.mark.parametrize("ended", [True, False])
def test_a_page_is_chinese(ended: bool, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSILIUM_LANG", "zh")
    page = build_report(make_run("run", Kind(dead=(1,), ended=ended)), make_run("other", Kind()))
    html = page.read_text(encoding="utf-8")
    assert '<html lang="zh">' in html
    text = re.sub(
        r"<(style|details|code|pre)>.*?</\1>",
        "",
        html,
        flags=re.DOTALL,
    )
    shown = re.findall(r'>([^<>]+)<|aria-label="([^"]+)"', text)
    assert [part for pair in shown for part in pair if SENTENCE.search(part)] == []


def test_columns_are_aligned_by_what_is_seen() -> None:
    assert width("专家 8") == 6
    assert padded("专家", 6) == "专家  "
    assert padded("专家", 6, right=True) == "  专家"


def test_lines_break_where_chinese_may() -> None:
    text = "要装进的内存，例如 24GiB 或 80G（按 GiB 计）。默认：不问"
    lines = wrapped(text, 16)
    assert max(map(width, lines)) <= 16
    assert not [line for line in lines if line[:1] in "，。：）"]
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrapped("a word\n  and another", 8) == ["a word", "and", "another"]
