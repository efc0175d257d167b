"""The compiled kernels: made with the system's compiler on first use, kept in the user's cache.

Sources have a plain C interface and no headers of torch, so that they compile in seconds. The name of the
compiled file is a hash of the sources, the compiler and its flags; who finds it there compiles nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import torch

from consilium.disk.atomic import write_file
from consilium.disk.files import cache_folder
from consilium.disk.lock import held
from consilium.errors import ConsiliumError, nearest
from consilium.machine.amx import permitted
from consilium.machine.processors import instructions, threads

Tier = Literal["portable", "avx2", "avx512", "avx512bf16", "amx"]

_AVX2: Final = ("-mavx2", "-mfma", "-mf16c")
_AVX512: Final = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")))
_BF16: Final = (*_AVX512, "-mavx512bf16")
_AMX: Final = (*_BF16, "-mamx-tile", "-mamx-bf16")
FLAGS: Final[Mapping[Tier, tuple[str, ...]]] = MappingProxyType(
    {"portable": (), "avx2": _AVX2, "avx512": _AVX512, "avx512bf16": _BF16, "amx": _AMX}
)
"""From the slowest tier to the fastest. What a compiler makes of ``portable`` runs on every machine of its
kind, with NEON's vectors where the processor is an ARM."""
_COMMON: Final = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno")
_SOURCES: Final = Path(__file__).parent / "source"
_COMPILERS: Final = ("g++", "clang++", "c++")
_SECONDS: Final = 300
"""A compiler that takes longer is not waited for."""
_TELLS: Final = 20
"""Seconds in which it says its version."""
_DIGEST: Final = 32
"""Bytes behind what was compiled that say whether it is whole; whoever loads a library does not read them."""
VARIABLE: Final = "CONSILIUM_NATIVE"
"""``off``, or the name of a tier; unset is the fastest that runs here."""


@dataclass(frozen=True, slots=True)
class Planned:
    """Where the kernels of this machine belong, and what makes them."""

    path: Path
    tier: Tier
    command: tuple[str, ...]

    @property
    def is_there(self) -> bool:
        """Whether the file is there and whole, and nobody else could have written it: it becomes our code."""
        try:
            found, content = self.path.stat(), self.path.read_bytes()
        except OSError:
            return False
        whole = _digest(content[:-_DIGEST]) == content[-_DIGEST:]
        return whole and found.st_uid == os.getuid() and not found.st_mode & 0o022


@dataclass(frozen=True, slots=True)
class Built:
    path: Path
    tier: Tier
    kept: bool = True
    """False: who loads the file takes it away."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Why there are no kernels, as half a sentence, and what helps."""

    reason: str
    remedy: str


def tiers() -> tuple[Tier, ...]:
    """Return those that run on this processor, the fastest last."""
    names = tuple(FLAGS)
    return names[: names.index(_fastest()) + 1]


def _fastest() -> Tier:
    match torch.backends.cpu.get_cpu_capability():
        case "AVX512" if "avx512_vnni" in instructions() and permitted():
            return "amx"
        case "AVX512" if "avx512_vnni" in instructions():
            return "avx512bf16" if "avx512_bf16" in instructions() else "avx512"
        case "AVX512" | "AVX2":
            return "avx2"
        case _:
            return "portable"


