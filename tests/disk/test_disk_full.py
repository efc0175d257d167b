"""A disk that cannot hold what is to be written is known before the first byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium.disk.files import refuse_full
from consilium.errors import ConsiliumError


def test_a_disk_that_is_too_small_is_known_before(tmp_path: Path) -> None:
    refuse_full(tmp_path / "absent" / "folder", 1, "a checkpoint")
    with pytest.raises(
        ConsiliumError, match=r"no space left on the disk for a checkpoint in .*absent: it takes"
    ):
        refuse_full(tmp_path / "absent", 2**60, "a checkpoint")


@pytest.mark.parametrize(
    ("free", "needed", "said"),
    [
        (0, 1, "takes 1 bytes and 0 bytes are free"),
        (100_000, 300_000, "takes 293 KiB and 98 KiB are free"),
        (2**20, 2**33, "takes 8,192 MiB and 1,024 KiB are free"),
        (2**34, 2**37, "takes 128 GiB and 16 GiB are free"),
    ],
)
def test_what_is_missing_is_told_in_a_unit_that_shows_it(
    free: int, needed: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.disk.files._free", lambda place: free)
    with pytest.raises(ConsiliumError, match=said):
        refuse_full(tmp_path, needed, "a checkpoint")
