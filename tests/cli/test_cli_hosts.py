"""Two hosts: network namespaces joined by a cable, one process in each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import write_config, write_text

HOSTS = ("10.213.77.1", "10.213.77.2")


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts(delay: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Names of two namespaces; skipped with the reason where none can be made."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("ip and tc of iproute2 are not here")
    names = (f"consilium-a-{os.getpid()}", f"consilium-b-{os.getpid()}")
    cables = (f"va{os.getpid() % 10**6}", f"vb{os.getpid() % 10**6}")
    try:
        try:
            for name in names:
                run("ip", "netns", "add", name)
            ends = [["name", cable, "netns", name] for cable, name in zip(cables, names, strict=True)]
            run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for name, cable, address in zip(names, cables, HOSTS, strict=True):
                run("ip", "-n", name, "link", "set", "lo", "up")
                run("ip", "-n", name, "link", "set", cable, "name", "cable")
                run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
                run("ip", "-n", name, "link", "set", "cable", "up")
                if delay:
                    run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "cable", "root", *delay)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces with a delay here: {error.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "delete", name), check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [(), ("netem", "delay", "20ms")], ids=["a cable", "a cable of 20 ms"])
def test_two_hosts_train_one_run(delay: tuple[str, ...], tmp_path: Path) -> None:
    config, out = write_config(tmp_path, write_text(tmp_path / "text"), steps=20), tmp_path / "run"
    words = [sys.executable, "-m", "consilium", "train", str(config), "--out", str(out), "--ep", "2"]
    with two_hosts(delay) as names:
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_ADDR": HOSTS[0],
                    "MASTER_PORT": "29511",
                    "GLOO_SOCKET_IFNAME": "cable",
                    "CONSILIUM_TIMEOUT": "60",
                },
            )
            for rank, name in enumerate(names)
        ]
        said = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "done: 20 steps" in said[0]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 21))
