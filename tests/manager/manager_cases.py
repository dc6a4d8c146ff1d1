"""What ranks do with a manager; importable, since ranks are spawned."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ckpt_cloud
from ckpt_cloud import bridge
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url


def sharded(value):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"w": distribute_tensor(torch.full((37, 3), float(value)), mesh, [Shard(0)]), "n": value}


def value_of(state):
    whole = state["w"].full_tensor() if isinstance(state["w"], DTensor) else state["w"]
    assert whole.eq(state["n"]).all()
    return state["n"]


def lifetime(root, traces):
    """Saves, loads and asks; every rank must see the same."""
    seen = []
    with ckpt_cloud.CheckpointManager(root, keep=ckpt_cloud.LastN(2), trace_dir=traces, when_busy="skip") as manager:
        seen.append(manager.restore(sharded(0)))
        for step in (1, 2, 3):
            manager.save(step, sharded(step), {"loss": float(dist.get_rank() + step)})
        manager.async_save(4, sharded(4), {"loss": 0.5})
        manager.wait()
        seen += [manager.latest(), manager.best("loss"), manager.metrics(3), manager.should_stop()]
    with ckpt_cloud.CheckpointManager(root, read_only=True) as manager:
        state = sharded(0)
        seen += [manager.restore(state), value_of(state), manager.all_steps()]
        try:
            manager.restore(state, step=77)
        except ckpt_cloud.CkptCloudError as error:
            seen.append((type(error).__name__, str(error)))
    try:
        manager.latest()
    except ckpt_cloud.CkptCloudError as error:
        seen.append((type(error).__name__, str(error)))
    return seen


def fall_back(root):
    """The newest is damaged in the part that one rank alone reads: all go back together."""
    with ckpt_cloud.CheckpointManager(root) as manager:
        for step in (1, 2):
            manager.save(step, sharded(step))
        if dist.get_rank() == 0:
            bridge.run(_damage_last(f"{root}/step-2"))
        dist.barrier()
        state = sharded(0)
        return manager.restore(state), value_of(state), [step for step, _ in manager.skipped]


async def _damage_last(url):
    store = open_store(parse_url(url), StoreOptions())
    key = max([info.key async for info in store.list() if info.key.endswith("safetensors")])
    data, _ = await store.get(key, limit=1 << 20)
    await store.put(key, data[:-1] + bytes([data[-1] ^ 0x80]))


def one_is_told_to_stop(root):
    with ckpt_cloud.CheckpointManager(root, sigterm_grace_s=60) as manager:
        before = manager.should_stop()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before, manager.should_stop()


def refused(root):
    """The check fails on the first rank, which alone asks; all are told."""
    try:
        ckpt_cloud.CheckpointManager(root)
    except ckpt_cloud.CkptCloudError as error:
        return type(error).__name__
    return None


def saves_when_due(root):
    """Steps of which every third is due, one because rank 0's clock says so, and one for a signal."""
    often = ckpt_cloud.SaveEveryNSteps(3) | ckpt_cloud.SaveOnPreemption() | ckpt_cloud.SaveEveryT(timedelta(hours=1))
    saved = []
    with ckpt_cloud.CheckpointManager(root, save_when=often, sigterm_grace_s=600) as manager:
        for step in range(1, 10):
            if step == 2 and dist.get_rank() == 0:
                manager._schedule._since -= 3601
            if step == 5 and dist.get_rank() == 1:
                manager._schedule._since -= 3601  # its clock does not count
            if (step, dist.get_rank()) in {(6, 1), (8, 0)}:
                os.kill(os.getpid(), signal.SIGTERM)
            if manager.should_save(step):
                manager.save(step, sharded(step))
                saved.append(step)
        return saved, manager.all_steps()
