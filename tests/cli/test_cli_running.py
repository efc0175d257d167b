"""``--device``, ``--threads`` and ``--dtype``, the same wherever a model runs."""

from __future__ import annotations

import pytest
import torch

from consilium.cli.arguments import Parser
from consilium.cli.running import Place, running_arguments, settle
from consilium.errors import ConsiliumError


def settled(*words: str) -> Place:
    parser = Parser(prog="consilium test", description="", example="")
    running_arguments(parser)
    return settle(parser.read(words))


def test_settled_threads_are_those_that_torch_uses() -> None:
    before = torch.get_num_threads()
    try:
        place = settled("--device", "cpu", "--threads", "2", "--dtype", "bfloat16")
        assert place == Place("cpu", 2, "bfloat16")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_without_options_the_verb_chooses_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settled() == Place("cpu", 1, None)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("--device", "cuda"), "device cuda is not here"),
        (("--device", "gpu"), "argument --device: 'gpu' is not auto, cpu, cuda or cuda:N"),
        (("--threads", "0"), "argument --threads: '0' is not a number of threads"),
        (("--threads", "1e3"), "is not a number of threads"),
        (("--dtype", "q4_0"), "argument --dtype: invalid choice: 'q4_0'"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: tuple[str, ...], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConsiliumError, match=answer):
        settled(*words)
