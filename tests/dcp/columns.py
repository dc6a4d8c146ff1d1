"""Matrices sharded by columns; what ranks do in test_columns.py."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, TransferOptions

WHOLE = torch.arange(1024 * 4096, dtype=torch.float32).view(1024, 4096)
"""16 MiB, of which each of four ranks has 4 MiB."""


def state(fill=True, placements=None):
    placements = placements or (Shard(1),)
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,) if len(placements) == 1 else (2, world // 2))
    return {"w": distribute_tensor(WHOLE.clone() if fill else torch.zeros_like(WHOLE), mesh, placements)}


def save(url, column_chunks=4):
    transfer = TransferOptions(column_chunks=column_chunks)
    ckpt_cloud.save(state(), storage_writer=ObjectStoreWriter(url, transfer=transfer))


def load(url):
    """Whether the columns came, bytes that were needed, and bytes that were moved."""
    loaded = state(fill=False)
    reader = ObjectStoreReader(url)
    ckpt_cloud.load(loaded, storage_reader=reader)
    right = torch.equal(loaded["w"].to_local(), state()["w"].to_local())
    return right, reader.report.bytes_needed, reader.report.bytes_moved


def each_way(root):
    """Saves by columns and by both dimensions, loads into each kind; what came back wrong."""
    kinds = [(Shard(0),), (Shard(1),), (Shard(0), Shard(1)), (Shard(1), Shard(0))]
    wrong = []
    for number, placements in enumerate(kinds):
        ckpt_cloud.save(state(placements=placements), checkpoint_id=f"{root}/{number}")
        for others in kinds:
            loaded = state(fill=False, placements=others)
            ckpt_cloud.load(loaded, checkpoint_id=f"{root}/{number}")
            if not torch.equal(loaded["w"].full_tensor(), WHOLE):
                wrong.append((placements, others))
    return wrong


def each_for_itself(url):
    """Saves and loads without coordination: into the very same shards, which therefore stay whole."""
    ckpt_cloud.save(state(), checkpoint_id=url, use_collectives=False)
    loaded = state(fill=False)
    ckpt_cloud.load(loaded, checkpoint_id=url)
    return torch.equal(loaded["w"].to_local(), state()["w"].to_local())
