"""A configuration from outside is data or one sentence, within two seconds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from consilium.config import io
from consilium.config.model import Model
from consilium.config.training import Training
from consilium.errors import ConsiliumError
from consilium.recipes.catalogue import recipe

SECONDS = 2.0
BOMB = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "alias bomb": BOMB,
    "anchor": "family: &x llama\n",
    "merge": "<<: {family: llama}\nlayers: *y\n",
    "itself": "&a [*a]",
    "date": "family: 2026-13-45\n",
    "time": "family: 2026-01-01T99:99:99Z\n",
    "binary": "layers: 0b\n",
    "sexagesimal": "layers: 1:99999999999999999999:1\n",
    "tag int": "layers: !!int '_'\n",
    "tag float": "layers: !!float x\n",
    "tag bytes": "layers: !!binary '='\n",
    "long int": f"layers: {'9' * 5000}\n",
    "python": "layers: !!python/object/apply:os.system ['false']\n",
    "deep": "[" * 60_000,
    "deep map": "".join(f"{' ' * i}a:\n" for i in range(300)),
    "deep keys": "? " * 30_000,
    "keys": "? [a, b]\n: 1\n? {a: 1}\n: 2\n",
    "long": "a: 1\n" * 20_000,
    "quotes": '"' * 60_000,
    "blanks": " " * 60_000 + "a",
    "nul": "a: \0",
    "surrogate": "a: \ud800",
    "documents": "--- 1\n" * 10_000,
    "tabs": "\t" * 60_000,
    "long kind": f"attention: {{kind: {'x' * 5000}}}\n",
    "long key": f"{'x' * 5000}: 1\n",
    "line breaks": 'attention: {kind: "a\\n\\e[2J"}\n',
    "list": "[1, 2]",
    "empty": "",
    "null": "null",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml_is_one_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(HOSTILE[kind], encoding="utf-8", errors="surrogatepass")
    for read in (
        lambda: io.from_yaml(Model, HOSTILE[kind], where=str(path)),
        lambda: io.read_yaml(Training, str(path)),
        lambda: io.replace(recipe("llama:tiny"), {"layers": HOSTILE[kind]}),
    ):
        start = time.perf_counter()
        with pytest.raises(ConsiliumError) as caught:
            read()
        assert time.perf_counter() - start < SECONDS
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2000


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(2**34)
    start = time.perf_counter()
    with pytest.raises(ConsiliumError, match="is longer than 65536 characters"):
        io.read_yaml(Training, tmp_path / "config.yaml")
    assert time.perf_counter() - start < SECONDS


def test_what_we_write_is_read(tmp_path: Path) -> None:
    model = recipe("deepseek-v3")
    text = io.to_yaml(model)
    assert len(text) < 2**16 / 10
    assert io.from_yaml(Model, text) == model
