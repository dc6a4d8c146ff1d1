"""What ranks do in the tests of repositories; importable, since ranks are spawned."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ckpt_cloud
from ckpt_cloud import HuggingFaceWriter
from tests.interop.states import same

WHOLES = {
    "rows": torch.arange(101 * 30.0).view(101, 30),
    "columns": torch.arange(24 * 18).view(24, 18),
    "both": torch.arange(240).view(10, 6, 4).bfloat16(),
    "scalar": torch.tensor(2.5),
}


def save_sharded(url, options):
    """On real ranks: each tensor sharded in another way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "both": [Shard(0)], "scalar": [Replicate()]}
    state = {name: distribute_tensor(WHOLES[name].clone(), mesh, placements[name]) for name in WHOLES}
    dcp.save(state, storage_writer=HuggingFaceWriter(url, **options))


def load_sharded(url):
    """On other ranks, sharded otherwise; whether it came back right."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"rows": [Shard(1)], "columns": [Shard(0)], "both": [Shard(2)], "scalar": [Replicate()]}
    state = {name: distribute_tensor(torch.zeros_like(WHOLES[name]), mesh, placements[name]) for name in WHOLES}
    ckpt_cloud.load(state, checkpoint_id=url)
    return same({name: value.full_tensor() for name, value in state.items()}, WHOLES)
