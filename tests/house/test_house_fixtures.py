"""The fixtures and helpers that other tests rely on do what they say."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from pytest_socket import SocketBlockedError

from support import relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_uninitialised_floating_memory_is_nan(dtype: torch.dtype) -> None:
    base = torch.zeros(3, dtype=dtype)
    for fresh in (torch.empty(3, dtype=dtype), torch.empty_like(base), base.new_empty(3)):
        assert fresh.isnan().all()


def test_poisoned_factories_still_obey_devices_and_gradients() -> None:
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert torch.empty(2, requires_grad=True).requires_grad
    assert torch.empty(2, dtype=torch.int64).shape == (2,)


def test_tests_use_one_thread_and_a_cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert torch.get_num_threads() == 1
    assert Path(os.environ["CONSILIUM_CACHE"]).is_relative_to(tmp_path_factory.getbasetemp())


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_the_network_is_closed() -> None:
    with pytest.raises(SocketBlockedError):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def test_relative_error_is_a_share_of_the_expected_norm() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected, expected) == 0
    assert relative_error(expected * 1.01, expected) == pytest.approx(0.01, rel=1e-5)
    assert relative_error(expected * 1e-30, expected * 2e-30) == pytest.approx(0.5, rel=1e-5)


def test_relative_error_excuses_nothing_against_zero_or_nan() -> None:
    zero = torch.zeros(2)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1e-38, zero) == float("inf")
    assert not relative_error(torch.full((2,), float("nan")), torch.ones(2)) < 1
    assert not relative_error(torch.full((2,), float("nan")), zero) < 1
