"""Text of any size is encoded in memory that does not grow with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MIB = 2**20
PAGE = "".join(
    f"line {i} of many says {i * i % 977} and goes on\n" + "\n" * (i % 7 == 0) for i in range(3000)
)
RECORD = json.dumps({"text": PAGE[:1500], "domain": "records"}) + "\n"


def encoded(folder: Path, size: int, kind: str) -> dict[str, float]:
    """Encode ``size`` bytes, a plain file and a quarter of records, in a process of its own."""
    (folder / "large").mkdir()
    (folder / "small.txt").write_text(PAGE)
    for name, unit, part in (("a.txt", PAGE, 3 * size // 4), ("b.jsonl", RECORD, size // 4)):
        with (folder / "large" / name).open("w") as file:
            for _ in range(part // len(unit)):
                file.write(unit)
    environment = {**os.environ, "CONSILIUM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(Path(__file__).with_name("memory.py")), str(folder), kind]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_what_is_held_in_memory_is_a_few_pieces_of_the_text(tmp_path: Path) -> None:
    """All tokens of this text as numbers of Python take 300 MiB alone."""
    found = encoded(tmp_path, 8 * MIB, "bytes")
    assert found["tokens"] > 7 * MIB
    assert found["bytes"] < 150 * MIB


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["bytes", "train"])
def test_a_gigabyte_is_encoded_within_300_megabytes(
    kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found = encoded(tmp_path, 1024 * MIB, kind)
    record_property("megabytes_above_imports", round(found["bytes"] / 1e6, 1))
    record_property("seconds", round(found["seconds"]))
    assert found["bytes"] < 300e6
