"""``consilium doctor``: the machine, and every router against its golden vectors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from consilium.cli.generation import tell_kernels, tell_unread
from consilium.cli.main import main
from consilium.conformance import suite as conformance
from consilium.engine.engine import Engine
from consilium.model import native
from consilium.model.build import build
from consilium.ops.native import library
from consilium.recipes import catalogue
from kernels import HERE, kernels_of


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["doctor", *words]) == code
    return capsys.readouterr().out


def test_doctor_in_json_has_facts_and_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "--json"))
    assert "torch" in found["facts"]
    assert found["problems"] == []


def test_routers_has_a_line_a_system_and_all_pass(capsys: pytest.CaptureFixture[str]) -> None:
    heading, *lines = said(capsys, "--routers").splitlines()
    assert heading.split() == ["system", "cases", "choices", "experts", "max", "|dw|", "verdict"]
    assert [line.split()[0] for line in lines] == [vectors.model for vectors in conformance.shipped()]
    assert all(line.split()[3] == "exact" and line.split()[-1] == "pass" for line in lines)


def test_routers_in_json_counts_what_was_compared(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "--routers", "--json"))
    assert found["passed"] is True
    v3 = next(system for system in found["systems"] if system["system"] == "deepseek-v3:671b")
    assert v3["experts_exact"]
    assert v3["weight_error"] < conformance.TOLERANCE
    assert v3["choices"] > 400
    assert v3["differences"] == []


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtral's vectors under another weight rule, and those of DeepSeek-V3 under another rule of groups."""
    rules = {
        "mixtral:8x7b": {"router.weight": "{kind: raw}"},
        "deepseek-v3:671b": {"router.select.groups.score": "max"},
    }
    broken = tuple(
        dataclasses.replace(vectors, sizes={**vectors.sizes, **rules[vectors.model]})
        for vectors in conformance.shipped()
        if vectors.model in rules
    )
    monkeypatch.setattr(conformance, "shipped", lambda: broken)


@pytest.mark.usefixtures("broken")
def test_a_wrong_router_fails_with_what_differed(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--routers", code=1)
    assert "differs: mixtral:8x7b, ordinary: weights are off by" in out
    assert "differs: deepseek-v3:671b, ordinary: token" in out
    assert [line.split()[3:] for line in out.splitlines()[1:3]] == [
        ["differ", "-", "fail"],
        ["exact", next(line.split()[4] for line in out.splitlines() if line.startswith("mixtral")), "fail"],
    ]


@pytest.mark.usefixtures("broken")
def test_a_wrong_router_fails_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "--routers", "--json", code=1))
    assert found["passed"] is False
    assert [system["experts_exact"] for system in found["systems"]] == [False, True]
    assert all(system["differences"] for system in found["systems"])


def test_routers_needs_no_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; from consilium.cli.main import main;"
        "sys.exit(main(['doctor', '--routers']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fresh_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.delenv("CONSILIUM_NATIVE")
    library.found.cache_clear()
    yield monkeypatch
    library.found.cache_clear()


def test_it_tells_what_decodes(
    fresh_kernels: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_kernels.setenv("PATH", str(tmp_path))
    assert "there is no C++ compiler; install g++ or clang++" in " ".join(said(capsys).split())


def test_generate_tells_once_why_it_is_slow(
    fresh_kernels: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_kernels.setenv("PATH", str(tmp_path))
    tell_kernels()
    assert capsys.readouterr().err.count("there is no C++ compiler") == 1
    fresh_kernels.setenv("CONSILIUM_NATIVE", "off")
    tell_kernels()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("system", "dtype", "told"),
    [
        ("deepseek-v3", "bfloat16", ""),
        ("deepseek-v3", "float16", "kernels do not read float16; give --dtype bfloat16"),
        ("latent-moe", "bfloat16", "do not know a part of this model"),
    ],
)
def test_generate_tells_what_the_kernels_do_not_read(
    system: str, dtype: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = kernels_of(HERE[-1])
    for module in (native, library):
        monkeypatch.setattr(module, "kernels", lambda: found)
    tell_unread(Engine(build(catalogue.recipe(system, "tiny"), dtype=dtype)))
    said = " ".join(capsys.readouterr().err.split())
    assert told in said
    assert bool(told) == bool(said)
