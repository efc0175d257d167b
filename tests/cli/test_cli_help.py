"""Help of every verb: light, complete with defaults, and what shells complete from."""

from __future__ import annotations

import subprocess
import sys
from argparse import Action

import pytest

from consilium.cli.arguments import path
from consilium.cli.main import VERBS, main, verb_parser
from consilium.errors import closest
from consilium.recipes.balances import TEXTS


@pytest.mark.parametrize("name", VERBS)
def test_every_option_says_its_default(name: str) -> None:
    def told(action: Action) -> bool:
        return action.required or action.nargs == 0 or "default" in (action.help or "")

    assert not [action.dest for action in verb_parser(name).actions() if not told(action)]


@pytest.mark.parametrize("name", VERBS)
def test_every_option_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert "%(" not in capsys.readouterr().out
    assert all(action.help for action in verb_parser(name).actions())


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    code = (
        "import sys; from consilium.cli.main import VERBS, main\n"
        "for name in VERBS: main([name, '--help'])\n"
        "print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "pydantic", "rich", "yaml", "jinja2", "tokenizers", "safetensors"}
    assert not heavy & set(done.stderr.split())


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "nothere", "x"],
        ["bench", "./nothere"],
        ["doctor", "nothere"],
        ["plan", "./nothere"],
        ["generate", "nothere", "--prompt", "x"],
        ["eval", "nothere"],
        ["chat", "nothere"],
    ],
    ids=lambda words: words[0],
)
def test_a_missing_folder_is_answered_without_torch(words: list[str]) -> None:
    code = (
        "import sys; from consilium.cli.main import main; code = main(sys.argv[1:]);"
        "sys.exit(3 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no such folder" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", True),
        ("allenai/OLMoE-1B-7B-0924", True),
        ("./olmoe", False),
        ("runs/demo", False),
        ("runs/Demo", False),
        ("olmoe-dir/", False),
        ("/no/Such", False),
        ("../Up", False),
        ("a/B/c", False),
    ],
)
def test_a_folder_that_is_not_there_is_called_that(
    name: str, is_hub: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["plan", name], ["convert", name, "out"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "no such folder" in said
        assert ("hf download" in said) == is_hub


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("--model", "--help", None),
        ("--json", "--stop", None),
        ("--quant", "--against", None),
        ("--n", "--json", None),
        ("--tok", "--tokens", "--tokens"),
        ("--tokens", "--max-tokens", "--max-tokens"),
        ("--max_tokens", "--max-tokens", "--max-tokens"),
        ("glm4_moe", "llama_moe", None),
        ("jamba", "llama", None),
        ("deepseek-v4", "deepseek-v3", None),
        ("deepseek", "deepseek-v3", "deepseek-v3"),
        ("dsepseek-v3", "deepseek-v3", "deepseek-v3"),
        ("617b", "671b", "671b"),
        ("bf16", "bfloat16", "bfloat16"),
        ("", "tiny", None),
    ],
)
def test_a_hint_is_what_was_nearly_written(word: str, known: str, meant: str | None) -> None:
    assert closest(word, [known]) == meant


def test_mistral_is_not_mixtral(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mistral"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_completion_knows_every_verb_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="completion is an extra")
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    for name in VERBS:
        assert f"_shtab_consilium_{name}_option_strings" in script
    assert "--balance" in script
    assert all(name in script for name in TEXTS)
    assert "___method_choices=(split-random" in script
    for verb in VERBS:
        of_paths = [action for action in verb_parser(verb).actions() if action.type is path]
        start = f"_shtab_consilium_{verb}_"
        for option in (name for action in of_paths for name in action.option_strings):
            assert f"{start}{option.replace('-', '_')}_COMPGEN=_shtab_compgen_files" in script
        positions = [line for line in script.splitlines() if line.startswith(f"{start}pos_")]
        assert sum("_COMPGEN" in line for line in positions) >= sum(not a.option_strings for a in of_paths)
    assert main(["--completion", "bsh"]) == 2
    assert "Did you mean 'bash'?" in capsys.readouterr().err


def test_completion_without_its_package_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--completion", "bash"]) == 2
    assert "pip install 'consilium-moe[completion]'" in capsys.readouterr().err
