"""How a process joins the others: by what torchrun, or our own launcher, put into its environment."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous

from consilium.errors import ConsiliumError
from consilium.parallel.environment import STORE, is_launched, restarts, seconds
from consilium.parallel.group import Group
from consilium.parallel.mesh import ALONE, Mesh
from consilium.parallel.sharding import FullySharded
from consilium.parallel.topology import Topology
from consilium.parallel.watch import Watch


@contextlib.contextmanager
def joined(*, expert: int = 1, replicas: int = 1, device: str = "cpu") -> Iterator[Mesh]:
    """Join the processes of the environment and leave them at the end; alone where there is no launcher.

    Raises ConsiliumError for processes that cannot be dealt so, and PeerLost where one does not come in
    time.
    """
    if not is_launched():
        Topology.of(1, expert=expert, replicas=replicas)
        yield ALONE
        return
    limit = dt.timedelta(seconds=seconds())
    store, rank, world = _meeting(limit)
    with member(
        store, rank, Topology.of(world, expert=expert, replicas=replicas), device=device, limit=limit
    ) as mesh:
        yield mesh


def _meeting(limit: dt.timedelta) -> tuple[Store, int, int]:
    """Where the processes find each other, and this one's rank among how many."""
    if STORE in os.environ:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return FileStore(os.environ[STORE], world), rank, world
    store, rank, world = next(iter(rendezvous("env://", timeout=limit)))
    # The agent's store outlives a try, and with it addresses that nobody answers at any more.
    return PrefixStore(f"try-{restarts()}", store), rank, world


@contextlib.contextmanager
def member(
    store: Store, rank: int, topology: Topology, *, device: str = "cpu", limit: dt.timedelta
) -> Iterator[Mesh]:
    """Be process ``rank`` of ``topology``, whose processes meet in ``store``."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        raise ConsiliumError("this process has joined a group already; leave it before joining another.")
    backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    store.set_timeout(limit)
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank, world_size=topology.world, timeout=limit
    )
    try:
        yield _mesh(PrefixStore("watch", store), rank, topology, kind, limit)
    finally:
        if dist.is_initialized():  # else they were left when one was lost
            dist.destroy_process_group()


def _mesh(store: Store, rank: int, topology: Topology, device: str, limit: dt.timedelta) -> Mesh:
    """Every group is made by all processes in the same order, and used once before anything depends on it."""
    ranks_HDP = torch.arange(topology.world).view(topology.replicas, topology.data, topology.expert)
    ranks_HS = ranks_HDP.flatten(1)
    world, expert, replica, copies, data = (
        _group(rows, store, rank, limit)
        for rows in (
            ranks_HDP.view(1, -1),
            ranks_HDP.flatten(0, 1),
            ranks_HS,
            ranks_HS.t(),
            ranks_HDP.movedim(1, 2).flatten(0, 1),
        )
    )
    assert world.watch is not None
    assert replica.watch is not None
    world.watch.introduce()
    for group in (world, expert, replica):
        group.sum(torch.zeros(1))
    mine_HD = ranks_HDP[..., topology.place(rank)[2]]
    return Mesh(
        topology=topology,
        world=world,
        expert=expert,
        replica=replica,
        sharding=FullySharded(
            _device_mesh(device, ranks_HS, replica, copies),
            _device_mesh(device, mine_HD, data, copies),
            replica.watch,
        ),
    )


def _group(ranks_GP: torch.Tensor, store: Store, rank: int, limit: dt.timedelta) -> Group:
    """The group of this process among those that the rows list."""
    rows = [row.tolist() for row in ranks_GP]
    handle, _ = dist.new_subgroups_by_enumeration(rows, timeout=limit)
    assert isinstance(handle, ProcessGroup), "every process is in one of them"
    mine = next(row for row in rows if rank in row)
    watch = Watch(store, rank, tuple(mine), ranks_GP.numel())
    return Group(mine.index(rank), len(mine), handle, watch)


def _device_mesh(device: str, ranks_HS: torch.Tensor, shard: Group, copies: Group) -> DeviceMesh:
    assert shard.handle is not None
    assert copies.handle is not None
    if ranks_HS.shape[0] == 1:
        return DeviceMesh.from_group(shard.handle, device, mesh_dim_names=("shard",))
    handles = [copies.handle, shard.handle]
    return DeviceMesh.from_group(handles, device, mesh=ranks_HS, mesh_dim_names=("replicate", "shard"))
