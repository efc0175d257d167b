"""The wheel that users get builds, holds the whole package, and its command runs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import consilium
from house.tree import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_its_licence_and_its_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = [path for path in (ROOT / "src/consilium").rglob("*") if path.is_file()]
    package = {path.relative_to(ROOT / "src").as_posix() for path in files if path.suffix != ".pyc"}
    assert "consilium/py.typed" in package
    assert package <= set(names)
    assert f"consilium_moe-{consilium.__version__}.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "docs/"))]


@pytest.mark.slow
def test_the_command_runs_from_an_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    """Isolated mode sees neither the checkout nor PYTHONPATH; dependencies come from this environment."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import consilium; print(consilium.__file__);"
        "from consilium.cli.main import main; sys.exit(main(['plan', 'mixtral:8x7b', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, tmp_path], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path))
    assert "46702792704" in done.stdout
