"""Ways to call DCP that need ranks; what ranks do in test_executors.py and test_planners.py."""

import torch
import torch.distributed as dist
from layouts import error_of
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._checkpointer import _Checkpointer
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions, _ReplicationStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, TransferOptions

THREAD, PROCESS = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
WHOLE = torch.arange(33.0).view(11, 3)


def state(factor=1, dim=0, **more):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(WHOLE * factor, mesh, [Shard(dim)])
    return {"sharded": sharded, "plain": torch.full((5,), float(factor)), "step": factor, **more}


def holds(url, factor, dim=0, **more):
    got = state(0, dim, **{name: torch.zeros_like(value) for name, value in more.items()})
    ckpt_cloud.load(got, checkpoint_id=url, strict=True)
    return (
        torch.equal(got["sharded"].full_tensor(), WHOLE * factor)
        and bool(got["plain"].eq(factor).all())
        and got["step"] == factor
        and all(torch.equal(got[name], value) for name, value in more.items())
    )


def staged_saves(root, kind, stagers):
    """Two saves through each stager, changed as soon as they are staged."""
    kind = AsyncCheckpointerType[kind]
    group = dist.new_group(backend="gloo") if kind is THREAD else None
    wrong = []
    for name, options in stagers.items():
        stager = None if options is None else DefaultStager(StagingOptions(*options))
        for step in (1, 2):
            url = f"{root}/{name}-{step}"
            value = state(step)
            response = ckpt_cloud.async_save(
                value, checkpoint_id=url, process_group=group, async_checkpointer_type=kind, async_stager=stager
            )
            upload = response
            if isinstance(response, AsyncSaveResponse):
                response.staging_completion.result()
                upload = response.upload_completion
            value["sharded"].to_local().fill_(-1)
            value["plain"].fill_(-1)
            upload.result()
            wrong += [] if holds(url, step) else [(name, step)]
        if stager is not None:
            stager.close()
    return wrong


class Refusing(DefaultSavePlanner):
    """Cannot resolve anything on the last rank; importable in the process that saves."""

    def resolve_data(self, write_item):
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ValueError("only here")
        return super().resolve_data(write_item)


def failures_in_the_background(root, kind):
    """What the future of a failed save raises, and that the next save works all the same."""
    told = []
    for name, planner in (("failed", Refusing()), ("good", None), ("good", None)):
        future = ckpt_cloud.async_save(
            state(),
            checkpoint_id=f"{root}/{name}",
            planner=planner,
            async_checkpointer_type=AsyncCheckpointerType[kind],
        )
        error = error_of(future.result)
        told.append(error and (type(error).__name__, "only here" in str(error)))
    return [*told, holds(f"{root}/good", 1)]


def save_in_a_process(url, options):
    """The error's name and text, if there is one."""
    writer = ObjectStoreWriter(url, **options)
    error = error_of(ckpt_cloud.async_save(state(), storage_writer=writer, async_checkpointer_type=PROCESS).result)
    return error and (type(error).__name__, str(error))


def replicas(root):
    """DCP's stager that exchanges replicas between ranks saves what the partner had."""
    stager = _ReplicationStager(dist.group.WORLD, storage_dir=f"{root}/replicas")
    mine = {f"of rank {dist.get_rank()}": torch.full((3,), float(dist.get_rank()))}
    group = dist.new_group(backend="gloo")
    url = f"file://{root}/run/replicated"
    ckpt_cloud.async_save(mine, checkpoint_id=url, async_stager=stager, process_group=group).result()
    got = {name: torch.full((3,), -1.0) for name in mine}
    ckpt_cloud.load(got, checkpoint_id=url)
    return bool(got[f"of rank {dist.get_rank()}"].eq(dist.get_rank()).all())


def groups_at_once(root):
    """Two halves of the ranks save checkpoints of their own at the same time, and all together a third."""
    rank, world = dist.get_rank(), dist.get_world_size()
    halves = [dist.new_group(list(range(i, world, 2)), backend="gloo") for i in (0, 1)]
    everyone = dist.new_group(backend="gloo")
    half = halves[rank % 2]
    mine = {"half": torch.full((4,), float(rank % 2)), f"rank{rank}": torch.full((2,), float(rank))}
    pending = ckpt_cloud.async_save(state(7), checkpoint_id=f"{root}/all", process_group=everyone)
    ckpt_cloud.save(mine, checkpoint_id=f"{root}/half-{rank % 2}", process_group=half)
    got = {name: torch.full_like(value, -1) for name, value in mine.items()}
    result = ckpt_cloud.load(got, checkpoint_id=f"{root}/half-{rank % 2}", process_group=half, strict=True)
    pending.result()
    wrong = [name for name, value in mine.items() if not torch.equal(got[name], value)]
    wrong += [] if holds(f"{root}/all", 7) else ["all"]
    wrong += [] if result == ckpt_cloud.LoadResult() else [result]
    # One group's failure is not the other's.
    error = error_of(
        lambda: ckpt_cloud.save(
            mine,
            checkpoint_id=f"{root}/again-{rank % 2}",
            process_group=half,
            planner=Refusing() if rank % 2 else None,
        )
    )
    dist.barrier()
    return [*wrong, *([type(error).__name__] if (error is not None) != bool(rank % 2) else [])]


