from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import write_config, write_text

from consilium.checkpoint import store
from consilium.cli import chat
from consilium.cli.main import main
from consilium.data.tokenizer import Tokenizer
from consilium.engine import batch
from consilium.kv.paged import PagedCache
from consilium.kv.rows import CacheFormat
from consilium.model.decoder import Decoder
from consilium.ops.weights import PACKINGS
from small import DEEPSEEK, lively

COMMAND = [sys.executable, "-m", "consilium"]
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    config = write_config(folder, write_text(folder / "text"))
    assert main(["train", str(config), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template and the sampling of its authors."""
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(run / "checkpoints/step-3", folder)
    shutil.rmtree(folder / "training_state")
    (folder / "manifest.json").unlink()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


class Input(io.TextIOWrapper):
    """Standard input with this text."""

    def __init__(self, text: str | bytes) -> None:
        super().__init__(io.BytesIO(text if isinstance(text, bytes) else text.encode()), encoding="utf-8")


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *words: str) -> str:
    """What standard error says of a conversation; standard output is the answers."""
    monkeypatch.setattr(sys, "stdin", Input(text))
    capsys.readouterr()
    assert main(["chat", *words]) == 0
    return capsys.readouterr().err


def test_a_conversation_and_its_commands(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.txt").write_text("notes")
    said = talk(
        monkeypatch,
        capsys,
        "hello\n/svae c.json\n/save c.json\n/save theirs.txt\n/load theirs.txt\n/save\n/stats\n/reset\n"
        "/system Be brief.\nand\\\nthen?\n/load c.json\n/save ~no-such-user/c.json\n/save c\0d\n/help\n"
        " /slash as text\n/exit now\n",
        str(model),
        "--max-tokens",
        "3",
    )
    assert f"format: the model's own chat template ({model}/chat_template.jinja)" in said
    assert "unknown command '/svae'. Did you mean '/save'?" in said
    assert "saved 2 messages to c.json" in said
    assert "theirs.txt exists and is no conversation of ours" in said
    assert "theirs.txt is no conversation; give a file" in said
    assert said.count("cannot be the name of a file") == 2
    assert "unknown command '/exit'" not in said
    assert "/save needs the name of a file" in said
    assert "sampling: greedy" in said
    assert "layer 1: busiest expert" in said
    assert "loaded 2 messages" in said
    assert said.count("tokens/s") >= 3
    assert (tmp_path / "theirs.txt").read_text() == "notes"
    kept = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert [one["role"] for one in kept] == ["user", "assistant"]
    assert kept[0]["content"] == "hello"


def test_a_hostile_template_ends_the_chat_in_one_sentence_before_weights_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("consilium.checkpoint.store.load", None)
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    assert main(["chat", str(tmp_path / "m")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "chat_template.jinja fails (SecurityError" in said.err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (["  one "], "one"),
        ([" /stats"], "/stats"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one\\"], "one"),
        (['"""one"""'], "one"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""one', "two"], "one\ntwo"),
        ([""], ""),
    ],
)
def test_a_message_of_several_lines(lines: list[str], message: str) -> None:
    left = list(lines)

    def line(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    assert chat.read_message(line).lstrip() == message


def test_the_history_is_trimmed_and_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = talk(
        monkeypatch, capsys, f"{'first ' * 20}\n{'second ' * 20}\nthird\n", str(run), "--max-tokens", "3"
    )
    assert "the context of 256 tokens is full: the oldest 1 exchanges are left out" in said
    assert said.count("tokens/s") == 3


def test_one_turn_and_prompts_from_elsewhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_bytes("naïve".encode())
    monkeypatch.setattr(sys, "stdin", Input("from input\n"))
    words = ["--prompt", "-", "--prompt-file", str(tmp_path / "p.txt"), "--max-tokens", "2", "--json"]
    assert main(["generate", str(model), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["prompt"] for one in found["completions"]] == ["from input", "naïve"]
    assert found["loads"]["1"]
    assert found["seed"] is None
    assert found["speed"]["first_token_seconds"] > 0
    assert main(["generate", str(model), "--prompt", "x", "--chat", "--max-tokens", "2"]) == 0
    shown = capsys.readouterr()
    assert "format: the model's own chat template" in shown.err
    assert not shown.out.startswith("x")


@pytest.mark.parametrize(
    ("words", "given", "answer"),
    [
        (["--prompt", "-", "--prompt", "-"], b"", "can be one prompt only"),
        (["--prompt", "-"], b"\xff", "standard input is not UTF-8 at byte 0"),
        (["--prompt-file", "absent"], b"", "cannot read the prompt absent"),
        (["--prompt", "a", "--max-tokens", "0"], b"", "--max-tokens 0 is less than 1"),
        (["--prompt", "a", "--max-tokens", "9999"], b"", "exceeds the model's length"),
        (["--prompt", "a\udcff"], b"", "half a surrogate pair"),
        (["--prompt", "a", "--top-p", "0"], b"", "top_p 0.0 is out of range"),
        (["--prompt", "a", "--stop", ""], b"", "a stop text is empty"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Path,
    words: list[str],
    given: bytes,
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", Input(given))
    capsys.readouterr()
    assert main(["generate", str(run), *words]) == 2
    said = capsys.readouterr()
    assert answer in said.err
    assert said.out == ""


def test_a_draw_tells_its_seed_which_repeats_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(*words: str) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["generate", str(run), "--prompt", "a", "--temperature", "2", *words]) == 0
        shown = capsys.readouterr()
        return shown.out, shown.err

    one, two = drawn(), drawn()
    assert one[0] != two[0]
    seed = one[1].split("seed ")[1].split(";")[0]
    assert drawn("--seed", seed)[0] == one[0]


def test_what_does_nothing_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "a", "--top-p", "0.5", "--max-tokens", "1"]) == 0
    assert "--top-p does nothing at temperature 0" in capsys.readouterr().err


def test_chat_samples_as_the_authors_say_and_ends_at_their_tokens(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "m")
    keys = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, *range(3, 300)]}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(keys))
    said = talk(monkeypatch, capsys, "hello\n/stats\n", str(tmp_path / "m"), "--seed", "4")
    assert "sampling: temperature 0.6, top-k 0, top-p 0.9, seed 4" in said
    assert "1 token, " in said
    assert main(["generate", str(tmp_path / "m"), "--prompt", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completions"][0]["finished"] == "stop"


def test_ctrl_c_ends_the_answer_and_twice_the_conversation(run: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*COMMAND, "chat", str(run), "--max-tokens", "200", "--temperature", "3"])

    def until(mark: bytes, limit: float = 60) -> bytes:
        seen, end = b"", time.monotonic() + limit
        while mark not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    seen += os.read(terminal, 4096)
                except OSError:
                    break
        return seen

    assert b"> " in until(b"> ")
    os.write(terminal, b"hello\n")
    until(b"hello\r\n")
    time.sleep(0.05)
    os.write(terminal, b"\x03")
    assert b" token" in until(b"\n> ")  # the first one drawn may end it, however soon the signal comes
    said, ended = b"", (0, 0)
    for _ in range(40):
        os.write(terminal, b"\x03")  # Python may sleep through one that comes while a prompt is written
        wait = time.monotonic() + 0.7
        said += until(b"never", 0.7)  # at once where the other end is closed: it is ending
        time.sleep(max(0.0, wait - time.monotonic()))
        ended = os.waitpid(pid, os.WNOHANG)
        if ended[0]:
            break
    os.close(terminal)
    assert b"once more" in said
    assert os.waitstatus_to_exitcode(ended[1]) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_chat_from_outside_keeps_the_conversation(
    run: Path, number: signal.Signals, tmp_path: Path
) -> None:
    """The second message is answered at the time: what was heard of its answer stays."""
    words = [*COMMAND, "chat", str(run), "--max-tokens", "200", "--temperature", "3"]
    with subprocess.Popen(
        words,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        while "tokens/s" not in (line := process.stderr.readline()):
            assert line
        process.stdin.write("again\n")
        process.stdin.flush()
        time.sleep(0.1)
        for _ in range(3):  # a terminal that closes sends more than one
            process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    (file,) = tmp_path.glob("conversation-*.json")
    assert f"messages to {file.name}" in said
    kept = [one["content"] for one in json.loads(file.read_text())["messages"] if one["role"] == "user"]
    assert kept[0] == "hello"


def test_what_was_saved_is_not_saved_again(run: Path, tmp_path: Path) -> None:
    words = [*COMMAND, "chat", str(run), "--max-tokens", "1"]
    with subprocess.Popen(
        words,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("hello\n/save c.json\n")
        process.stdin.flush()
        while "to c.json" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_reader_that_leaves_ends_the_text(run: Path) -> None:
    words = [*COMMAND, "generate", str(run), "--prompt", "a", "--max-tokens", "200", "--temperature", "2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"a", "text is written as it comes"
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode in {0, 141}


@pytest.mark.parametrize("packing", PACKINGS)
def test_weights_are_packed_where_that_is_asked_for(
    run: Path, packing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Decoder] = []
    load = store.load

    def recorded(*args: Any, **options: Any) -> Decoder:
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(store, "load", recorded)
    assert (
        main(["generate", str(run), "--prompt", "a", "--max-tokens", "3", "--weights", packing, "--json"])
        == 0
    )
    text = json.loads(capsys.readouterr().out)["completions"][0]["text"]
    assert isinstance(text, str)
    assert main(["eval", str(run), "--weights", packing, "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert main(["eval", str(run), "--json"]) == 0
    assert packed == pytest.approx(json.loads(capsys.readouterr().out)["bits_per_byte"], rel=0.05)
    kinds = [model.head.weight.dtype for model in loaded]
    held = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(packing, torch.uint8)
    assert kinds == [held, held, torch.float32]


def test_latents_are_cached_in_eight_bits_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(lively(DEEPSEEK), tmp_path / "model", tokenizer=Tokenizer.of_bytes())
    forms: list[str] = []
    made = batch.build_pool

    def recorded(*args: Any, form: CacheFormat, **options: Any) -> PagedCache:
        forms.append(form)
        return made(*args, form=form, **options)

    monkeypatch.setattr(batch, "build_pool", recorded)
    asked = ["generate", str(tmp_path / "model"), "--prompt", "a", "--max-tokens", "3", "--json"]
    for more in ([], ["--cache", "int8"]):
        assert main([*asked, *more]) == 0
        assert len(json.loads(capsys.readouterr().out)["completions"][0]["tokens"]) == 3
    assert forms == ["model", "int8"]
