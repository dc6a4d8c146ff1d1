"""What ranks do in the tests; importable, since ranks are spawned."""

import pickle

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter


class Net(torch.nn.Module):
    """Sizes that no world size divides."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(31, 13)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(13, 13) for _ in range(3))
        self.head = torch.nn.Linear(13, 31, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        return self.head(hidden) * self.scale


def trained(seed, steps):
    """A sharded model and its optimizer after a few steps."""
    torch.manual_seed(seed)
    model = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        model(torch.arange(8) + step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def full(state):
    """Whole tensors by path."""
    flat = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in full(value).items()}
        elif isinstance(value, DTensor):
            flat[key] = value.full_tensor()
        else:
            flat[key] = value
    return flat


def same(one, other):
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def save_fsdp(url):
    model, optimizer = trained(seed=1, steps=3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    ckpt_cloud.save({"model": model_state, "optimizer": optimizer_state, "step": 3}, checkpoint_id=url)
    return {"model": full(model_state), "optimizer": full(optimizer_state)}


def load_fsdp(url):
    model, optimizer = trained(seed=2, steps=1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    ckpt_cloud.load(state, checkpoint_id=url)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": full(model_state), "optimizer": full(optimizer_state), "step": state["step"]}


WHOLES = {
    "matrix": torch.arange(6 * 8, dtype=torch.float32).view(6, 8),
    "uneven": torch.arange(3 * 5, dtype=torch.float64).view(3, 5),
    "cube": torch.arange(4 * 6 * 8, dtype=torch.int32).view(4, 6, 8),
    "complex": torch.complex(torch.arange(40.0), -torch.arange(40.0)).view(8, 5),
}

MESHES = {
    "1-D": ((4,), [[Shard(0)], [Shard(1)], [Replicate()]]),
    "2-D": ((2, 2), [[Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(0)], [Shard(0), Shard(0)]]),
}


def distributed(mesh, placements, wholes):
    return {name: distribute_tensor(whole.clone(), mesh, placements) for name, whole in wholes.items()}


def every_placement(root):
    """Saves with each placement of each mesh, loads into every other one, and says which came back wrong."""
    wrong = []
    meshes = {name: init_device_mesh("cpu", shape) for name, (shape, _) in MESHES.items()}
    layouts = [(name, placements) for name, (_, all_placements) in MESHES.items() for placements in all_placements]
    for number, (mesh, placements) in enumerate(layouts):
        ckpt_cloud.save(distributed(meshes[mesh], placements, WHOLES), checkpoint_id=f"{root}/{number}")
    zeros = {name: torch.zeros_like(whole) for name, whole in WHOLES.items()}
    for number in range(len(layouts)):
        for mesh, placements in layouts:
            state = distributed(meshes[mesh], placements, zeros)
            ckpt_cloud.load(state, checkpoint_id=f"{root}/{number}")
            if not same(full(state), WHOLES):
                wrong.append((number, mesh, placements))
    return wrong


class FailingRank(DefaultSavePlanner):
    """Raises on one rank in the middle of writing."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def resolve_data(self, write_item):
        if dist.get_rank() == self.rank and write_item.index.fqn == "last":
            raise ValueError("only here")
        return super().resolve_data(write_item)


class FailingLoad(DefaultLoadPlanner):
    """Raises on rank 1 while reading."""

    def resolve_tensor(self, read_item):
        if dist.get_rank() == 1:
            raise ValueError("only here")
        return super().resolve_tensor(read_item)


def error_of(call):
    """Name and text of the error of ours that `call` raises."""
    try:
        call()
    except ckpt_cloud.CkptCloudError as error:
        return type(error).__name__, str(error)
    return None


