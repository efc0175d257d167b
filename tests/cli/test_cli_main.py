from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from consilium import __version__
from consilium.cli.arguments import Parser
from consilium.cli.main import VERBS, main
from consilium.errors import ConsiliumError

COMMAND = [sys.executable, "-m", "consilium"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)


def replace_verb(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException | None = None) -> None:
    def arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, default=3)

    def act(options: Namespace) -> int:
        if error is not None:
            raise error
        return options.steps

    module = SimpleNamespace(arguments=arguments, run=act)
    monkeypatch.setitem(sys.modules, f"consilium.cli.{name}", module)


def best_seconds(words: list[str], limit: float) -> float:
    """Processor seconds of the fastest of at most eight runs: the time it takes on an idle machine."""
    best = float("inf")
    for _ in range(8):
        before = os.times()
        subprocess.run([*COMMAND, *words], capture_output=True, check=True)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, spent)
        if best < limit:
            break
    return best


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_names_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, verb in VERBS.items():
        assert [name, *verb.help.split()] in [line.split() for line in lines]


@pytest.mark.parametrize("name", VERBS)
def test_the_example_of_every_verb_is_understood_by_that_verb(name: str) -> None:
    command, verb, *words = shlex.split(VERBS[name].example)
    assert (command, verb) == ("consilium", name)
    parser = Parser(prog=f"consilium {name}", description="", example="")
    importlib.import_module(f"consilium.cli.{name}").arguments(parser)
    parser.read(words)


def test_help_of_a_verb_shows_its_options_and_the_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_verb(monkeypatch, "bench")
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--steps" in shown
    assert f"example:\n  {VERBS['bench'].example}" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"consilium {__version__}\n"


def test_help_imports_no_verb_and_nothing_heavy() -> None:
    code = (
        "import sys; from consilium.cli.main import main; main(['--help']);"
        "print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stderr.split())
    assert not {"torch", "numpy", "pydantic", "rich", "yaml"} & imported
    assert not {f"consilium.cli.{name}" for name in VERBS} & imported


def test_help_is_there_within_three_tenths_of_a_second() -> None:
    assert best_seconds(["--help"], 0.3) < 0.3


def test_a_plan_is_there_within_half_a_second() -> None:
    assert best_seconds(["plan", "deepseek-v3"], 0.5) < 0.5


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["pln"], "unknown verb 'pln'. Did you mean 'plan'?"),
        (["--vresion"], "unknown option '--vresion'. Did you mean '--version'?"),
        (["plan", "llama", "--fitt", "3"], "consilium plan: unknown option --fitt. Did you mean '--fit'?"),
        (["plan", "llama", "--fitt=3"], "consilium plan: unknown option --fitt. Did you mean '--fit'?"),
        (["plan", "llama", "--xyzzy"], "unknown option --xyzzy. consilium plan --help lists the options."),
        (["plan", "llama", "--tok", "3"], "unknown option --tok. Did you mean '--tokens'?"),
        (["plan", "llama", "more"], "consilium plan: unexpected argument 'more'"),
        (["plan"], "consilium plan: the following arguments are required: MODEL"),
        (["plan", "llama", "--fit"], "consilium plan: argument --fit: expected one argument"),
        (["plan", "llama", "--fit", "much"], "argument --fit: 'much' is not a positive size with its unit"),
        (["plan", "lama"], "unknown recipe 'lama'. Did you mean 'llama'?"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert answer in shown.err
    assert shown.err.count("\n") == 1


def test_the_exit_code_of_a_verb_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_verb(monkeypatch, "bench")
    assert main(["bench", "--steps", "7"]) == 7


def test_a_mistake_of_many_lines_is_shown_on_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_verb(monkeypatch, "bench", ConsiliumError("no room\n  for 'a  b\x1b' on the disk;\r\nfree some."))
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == "error: no room for 'a  b\\x1b' on the disk; free some.\n"


def test_an_interrupt_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_verb(monkeypatch, "bench", KeyboardInterrupt())
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_verb_from_outside_leaves_no_half_folder(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import sys, time, types, pathlib\n"
        "from consilium.cli.main import main\n"
        "from consilium.disk.atomic import commit_folder\n"
        "def write(folder):\n"
        "    (folder / 'half').write_text('x'); print('writing', flush=True); time.sleep(60)\n"
        "def run(_): commit_folder(pathlib.Path('made'), write)\n"
        "verb = types.SimpleNamespace(arguments=lambda _: None, run=run)\n"
        "sys.modules['consilium.cli.bench'], sys.argv = verb, ['consilium', 'bench']\n"
        "sys.exit(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(number)
        assert process.wait(30) == 130
    assert not list(tmp_path.iterdir())


def test_our_own_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_verb(monkeypatch, "bench", ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["bench"])


def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen(
        [*COMMAND, "systems", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_python_m_consilium_is_the_command() -> None:
    done = run("plan", "llama:tiny", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["family"] == "llama"
    assert run("plan", "lama").returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_python_ends_changes_nothing(number: signal.Signals) -> None:
    script = (
        "import atexit, os, sys, types\n"
        "from consilium.cli.main import main\n"
        f"atexit.register(lambda: os.kill(os.getpid(), {int(number)}))\n"
        "verb = types.SimpleNamespace(arguments=lambda _: None, run=lambda _: 0)\n"
        "sys.modules['consilium.cli.bench'], sys.argv = verb, ['consilium', 'bench']\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
