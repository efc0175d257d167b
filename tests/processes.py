"""Several processes for a test: forked from one that has imported torch, over gloo on the CPU.

Each does the same work and gives named tensors back in a file; what one of them raises is the test's failure.
"""

from __future__ import annotations

import datetime as dt
import faulthandler
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from consilium.model.decoder import Decoder
from consilium.model.init import first_experts
from consilium.parallel.mesh import Mesh
from consilium.parallel.start import member
from consilium.parallel.topology import Topology

Work = Callable[[Mesh], Mapping[str, Tensor]]
LONGEST = 60.0


def together(topology: Topology, work: Work, *, seconds: float = LONGEST) -> list[dict[str, Tensor]]:
    """What ``work`` returned in each process, by rank. A process that hangs is a failure with its stack."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [forked(folder, rank, topology, work, seconds) for rank in range(topology.world)]
        codes = ended(children, seconds + 10)
        said = [path.read_text() for path in sorted(folder.glob("*.txt")) if path.stat().st_size]
        assert codes == [0] * topology.world, f"exit codes {codes}\n" + "\n".join(said)
        return [load_file(folder / f"{rank}.safetensors") for rank in range(topology.world)]


def forked_alone(topology: Topology, work: Work, *, lost: int, limit: float) -> None:
    """``together`` where process ``lost`` never ends well; collectives may take ``limit`` seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [
            forked(folder, rank, topology, work, LONGEST, limit=limit) for rank in range(topology.world)
        ]
        others = [child for rank, child in enumerate(children) if rank != lost]
        codes = ended(others, LONGEST)
        os.kill(children[lost], signal.SIGKILL)
        os.waitpid(children[lost], 0)
        said = [path.read_text() for path in sorted(folder.glob("*.txt")) if path.stat().st_size]
        assert codes == [0] * len(others), f"exit codes {codes}\n" + "\n".join(said)


def forked(
    folder: Path, rank: int, topology: Topology, work: Work, seconds: float, *, limit: float | None = None
) -> int:
    with warnings.catch_warnings():
        # Other threads of the test process do nothing that a child would wait for.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    with (folder / f"{rank}.txt").open("w") as log:
        try:
            faulthandler.dump_traceback_later(seconds, exit=True, file=log)
            torch.set_num_threads(1)
            store = dist.FileStore(str(folder / "store"), topology.world)
            with member(store, rank, topology, limit=dt.timedelta(seconds=limit or seconds / 2)) as mesh:
                found = {key: tensor.detach().clone() for key, tensor in work(mesh).items()}
            save_file(found, folder / f"{rank}.safetensors")
            code = 0
        except BaseException:  # noqa: BLE001 - the parent judges by the exit code
            log.write(f"rank {rank}:\n{traceback.format_exc()}")
        finally:
            log.flush()
            os._exit(code)


def ended(children: list[int], seconds: float) -> list[int]:
    """Exit codes; who still runs after ``seconds`` is killed."""
    until = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child in codes:
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


@torch.no_grad()
def fill(model: Decoder, whole: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Write this process's part of weights that are all in ``whole``; balance state is everybody's."""
    first = first_experts(model)
    for name, tensor in model.state_dict().items():
        part = mesh.sharding.part(tensor)
        begin = first.get(name, 0) + part.rows.start
        source = whole[name]
        part.here.copy_(source[begin : begin + len(part.rows)] if tensor.ndim else source)
