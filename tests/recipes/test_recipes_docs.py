"""The pages of the systems say what the recipes say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from consilium.planner.parameters import parameters
from consilium.recipes.catalogue import systems

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "generate_systems.py"


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("docs_generate_systems", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def copy(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pages, freshly written."""
    monkeypatch.setattr(generate, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    assert generate.main([]) == 0
    return tmp_path / "docs"


def test_the_pages_of_systems_are_those_of_the_recipes() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_system_has_a_page_with_all_that_its_recipe_says(copy: Path) -> None:
    for one in systems():
        text = (copy / "systems" / f"{one.name}.md").read_text(encoding="utf-8")
        for sentence in (*one.choices, *one.equations, *one.deviations):
            assert sentence in text
        for model in one.sizes.values():
            assert f"{parameters(model).total:,}" in text


def test_the_index_links_every_system_and_counts_every_size(copy: Path) -> None:
    text = (copy / "systems.md").read_text(encoding="utf-8")
    for one in systems():
        assert f"[{one.name}](systems/{one.name}.md)" in text
        assert all(f"| {one.name}:{size} |" in text for size in one.sizes)
        assert all(f"| {facts.total} / {facts.active or '-'} |" in text for facts in one.published.values())


def test_a_stale_a_missing_and_a_leftover_page_are_found(
    generate: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--check"]) == 0
    (copy / "systems" / "mixtral.md").write_text("something else", encoding="utf-8")
    (copy / "systems" / "switch.md").unlink()
    (copy / "systems" / "forgotten.md").write_text("a system of the past", encoding="utf-8")
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert {line.split()[0] for line in said.splitlines()} == {
        f"docs/systems/{name}.md" for name in ("mixtral", "switch", "forgotten")
    }
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
