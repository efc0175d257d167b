"""``consilium eval --tasks``: what lm-evaluation-harness is told is what the model says, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.data.tokenizer import Tokenizer
from consilium.engine.engine import Engine
from consilium.errors import ConsiliumError
from small import DEEPSEEK, lively
from tasks import DOCUMENTS, TASK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("harness") / "model"
    store.save(lively(DEEPSEEK), made, tokenizer=Tokenizer.of_bytes())
    return made


def instances(kind: str, *arguments: tuple[Any, ...]) -> Any:
    api: Any = pytest.importorskip("lm_eval.api.instance", reason="lm-eval is not installed")
    return [api.Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def harness(folder: Path) -> Any:
    module: Any = pytest.importorskip("consilium.engine.harness", reason="lm-eval is not installed")
    tokenizer = Tokenizer.load(folder)
    return module.Harness(Engine(store.load(folder), tokenizer), tokenizer)


def by_hand(folder: Path, before: str, behind: str) -> tuple[float, bool]:
    model, tokenizer = store.load(folder).eval(), Tokenizer.load(folder)
    opening = tokenizer.eos_id if tokenizer.opening_id is None else tokenizer.opening_id
    tokens, given = [opening, *tokenizer.encode(before + behind)], 1 + len(tokenizer.encode(before))
    with torch.inference_mode():
        logprobs_SV = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)[given - 1 : -1]
    wanted = torch.tensor(tokens[given:])
    total = float(logprobs_SV.gather(1, wanted[:, None]).sum())
    return total, bool((logprobs_SV.argmax(-1) == wanted).all())


def test_a_continuation_is_as_likely_as_the_model_says(folder: Path) -> None:
    pairs = [("def f(", "x"), ("", "a text"), ("blanks ", "after"), ("x" * 400, "yz")]
    found = harness(folder).loglikelihood(instances("loglikelihood", *pairs))
    for (before, behind), score in list(zip(pairs, found, strict=True))[:2]:
        assert score == (pytest.approx(by_hand(folder, before, behind)[0], rel=1e-4), score[1])
    assert found[2][0] == pytest.approx(by_hand(folder, "blanks", " after")[0], rel=1e-4)
    assert found[3][0] < 0, "what is too long is cut in front"


def test_what_is_greedy_is_known(folder: Path) -> None:
    """Of all bytes that are text by themselves, some are the likeliest behind some letter."""
    pairs = [(letter, chr(byte)) for letter in "abc" for byte in range(33, 127)]
    found = harness(folder).loglikelihood(instances("loglikelihood", *pairs))
    right = [by_hand(folder, *pair)[1] for pair in pairs]
    assert [greedy for _, greedy in found] == right
    assert any(right)
    assert not all(right)


def test_a_whole_text_is_as_likely_in_windows_as_at_once(folder: Path) -> None:
    (found,) = harness(folder).loglikelihood_rolling(instances("loglikelihood_rolling", ("a whole text",)))
    assert found == pytest.approx(by_hand(folder, "", "a whole text")[0], rel=1e-4)
    (longer,) = harness(folder).loglikelihood_rolling(instances("loglikelihood_rolling", ("ab " * 300,)))
    assert longer < found


def test_answers_end_before_a_text_of_the_task(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    opening = tokenizer.eos_id if tokenizer.opening_id is None else tokenizer.opening_id
    engine = Engine(store.load(folder), tokenizer)
    prompt = [opening, *tokenizer.encode("Q: a")]
    whole = engine.complete_text([prompt], max_tokens=20)[0]
    stop = next(letter for letter in whole[3:] if letter.isascii() and letter not in whole[:3])
    asked = instances(
        "generate_until",
        ("Q: a", {"until": [stop], "max_gen_toks": 20}),
        ("Q: a", {"until": "no such text", "max_gen_toks": 20, "do_sample": False}),
    )
    assert harness(folder).generate_until(asked) == [whole.split(stop)[0], whole]


def test_odd_requests_of_tasks_have_an_answer_or_a_sentence(folder: Path) -> None:
    made = harness(folder)
    assert made.loglikelihood(instances("loglikelihood", ("a", ""))) == [(0.0, True)]
    with pytest.raises(ConsiliumError, match="exceeds the 254"):
        made.loglikelihood(instances("loglikelihood", ("a", "x" * 300)))
    asked = ({"max_gen_toks": 10_000}, {"max_gen_toks": 0}, {"temperature": None, "top_p": 0, "until": None})
    long, none, plain = made.generate_until(instances("generate_until", *(("Q", one) for one in asked)))
    assert none == ""
    assert long.startswith(plain[:3])
    warm = ("Q", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})
    assert len(set(made.generate_until(instances("generate_until", *[warm] * 4)))) > 1
    with pytest.raises(ConsiliumError, match="asks for beam"):
        made.generate_until(instances("generate_until", ("Q", {"beam": 3})))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents for the harness, which then asks nobody else."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "data.jsonl"
    made.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    return made


def test_tasks_of_a_folder_are_scored(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local.yaml").write_text(TASK.format(data=data))
    words = ["eval", str(folder), "--tasks", "local_choice", "--tasks-path", str(tmp_path / "tasks")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["local_choice"]
    right = 0
    for one in DOCUMENTS:
        question, choices = str(one["question"]), [str(choice) for choice in one["choices"]]
        bare = question.rstrip()
        scores = [by_hand(folder, bare, question[len(bare) :] + choice)[0] for choice in choices]
        right += scores.index(max(scores)) == one["label"]
    assert found["acc,none"] == pytest.approx(right / 3)
    assert main([*words, "--limit", "1"]) == 0
    assert "|local_choice|" in capsys.readouterr().out
    assert main([*words[:3], "no_such_task", *words[4:]]) == 2
    assert "knows no task 'no_such_task'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shots", "2"], "give --tasks NAME"),
        (["--tasks", "x", "--data", "builtin"], "--data is for text"),
        (["--tasks", "x", "--tasks-path", "absent"], "is no folder"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(folder), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_task_that_cannot_be_made_ready_is_named(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "local.yaml"
    words = ["eval", str(folder), "--tasks", "local_choice", "--tasks-path", str(tmp_path)]
    right = TASK.format(data=data)
    for text, said in (
        (right.replace('"{{choices}}"', "nofield"), "cannot make task 'local_choice' ready"),
        (TASK.format(data=tmp_path / "absent.jsonl"), "cannot make task 'local_choice' ready"),
        ("task: [broken", "local.yaml cannot be read as YAML"),
    ):
        assert text != right
        task.write_text(text)
        assert main(words) == 2
        told = capsys.readouterr().err
        assert said in told
        assert "fault of Consilium" not in told


def test_who_lacks_the_harness_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", str(folder), "--tasks", "x"]) == 2
    assert "pip install lm_eval" in capsys.readouterr().err
