"""One model under every kind of parallelism; what ranks do in test_layouts.py."""

import torch
import torch.distributed as dist
from cases import same
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec, EnumerableShardingSpec, ShardMetadata
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader
from ckpt_cloud.errors import CkptCloudError, StateMismatch


class Net(torch.nn.Module):
    """Two blocks; the sizes divide where tensor parallelism needs it and nowhere else."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(13, 8)
        self.up = torch.nn.Linear(8, 12)
        self.down = torch.nn.Linear(12, 8, bias=False)
        self.norm = torch.nn.LayerNorm(8)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))

    def forward(self, tokens):
        hidden = self.embed(tokens)
        return self.norm(hidden + self.down(torch.relu(self.up(hidden))))


TENSOR_PARALLEL = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def _fully_sharded(model, mesh):
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrapped(layout, model):
    """The model under the layout, on all ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    pairs = (2, world // 2)
    if layout == "plain":
        return model
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if layout == "fsdp1 flat":
        return FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    if layout == "fsdp2":
        return _fully_sharded(model, init_device_mesh("cpu", (world,)))
    if layout == "hsdp":
        return _fully_sharded(model, init_device_mesh("cpu", pairs, mesh_dim_names=("replicate", "shard")))
    if layout == "tp":
        return parallelize_module(model, init_device_mesh("cpu", (world,)), TENSOR_PARALLEL)
    assert layout == "2-D"
    mesh = init_device_mesh("cpu", pairs, mesh_dim_names=("dp", "tp"))
    return _fully_sharded(parallelize_module(model, mesh["tp"], TENSOR_PARALLEL), mesh["dp"])


def trained(layout, seed, steps):
    torch.manual_seed(seed)
    model = wrapped(layout, Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed)
    for step in range(steps):
        model(torch.arange(6) + step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def whole(model, optimizer):
    """All of it, on rank 0 at least."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {name: gathered(leaf) for name, leaf in flat({"model": model_state, "optimizer": optimizer_state}).items()}


def gathered(value):
    # Not by `full_state_dict`: for FSDP1 on CPUs that ends in a segmentation fault of torch's.
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, ShardedTensor):
        out = torch.empty(value.size(), dtype=value.dtype) if dist.get_rank() == 0 else None
        value.gather(dst=0, out=out)
        return out
    return value.clone() if isinstance(value, torch.Tensor) else value


def flat(value, path=""):
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in flat(inner, f"{path}.{key}").items()}
    # DCP makes lists of tuples on some of its ways.
    if isinstance(value, list | tuple):
        return {name: leaf for key, inner in enumerate(value) for name, leaf in flat(inner, f"{path}.{key}").items()}
    return {path: value}


def save_layout(layout, url, seed=1):
    """Gives the whole state as it was."""
    model, optimizer = trained(layout, seed, steps=3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    ckpt_cloud.save({"model": model_state, "optimizer": optimizer_state, "step": 3}, checkpoint_id=url)
    return whole(model, optimizer)


def load_into(model, optimizer, url):
    """Gives the whole state after the load."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    ckpt_cloud.load(state, checkpoint_id=url, strict=True)
    assert state["step"] == 3
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return whole(model, optimizer)


def save_all(layouts, root):
    return {layout: save_layout(layout, f"{root}/{number}", seed=number + 1) for number, layout in enumerate(layouts)}


def load_all(layouts, root, saved):
    """Loads each of the checkpoints into each of the layouts; gives those that came back otherwise."""
    wrong = []
    for layout in layouts:
        model, optimizer = trained(layout, seed=9, steps=1)
        for number, (origin, state) in enumerate(saved.items()):
            got = load_into(model, optimizer, f"{root}/{number}")
            if (not dist.is_initialized() or dist.get_rank() == 0) and not same(got, state):
                wrong.append((origin, layout, sorted(k for k in {*got, *state} if k not in got or k not in state)))
    return wrong


def error_of(call):
    try:
        call()
    except CkptCloudError as error:
        return error
    return None


LAYERS = 8


def stage(rank, world, fill):
    """A pipeline stage: its own layers and nobody else's, an optimizer of its own, and what all stages have."""
    mine = range(rank * LAYERS // world, (rank + 1) * LAYERS // world)
    layers = {str(n): {"weight": torch.full((3, n + 1), float(fill * n)), "bias": torch.full((2,), n)} for n in mine}
    moments = {f"layers.{n}": {"exp_avg": torch.full((3, n + 1), fill + n / 7), "step": fill * n} for n in mine}
    return {"layers": layers, "optimizer": moments, "tokens": 5 * fill}


def save_stages(url):
    ckpt_cloud.save(stage(dist.get_rank(), dist.get_world_size(), 1), checkpoint_id=url)


def load_stages(url):
    """All that went wrong, loading on as many stages as there are ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    state = stage(rank, world, 0)
    result = ckpt_cloud.load(state, checkpoint_id=url, strict=True)
    wrong = [] if same(flat(state), flat(stage(rank, world, 1))) else ["values"]
    wrong += [result] if result != ckpt_cloud.LoadResult() else []
    # What one stage alone lacks is told to all, and what another stage takes is not unexpected.
    more = stage(rank, world, 0)
    if rank == world - 1:
        more["layers"]["99"] = {"weight": torch.zeros(1)}
    refused = error_of(lambda: ckpt_cloud.load(more, checkpoint_id=url, strict=True))
    if not isinstance(refused, StateMismatch) or refused.missing_keys != ("layers.99.weight",):
        wrong.append(repr(refused))
    elif refused.unexpected_keys:
        wrong.append(refused.unexpected_keys)
    return wrong


ROWS = 11
TABLE = torch.arange(ROWS * 6, dtype=torch.float32).view(ROWS, 6)


def _by_rows(bounds):
    """Rows cut anywhere: `bounds` has a (rank, first, last) for each shard."""
    return EnumerableShardingSpec(
        [
            ShardMetadata(shard_offsets=[first, 0], shard_sizes=[last - first, 6], placement=f"rank:{rank}/cpu")
            for rank, first, last in bounds
        ]
    )


def specs():
    world = dist.get_world_size()
    last = world - 1
    return {
        "chunks of rows": ChunkShardingSpec(0, [f"rank:{rank}/cpu" for rank in range(world)]),
        "chunks of columns": ChunkShardingSpec(1, [f"rank:{rank}/cpu" for rank in range(world)]),
        "uneven": _by_rows([(0, 0, 1), (last, 1, ROWS)]),
        "several of a rank": _by_rows([(0, 0, 3), (last, 3, 4), (0, 4, 9), (last, 9, ROWS)]),
    }


def part(shard):
    """What the table has where the shard is."""
    return tuple(
        slice(offset, offset + size)
        for offset, size in zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
    )


def sharded(spec, fill):
    tensor = sharded_tensor.empty(spec, ROWS, 6)
    for shard in tensor.local_shards():
        shard.tensor.copy_(TABLE[part(shard)] if fill else torch.zeros(()))
    return tensor


def filled(tensor):
    """Whether this rank's shards hold what the table has there."""
    return all(torch.equal(shard.tensor, TABLE[part(shard)]) for shard in tensor.local_shards())


def save_sharded_tensors(root):
    for number, spec in enumerate(specs().values()):
        ckpt_cloud.save({"table": sharded(spec, fill=True)}, checkpoint_id=f"{root}/{number}")


def load_sharded_tensors(root):
    """Each into each, into a DTensor and into a plain tensor."""
    wrong = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for number in range(len(specs())):
        for name, spec in specs().items():
            state = {"table": sharded(spec, fill=False)}
            ckpt_cloud.load(state, checkpoint_id=f"{root}/{number}")
            if not isinstance(state["table"], ShardedTensor) or not filled(state["table"]):
                wrong.append((number, name))
        for placement in (Shard(0), Shard(1), Replicate()):
            state = {"table": distribute_tensor(torch.zeros(ROWS, 6), mesh, [placement])}
            ckpt_cloud.load(state, checkpoint_id=f"{root}/{number}")
            if not torch.equal(state["table"].full_tensor(), TABLE):
                wrong.append((number, placement))
    return wrong


def uneven_dtensors(root):
    """Fewer rows than ranks, none at all, and one dimension that two mesh dimensions share."""
    world = dist.get_world_size()
    flat_mesh, square = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    wholes = {"few": torch.arange(6.0).view(2, 3), "none": torch.empty(0, 5), "odd": torch.arange(35.0).view(7, 5)}
    layouts = [(flat_mesh, [Shard(0)]), (square, [Shard(0), Shard(0)]), (square, [Replicate(), Shard(1)])]
    wrong = []
    for number, (mesh, placements) in enumerate(layouts):
        state = {name: distribute_tensor(value.clone(), mesh, placements) for name, value in wholes.items()}
        ckpt_cloud.save(state, checkpoint_id=f"{root}/{number}")
        for other, others in layouts:
            got = {name: distribute_tensor(torch.full_like(v, -1), other, others) for name, v in wholes.items()}
            ckpt_cloud.load(got, checkpoint_id=f"{root}/{number}")
            wrong += [(number, name) for name, v in wholes.items() if not torch.equal(got[name].full_tensor(), v)]
    return wrong


def submesh(root):
    """A DTensor on some ranks only: the others have the key and no part of it."""
    world = dist.get_world_size()
    front, back = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("half", "within")), None
    rank = dist.get_rank()
    back = front["within"]
    value = torch.arange(9.0) + (0 if rank < world // 2 else 100)
    state = {f"half{rank // (world // 2)}": distribute_tensor(value, back, [Shard(0)])}
    ckpt_cloud.save(state, checkpoint_id=f"{root}/halves")
    got = {
        name: DTensor.from_local(torch.zeros_like(t.to_local()), back, [Shard(0)], shape=t.shape, stride=t.stride())
        for name, t in state.items()
    }
    ckpt_cloud.load(got, checkpoint_id=f"{root}/halves")
    return [name for name, t in got.items() if not torch.equal(t.full_tensor(), value)]


def legacy_optimizer(url):
    """FSDP1 with `ShardedTensor`s, its optimizer read by `load_sharded_optimizer_state_dict`."""
    model, optimizer = trained("fsdp1", seed=1, steps=3)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        state = {
            "model": model.state_dict(),
            "optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer),
        }
    kinds = {type(value) for value in state["model"].values()}
    ckpt_cloud.save(state, checkpoint_id=url)
    saved = whole(model, optimizer)

    other, other_optimizer = trained("fsdp1", seed=2, steps=1)
    with FullyShardedDataParallel.state_dict_type(other, StateDictType.SHARDED_STATE_DICT):
        model_state = other.state_dict()
        ckpt_cloud.load({"model": model_state}, checkpoint_id=url)
        other.load_state_dict(model_state)
        loaded = load_sharded_optimizer_state_dict(model_state, "optimizer", ObjectStoreReader(url))
        other_optimizer.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(other, other_optimizer, loaded["optimizer"])
        )
    return ShardedTensor in kinds, same(whole(other, other_optimizer), saved)