def planned(folder: Path | None = None) -> Planned | Missing:
    """Say which kernels this process will use, without compiling; by default in the user's cache.

    Raises ConsiliumError for a value of CONSILIUM_NATIVE that means nothing here.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked == "off":
        return Missing(f"{VARIABLE} is off", f"unset {VARIABLE}")
    wanted, compiler = _tiers(asked), _compiler()
    if compiler is None or os.name != "posix":
        return Missing("there is no C++ compiler", "install g++ or clang++")
    tier = _taken(compiler, wanted)
    command = (*compiler, *_COMMON, *FLAGS[tier])
    try:
        key = _key(compiler, command)
    except (OSError, subprocess.TimeoutExpired) as error:
        remedy = f"set CXX to a compiler that runs, or {VARIABLE}=off"
        return Missing(f"{compiler[0]} does not say its version ({type(error).__name__})", remedy)
    return Planned((folder or cache_folder() / "native") / f"{key}.so", tier, command)


def built(folder: Path | None = None) -> Built | Missing:
    """Find the compiled kernels, or compile them: in seconds, once a machine.

    Where nothing can be written they are compiled for this process alone. Raises ConsiliumError as
    ``planned`` does.
    """
    plan = planned(folder)
    if isinstance(plan, Missing):
        return plan
    if plan.is_there:
        return Built(plan.path, plan.tier)
    try:
        with held(plan.path.with_suffix(".lock"), busy="kernels are being compiled", wait=_SECONDS):
            return Built(plan.path, plan.tier) if plan.is_there else _made(plan, keep=True)
    except ConsiliumError:
        return _made(plan, keep=False)


def built_alone() -> Built | Missing:
    """Compile them for this process, whatever the cache holds. Raises as ``built`` does, and OSError."""
    plan = planned()
    return plan if isinstance(plan, Missing) else _made(plan, keep=False)


def _made(plan: Planned, *, keep: bool) -> Built | Missing:
    """Compile, and put what is made into the cache or into a file of this process."""
    with tempfile.TemporaryDirectory(prefix="consilium-native-") as work:
        made = Path(work) / plan.path.name
        if (reason := _compile(plan.command, made)) is not None:
            return Missing(reason, f"set {VARIABLE}=off to be told no more")
        content = made.read_bytes()
    if keep:
        with contextlib.suppress(ConsiliumError):
            write_file(plan.path, content + _digest(content))
            plan.path.chmod(0o644)
            return Built(plan.path, plan.tier)
    descriptor, name = tempfile.mkstemp(prefix="consilium-native-", suffix=".so")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return Built(Path(name), plan.tier, kept=False)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _tiers(asked: str) -> tuple[Tier, ...]:
    """The one that is asked for, or all that run here, the fastest first."""
    here = tiers()[::-1]
    wanted: tuple[Tier, ...] = tuple(tier for tier in here if asked in ("", tier))
    if wanted:
        return wanted
    raise ConsiliumError(
        f"{VARIABLE}={asked}: no such kernels run on this processor.{nearest(asked, ('off', *here))}"
    )


def _compiler() -> tuple[str, ...] | None:
    """The compiler's program and its own arguments: CXX may be ``ccache g++`` or ``g++ --sysroot=...``."""
    for name, *arguments in filter(None, (_chosen(), *((name,) for name in _COMPILERS))):
        if (path := shutil.which(name)) is not None:
            return path, *arguments
    return None


def _chosen() -> Sequence[str]:
    """The words of CXX as a shell reads them, unless all of it is a path with blanks."""
    chosen = os.environ.get("CXX", "")
    if shutil.which(chosen) is not None:
        return (chosen,)
    try:
        return shlex.split(chosen)
    except ValueError:  # a quotation mark without its other half
        return ()


def _taken(compiler: tuple[str, ...], wanted: tuple[Tier, ...]) -> Tier:
    for tier in wanted:
        if _takes((*compiler, *FLAGS[tier])):
            return tier
    return wanted[-1]


@functools.cache
def _takes(command: tuple[str, ...]) -> bool:
    """Whether the compiler knows the flags: one that is older than the processor makes a lower tier."""
    return _run((*command, "-E", "-x", "c++", os.devnull, "-o", os.devnull)) is None


def _key(compiler: tuple[str, ...], command: tuple[str, ...]) -> str:
    """The hash of all that decides what the compiler makes: machines may share a home."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False, timeout=_TELLS)  # noqa: S603 - the compiler that the user has
    made_for = (command, version.stdout, sys.platform, platform.machine())
    digest = hashlib.sha256(repr(made_for).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:32]


def _compile(command: tuple[str, ...], made: Path) -> str | None:
    """Compile all sources beside each other, and link them into ``made``; why it failed, or None."""
    sources = sorted(_SOURCES.glob("*.cpp"))
    objects = [str(made.with_name(f"{source.stem}.o")) for source in sources]
    commands = [
        (*command, "-c", str(source), "-o", compiled)
        for source, compiled in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(threads()) as pool:
        reasons = [reason for reason in pool.map(_run, commands) if reason is not None]
    return reasons[0] if reasons else _run((*command, *objects, "-o", str(made)))


def _run(command: tuple[str, ...]) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - the same
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} did not run to its end ({type(error).__name__})"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    told = "".join(character for character in lines[0] if character.isprintable())[:200]
    return f"{command[0]} cannot compile the kernels ({told})"
