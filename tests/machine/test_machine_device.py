"""A device is the one that was asked for, or one sentence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from consilium.errors import ConsiliumError
from consilium.machine.device import choose_device


def cards(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    there = SimpleNamespace(is_available=lambda: number > 0, device_count=lambda: number)
    monkeypatch.setattr(torch, "cuda", there)


@pytest.mark.parametrize(
    ("number", "name", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
        (2, "cpu", "cpu"),
    ],
)
def test_what_is_asked_for_is_chosen(
    number: int, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, number)
    assert choose_device(name) == device


@pytest.mark.parametrize(
    ("number", "name", "answer"),
    [
        (0, "cuda", "device cuda is not here: torch .* use --device cpu"),
        (2, "cuda:2", "there are 2 CUDA devices, numbered from 0; use cuda:1"),
        (2, "mps", "unknown device 'mps'; give auto, cpu, cuda or cuda:N"),
        (2, "cuda:-1", "unknown device"),
        (2, "", "unknown device"),
    ],
)
def test_what_is_not_here_is_one_sentence(
    number: int, name: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, number)
    with pytest.raises(ConsiliumError, match=answer):
        choose_device(name)