def failures(root):
    """What every rank is told when something fails on one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = distribute_tensor(torch.arange(64.0), mesh, [Shard(0)])
    state = {"a": shard, "last": shard}
    told = {}
    told["missing"] = error_of(lambda: ckpt_cloud.load(state, checkpoint_id=f"{root}/none"))
    told["rank 1 write"] = error_of(
        lambda: ckpt_cloud.save(state, checkpoint_id=f"{root}/failed", planner=FailingRank(1))
    )
    ckpt_cloud.save(state, checkpoint_id=f"{root}/good")
    told["exists"] = error_of(lambda: ckpt_cloud.save(state, checkpoint_id=f"{root}/good"))
    told["rank 1 read"] = error_of(lambda: ckpt_cloud.load(state, checkpoint_id=f"{root}/good", planner=FailingLoad()))
    small = {"a": distribute_tensor(torch.zeros(4), mesh, [Shard(0)])}
    told["shape"] = error_of(lambda: ckpt_cloud.load(small, checkpoint_id=f"{root}/good"))
    told["bucket"] = error_of(lambda: ckpt_cloud.save(state, checkpoint_id="gopher://x/y"))
    return told


def other_calls(root):
    """Ways to call that need real ranks; returns the names of those that went wrong."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(20.0).view(10, 2)

    def state(value=whole):
        return {"t": distribute_tensor(value.clone(), mesh, [Shard(0)]), "plain": torch.full((3,), 5.0), "n": 7}

    def right(url, **options):
        got = state(torch.zeros_like(whole))
        got["plain"].zero_()
        ckpt_cloud.load(got, storage_reader=ObjectStoreReader(url), **options)
        return torch.equal(got["t"].full_tensor(), whole) and got["plain"].eq(5).all() and got["n"] == 7

    wrong = []
    group = dist.new_group(backend="gloo")
    ckpt_cloud.async_save(state(), checkpoint_id=f"{root}/thread", process_group=group).result()
    if not right(f"{root}/thread"):
        wrong.append("async thread")
    process = AsyncCheckpointerType.PROCESS
    writer = ObjectStoreWriter(f"{root}/process")
    ckpt_cloud.async_save(state(), storage_writer=writer, async_checkpointer_type=process).result()
    if not right(f"{root}/process"):
        wrong.append("async process")
    ckpt_cloud.save(state(), checkpoint_id=f"{root}/alone", use_collectives=False)
    if not right(f"{root}/alone"):
        wrong.append("use_collectives=False")
    other = {"t": distribute_tensor(torch.zeros_like(whole), mesh, [Shard(1)])}
    if (error_of(lambda: ckpt_cloud.load(other, checkpoint_id=f"{root}/alone")) or ("",))[0] != "StateMismatch":
        wrong.append("use_collectives=False, other sharding")
    single = {"rank": torch.full((2,), float(rank))}
    ckpt_cloud.save(single, checkpoint_id=f"{root}/no-dist-{rank}", no_dist=True)
    got = {"rank": torch.zeros(2)}
    ckpt_cloud.load(got, checkpoint_id=f"{root}/no-dist-{rank}", no_dist=True)
    if not got["rank"].eq(rank).all():
        wrong.append("no_dist")
    pair = dist.new_group([1, 2], backend="gloo")
    if rank in (1, 2):
        ckpt_cloud.save({"pair": torch.ones(3)}, checkpoint_id=f"{root}/pair", process_group=pair)
        got = {"pair": torch.zeros(3)}
        ckpt_cloud.load(got, checkpoint_id=f"{root}/pair", process_group=pair)
        if not got["pair"].eq(1).all():
            wrong.append("process_group")
    dist.barrier()
    for step in (1, 2, 3):
        cached = DefaultSavePlanner(enable_plan_caching=True)
        ckpt_cloud.save(state(whole * step), checkpoint_id=f"{root}/cached-{step}", planner=cached)
    for step in (1, 2, 3):
        got = state(torch.zeros_like(whole))
        ckpt_cloud.load(got, checkpoint_id=f"{root}/cached-{step}")
        if not torch.equal(got["t"].full_tensor(), whole * step):
            wrong.append(f"plan caching {step}")
    if pickle.loads(pickle.dumps(writer)).checkpoint_id != writer.checkpoint_id:
        wrong.append("pickle")
    return wrong


def load_own(url):
    """On another number of ranks than saved their own checkpoints there."""
    return error_of(lambda: ckpt_cloud.load({"t": torch.zeros(10, 2)}, checkpoint_id=url))


def bad_input(root):
    """What each rank is told of checkpoints that do not fit, or that cannot be read."""
    last = dist.get_rank() == dist.get_world_size() - 1

    def told(name, state):
        return error_of(lambda: ckpt_cloud.load(state, checkpoint_id=f"{root}/{name}"))

    good = {"w": torch.zeros(6, 2), "n": 0}
    return {
        **{name: told(name, dict(good)) for name in ("newer", "flag", "manifest")},
        "shape": told("good", good | {"w": torch.zeros(7 if last else 6, 2)}),
        "dtype": told("good", good | {"w": torch.zeros(6, 2, dtype=torch.int64)}),
        "key": told("good", good | ({"only here": torch.zeros(1)} if last else {})),
        "kind": told("good", good | {"w": 1}),
    }
