"""Native kernels are compiled once, safely, for what this processor has; without a compiler nothing fails."""

from __future__ import annotations

import errno
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from consilium.errors import ConsiliumError
from consilium.machine import amx
from consilium.machine.amx import permitted
from consilium.ops.native import compile as native
from consilium.ops.native import library
from consilium.ops.native.compile import VARIABLE, Built, Missing, Planned, built, planned, tiers
from consilium.ops.native.library import Kernels
from kernels import HERE, compiled, kernels_of


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def quick(wanted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that only writes its arguments, in a folder that is the whole PATH."""
    script = tmp_path / "bin" / "g++"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport sys, pathlib\n"
        "if '--version' in sys.argv: print('quick 1.0'); sys.exit()\n"
        "pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).write_text(' '.join(sys.argv))\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    return script


def test_what_is_compiled_is_found_again(quick: Path, tmp_path: Path) -> None:
    plan = planned(tmp_path / "kept")
    assert isinstance(plan, Planned)
    assert not plan.is_there
    assert built(tmp_path / "kept") == Built(plan.path, tiers()[-1])
    made = plan.path.read_bytes()
    quick.write_text("#!/bin/sh\necho quick 1.0\n")
    assert built(tmp_path / "kept") == Built(plan.path, tiers()[-1])
    assert plan.path.read_bytes() == made


def test_another_compiler_source_or_tier_is_another_file(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path() -> Path:
        plan = planned(tmp_path)
        assert isinstance(plan, Planned)
        return plan.path

    seen = {path()}
    quick.write_text(quick.read_text().replace("1.0", "2.0"))
    seen.add(path())
    monkeypatch.setenv(VARIABLE, "portable")
    seen.add(path())
    changed = shutil.copytree(Path(native.__file__).parent / "source", tmp_path / "source")
    (changed / "feed.cpp").write_text("// other\n")
    monkeypatch.setattr(native, "_SOURCES", changed)
    seen.add(path())
    monkeypatch.setattr("platform.machine", lambda: "of another kind, in the same home")
    seen.add(path())
    assert len(seen) == (5 if tiers()[-1] != "portable" else 4)


def test_a_file_that_others_can_write_is_not_loaded(quick: Path, tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert isinstance(plan, Planned)
    plan.path.write_text("planted")
    plan.path.chmod(0o666)
    assert not plan.is_there
    assert built(tmp_path) == Built(plan.path, plan.tier)
    assert plan.path.read_bytes() != b"planted"
    assert plan.is_there


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:50],
        lambda content: content[:10] + bytes(4) + content[14:],
        lambda content: b"",
        lambda content: b"another library",
    ],
    ids=["truncated", "zeros", "empty", "another"],
)
def test_a_file_that_is_not_whole_is_made_anew(
    quick: Path, tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    """Loading it would end the process, at every start."""
    first = built(tmp_path)
    assert isinstance(first, Built)
    first.path.write_bytes(harm(first.path.read_bytes()))
    plan = planned(tmp_path)
    assert isinstance(plan, Planned)
    assert not plan.is_there
    assert built(tmp_path) == first
    assert plan.is_there


def test_where_nothing_can_be_kept_kernels_are_compiled_for_the_process(quick: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = built(tmp_path / "file" / "native")
    assert isinstance(found, Built)
    assert found.path.exists()
    assert not found.kept
    assert not found.path.is_relative_to(tmp_path)
    found.path.unlink()


def test_without_a_compiler_the_reason_is_told(
    wanted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = built(tmp_path)
    assert found == Missing("there is no C++ compiler", "install g++ or clang++")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\necho 'x.cpp:1: error: no such header' >&2\nexit 1\n", "x.cpp:1: error: no such header"),
        ("#!/bin/sh\nexit 3\n", "exit code 3"),
        ("#!/bin/sh\nprintf '\\033[31mred\\a\\n' >&2\nexit 1\n", "([31mred)"),
    ],
)
def test_a_compiler_that_fails_is_told(quick: Path, tmp_path: Path, script: str, reason: str) -> None:
    quick.write_text(script)
    found = built(tmp_path)
    assert isinstance(found, Missing)
    assert reason in found.reason
    assert "\n" not in found.reason


@pytest.mark.parametrize(
    "script",
    [
        "no program",
        "#!/there/is/none\n",
        "#!/bin/sh\ncase $* in *--version*) exec sleep 20;; esac\n",
    ],
    ids=["no program", "no interpreter", "says nothing"],
)
def test_a_compiler_that_cannot_be_asked_is_told(
    quick: Path, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_TELLS", 0.3)
    monkeypatch.setenv("PATH", f"{quick.parent}:/bin:/usr/bin")
    monkeypatch.setenv("CXX", str(quick))
    quick.write_text(script)
    found = built(tmp_path)
    assert isinstance(found, Missing)
    assert "does not say its version" in found.reason
    assert "CXX" in found.remedy


@pytest.mark.parametrize(
    ("chosen", "arguments"),
    [
        ("ccache g++", []),
        ("g++ -m64 --sysroot='/some where'", ["-m64", "--sysroot=/some where"]),
        ("{bin}/a path/g++", []),
        ("'{bin}/a path/g++' -m64", ["-m64"]),
        ("no-such-compiler -m64", []),
        ("g++ 'open", []),
    ],
)
def test_the_chosen_compiler_may_have_a_launcher_arguments_and_blanks(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, arguments: list[str]
) -> None:
    (quick.parent / "a path").mkdir()
    shutil.copy(quick, quick.parent / "a path" / "g++")
    launcher = quick.with_name("ccache")
    launcher.write_text('#!/bin/sh\n[ "$1" = g++ ] || exit 1\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", chosen.format(bin=quick.parent))
    found = built(tmp_path / "kept")
    assert isinstance(found, Built)
    assert found.tier == tiers()[-1]
    linked = found.path.read_text(errors="replace")
    assert all(argument in linked for argument in arguments)
    assert ("-m64" in linked) == ("-m64" in arguments)


@pytest.fixture
def portable() -> bytes:
    """Kernels of a compiler that is one; who wants ``quick`` too asks for them first."""
    kernels_of("portable")
    made = compiled("portable")
    assert isinstance(made, Built)
    return made.path.read_bytes()


def test_what_the_cache_holds_and_cannot_be_loaded_is_compiled_for_the_process(
    portable: bytes, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder from which nothing may run."""
    monkeypatch.setenv(VARIABLE, "portable")
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    found = library.found.__wrapped__()
    assert isinstance(found, Missing)
    assert "\n" not in found.reason
    assert str(tmp_path / "cache") not in found.reason, "the last try was elsewhere"
    assert found.remedy.startswith("set CONSILIUM_CACHE to a folder")
    (tmp_path / "portable.so").write_bytes(portable)
    copies = f"pathlib.Path({str(tmp_path / 'portable.so')!r}).read_bytes()"
    script = quick.read_text().replace("write_text(' '.join(sys.argv))", f"write_bytes({copies})")
    quick.write_text(script)
    found = library.found.__wrapped__()
    assert isinstance(found, Kernels)
    assert found.tier == "portable"


def test_a_disk_without_room_leaves_torch_to_compute(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    found = library.found.__wrapped__()
    assert isinstance(found, Missing)
    assert "No space left on device" in found.reason


def test_a_compiler_older_than_the_processor_makes_a_lower_tier(quick: Path, tmp_path: Path) -> None:
    quick.write_text(
        quick.read_text().replace(
            "pathlib.Path(", "if '-mavx2' in sys.argv: sys.exit('unknown -mavx2')\npathlib.Path(", 1
        )
    )
    found = built(tmp_path)
    assert isinstance(found, Built)
    assert found.tier == "portable"


def test_a_tier_that_was_asked_for_is_no_other(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, HERE[-1])
    quick.write_text("#!/bin/sh\necho 'unknown flag' >&2\nexit 1\n")
    found = built(tmp_path)
    assert isinstance(found, Missing)
    assert "unknown flag" in found.reason


def test_they_can_be_switched_off(wanted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert built() == Missing(f"{VARIABLE} is off", f"unset {VARIABLE}")


def test_an_unknown_tier_is_refused_with_the_nearest(wanted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "portble")
    with pytest.raises(ConsiliumError, match=r"CONSILIUM_NATIVE=portble.*portable"):
        built()


def test_a_tier_that_the_processor_lacks_is_refused(wanted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv(VARIABLE, "avx512")
    with pytest.raises(ConsiliumError, match="no such kernels run on this processor"):
        built()


@pytest.mark.parametrize(
    ("capability", "found", "fastest"),
    [
        ("DEFAULT", set(), "portable"),
        ("AVX2", {"avx512_vnni"}, "avx2"),
        ("AVX512", set(), "avx2"),
        ("AVX512", {"avx512_vnni"}, "avx512"),
        ("AVX512", {"avx512_vnni", "amx_tile"}, "avx512"),
        ("AVX512", {"avx512_bf16"}, "avx2"),
        ("AVX512", {"avx512_vnni", "avx512_bf16"}, "avx512bf16"),
    ],
)
def test_the_fastest_tier_is_one_whose_every_instruction_is_here(
    monkeypatch: pytest.MonkeyPatch, capability: str, found: set[str], fastest: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(native, "instructions", lambda: found)
    monkeypatch.setattr(amx, "instructions", lambda: found)
    permitted.cache_clear()
    try:
        assert tiers()[-1] == fastest
    finally:
        permitted.cache_clear()


def test_processes_that_start_together_all_get_kernels(quick: Path, tmp_path: Path) -> None:
    found: list[Built | Missing] = []
    starters = [threading.Thread(target=lambda: found.append(built(tmp_path))) for _ in range(6)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert len(set(found)) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".lock", ".so"]