def cached_plans(root):
    """Saves with cached plans: other data, another sharding, keys that come and go, a failure, one rank's change."""
    rank = dist.get_rank()
    own = {f"rank{rank}": torch.full((2,), float(rank))} if rank == 1 else {}
    new = {"new": torch.ones(4)}
    # By number: factor, sharded dimension, what else is in the state.
    rounds = [(1, 0, {}), (2, 0, {}), (3, 1, {}), (4, 1, new), (5, 0, {}), (6, 0, own), (7, 0, own), (8, 0, {})]
    wrong = []
    for number, (factor, dim, more) in enumerate(rounds):
        planner = DefaultSavePlanner(enable_plan_caching=True)
        url = f"{root}/{number}"
        error = error_of(lambda: ckpt_cloud.save(state(factor, dim, **more), checkpoint_id=url, planner=planner))  # noqa: B023
        if error is not None:
            wrong.append((number, repr(error)))
        elif not holds(url, factor, dim, **more):
            wrong.append((number, "values"))
        if number == 1:
            ckpt_cloud.save(
                state(9), checkpoint_id=f"{root}/kept", planner=DefaultSavePlanner(enable_plan_caching=True)
            )
            refused = error_of(
                lambda: ckpt_cloud.save(
                    state(10), checkpoint_id=f"{root}/kept", planner=DefaultSavePlanner(enable_plan_caching=True)
                )
            )
            wrong += [] if type(refused).__name__ == "CheckpointExists" and holds(f"{root}/kept", 9) else [refused]
    return wrong


def deduplicated(root):
    """Where replicated tensors went: objects that rank 0 and the others wrote."""
    shares = {}
    for lowest in (False, True):
        writer = ObjectStoreWriter(f"{root}/{lowest}")
        replicated = {f"t{n}": torch.full((1000,), float(n)) for n in range(8)}
        ckpt_cloud.save(replicated, storage_writer=writer, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=lowest))
        got = {name: torch.zeros_like(value) for name, value in replicated.items()}
        ckpt_cloud.load(got, checkpoint_id=f"{root}/{lowest}")
        assert all(torch.equal(got[name], value) for name, value in replicated.items())
        shares[lowest] = writer.report.bytes_needed
    return shares


def checkpointer(root):
    """DCP's `_Checkpointer` on ranks, again and again with one writer and reader."""
    url = f"{root}/step"
    group = dist.new_group(backend="gloo")
    own = _Checkpointer(ObjectStoreWriter(url, overwrite=True), ObjectStoreReader(url), process_group=group)
    wrong = []
    for step in (1, 2):
        own.async_save(state(step)).result()
        got = state(0)
        own.load(got)
        if not torch.equal(got["sharded"].full_tensor(), WHOLE * step):
            wrong.append(step)
    return wrong


def keys_on_ranks(url):
    """`_load_state_dict_from_keys` makes the state on each rank."""
    ckpt_cloud.save({"model": {"a": state()["sharded"], "b": torch.ones(2)}, "step": 4}, checkpoint_id=url)
    some = dcp.state_dict_loader._load_state_dict_from_keys("model.a", storage_reader=ObjectStoreReader(url))
    every = dcp.state_dict_loader._load_state_dict_from_keys(storage_reader=ObjectStoreReader(url))
    return [
        *([] if [*some] == ["model"] and torch.equal(some["model"]["a"], WHOLE) else ["some"]),
        *([] if torch.equal(every["model"]["b"], torch.ones(2)) and every["step"] == 4 else ["every"]),
    ]


def _coded_state(mesh):
    rows = torch.arange(500 * 30.0).view(500, 30)
    return {
        "rows": distribute_tensor(rows, mesh, [Shard(0)]),
        "columns": distribute_tensor(rows.clone(), mesh, [Shard(1)]),
        "replica": torch.arange(9000),
        "step": 3,
    }


def coded_shards(url):
    """Compressed shards of each placement into each other; what differs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wrong = []
    for kind, options in {"zstd": {"compression": "zstd"}, "stream": {"extensions": [ZStandard()]}}.items():
        writer = ObjectStoreWriter(f"{url}/{kind}", transfer=TransferOptions(frame_size=4096), **options)
        ckpt_cloud.save(_coded_state(mesh), storage_writer=writer)
        for dim in (0, 1):
            state = {name: distribute_tensor(torch.zeros(500, 30), mesh, [Shard(dim)]) for name in ("rows", "columns")}
            state |= {"replica": torch.zeros(9000, dtype=torch.int64), "step": 0}
            ckpt_cloud.load(state, checkpoint_id=f"{url}/{kind}")
            whole = torch.arange(500 * 30.0).view(500, 30)
            wrong += [(kind, dim, n) for n in ("rows", "columns") if not torch.equal(state[n].full_tensor(), whole)]
            if state["step"] != 3 or not torch.equal(state["replica"], torch.arange(9000)):
                wrong.append((kind, dim))
    return wrong


def coded_save_in_a_process(url):
    """The writer is pickled into the process, with what it compresses by."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for kind, options in {"zstd": {"compression": "zstd"}, "stream": {"extensions": [ZStandard()]}}.items():
        ckpt_cloud.async_save(
            _coded_state(mesh),
            storage_writer=ObjectStoreWriter(f"{url}/{kind}", **options),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        ).result()
    state = {"rows": distribute_tensor(torch.zeros(500, 30), mesh, [Shard(0)])}
    ckpt_cloud.load(state, checkpoint_id=f"{url}/zstd")
    return torch.equal(state["rows"].full_tensor(), torch.arange(500 * 30.0).view(500, 30))
