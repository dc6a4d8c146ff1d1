"""Sharded tensors saved by some ranks and loaded by others: how many bytes come over the line for those needed."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from bench_dcp.backends import BACKENDS, calls
from bench_dcp.line import take_count
from bench_dcp.states import filled

Layout = tuple[tuple[int, ...], Sequence[Placement]]
"""Shape of the device mesh, and what each of its dimensions does to a matrix."""

_SHAPES = {"q": (2048, 2048), "k": (512, 2048), "up": (8192, 2048), "down": (2048, 8192)}
"""Of one layer of a model with 1B parameters, in fp32: 148 MiB."""
KINDS = ("row", "column", "2-D")
_GRIDS = {4: (2, 2), 3: (3, 1), 8: (2, 4)}


def run(direction: str, world: int, backends: Sequence[str], root: str, counter_url: str) -> dict[str, Any]:
    """Saves or loads each kind of sharding with each backend on `world` ranks.

    Returns:
        For a load, figures by kind and backend: bytes that all ranks needed, bytes and answers that came.
    """
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (meeting, direction, world, tuple(backends), root, counter_url)
        mp.start_processes(_rank, arguments, nprocs=world, start_method="spawn")
        result: dict[str, Any] = torch.load(Path(meeting, "figures.pt"))
    return result


def _rank(
    rank: int, meeting: str, direction: str, world: int, backends: tuple[str, ...], root: str, counter_url: str
) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=world)
    figures: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        layout = _layout(kind, world)
        for backend in backends:
            url = f"{root}/{kind}/{backend}"
            if direction == "save":
                calls(backend).save(_state(layout), storage_writer=BACKENDS[backend](url)[0])
            else:
                figures.setdefault(kind, {})[backend] = _load(layout, backend, url, counter_url)
    if rank == 0:
        torch.save(figures, f"{meeting}/figures.pt")
    dist.barrier()
    # gloo's threads may abort a rank that exits while its peers still close their sockets.
    os._exit(0)


def _load(layout: Layout, backend: str, url: str, counter_url: str) -> dict[str, float]:
    expected = _state(layout)
    state = {name: torch.zeros_like(value) for name, value in expected.items()}
    _, reader = BACKENDS[backend](url)
    if dist.get_rank() == 0:
        take_count(counter_url)
    dist.barrier()
    calls(backend).load(state, storage_reader=reader)
    dist.barrier()
    fetched, requests = take_count(counter_url) if dist.get_rank() == 0 else (0, 0)
    for name, value in state.items():
        if not torch.equal(value.to_local(), expected[name].to_local()):
            raise SystemExit(f"{backend} loaded a wrong {name}")
    needed = torch.tensor(sum(v.to_local().numel() * v.to_local().element_size() for v in state.values()))
    dist.all_reduce(needed)
    return {"needed": float(needed), "fetched": float(fetched), "requests": float(requests)}


def _state(layout: Layout) -> dict[str, DTensor]:
    grid, placements = layout
    mesh = init_device_mesh("cpu", grid)
    return {
        name: distribute_tensor(filled(name, shape), mesh, placements, src_data_rank=None)
        for name, shape in _SHAPES.items()
    }


def _layout(kind: str, world: int) -> Layout:
    if kind == "2-D":
        return _GRIDS[world], (Shard(0), Shard(1))
    return (world,), (Shard(0 if kind == "row" else 1),)
