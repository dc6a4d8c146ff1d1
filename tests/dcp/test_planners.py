"""DCP's planners with all their options, planners of one's own, and what DCP logs."""

import logging

import calls
import pytest
import ranks
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter


def nested(value=1):
    return {
        "model": {"w": torch.full((4, 3), float(value)), "layers": [torch.full((2,), float(value)), {"b": value}]},
        "empty": {},
        "step": value,
    }


def right(state, value=1):
    model = state["model"]
    return bool(
        model["w"].eq(value).all() and model["layers"][0].eq(value).all() and model["layers"][1]["b"] == value
    ) and (state["step"] == value)


# A load without the first but with the second loses items: DCP then puts them into a copy of the state.
@pytest.mark.parametrize(("flatten", "shards"), [(True, True), (True, False), (False, False)])
def test_flattening(file_url, flatten, shards):
    ckpt_cloud.save(nested(), checkpoint_id=file_url, planner=DefaultSavePlanner(flatten, shards))
    stored = set(ObjectStoreReader(file_url).read_metadata().state_dict_metadata)
    assert ("model.w" in stored, "model" in stored) == (flatten, not flatten)
    state = nested(0)
    ckpt_cloud.load(state, checkpoint_id=file_url, planner=DefaultLoadPlanner(flatten, shards))
    assert right(state)


def test_dedup_replicated_tensors_is_without_effect_as_dcp_says(file_url, caplog):
    planner = DefaultSavePlanner(dedup_replicated_tensors=True)
    assert "no longer has any effect" in caplog.text
    ckpt_cloud.save(nested(), checkpoint_id=file_url, planner=planner)
    state = nested(0)
    ckpt_cloud.load(state, checkpoint_id=file_url)
    assert right(state)


def test_dedup_to_the_lowest_rank(tmp_path):
    first, second = ranks.run(2, calls.deduplicated, tmp_path, f"file://{tmp_path}/run")
    assert first[True] == 8 * 4000
    assert second[True] == 0
    assert first[False] == second[False] == 4 * 4000


def test_cached_plans_on_ranks(tmp_path):
    assert ranks.run(2, calls.cached_plans, tmp_path, f"file://{tmp_path}/run") == [[]] * 2


@pytest.fixture
def no_cached_plans():
    """DCP keeps plans in class attributes."""
    caches = [name for name in vars(SavePlanner) if name.startswith("_cached")]
    for name in caches:
        getattr(SavePlanner, name).clear()
    yield
    for name in caches:
        getattr(SavePlanner, name).clear()


def test_cached_plans_with_one_planner_of_one_process(file_url, no_cached_plans):
    planner = DefaultSavePlanner(enable_plan_caching=True)
    for step, shape in enumerate([(3,), (3,), (5, 2), (5, 2), (3,)]):
        ckpt_cloud.save({"w": torch.full(shape, float(step))}, checkpoint_id=f"{file_url}-{step}", planner=planner)
    for step, shape in enumerate([(3,), (3,), (5, 2), (5, 2), (3,)]):
        got = {"w": torch.full(shape, -1.0)}
        ckpt_cloud.load(got, checkpoint_id=f"{file_url}-{step}")
        assert got["w"].eq(step).all()


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning")
@pytest.mark.parametrize(
    ("keys", "there"),
    [
        (None, {"model", "step"}),
        ("step", {"step"}),
        ({"model.w"}, {"model"}),
        ({"model", "step"}, {"model", "step"}),
        ({"nothing"}, set()),
    ],
    ids=["all", "name", "dotted", "several", "nothing"],
)
def test_load_state_dict_from_keys(file_url, keys, there):
    ckpt_cloud.save(nested(3), checkpoint_id=file_url)
    state = _load_state_dict_from_keys(keys, storage_reader=ObjectStoreReader(file_url))
    assert set(state) - {"empty"} == there
    if there == {"model", "step"}:
        assert right(state, 3)
    elif "model" in there:
        assert torch.equal(state["model"]["w"], torch.full((4, 3), 3.0))
        assert set(state["model"]) == {"w"}


def test_load_state_dict_from_keys_on_ranks(tmp_path):
    assert ranks.run(2, calls.keys_on_ranks, tmp_path, f"file://{tmp_path}/run/step-1") == [[]] * 2


class Renaming(DefaultSavePlanner):
    """Saves under other names, as DCP's documentation shows it."""

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        super().set_up_planner(
            {f"foo_{name}": value for name, value in state_dict.items()}, storage_meta, is_coordinator
        )


class Stripping(DefaultLoadPlanner):
    """Loads `foo_...` into `...`, as DCP's documentation shows it."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.given = state_dict
        super().set_up_planner({f"foo_{name}": value for name, value in state_dict.items()}, metadata, is_coordinator)

    def load_bytes(self, read_item, value):
        self.given[read_item.dest_index.fqn.removeprefix("foo_")] = torch.load(value, weights_only=True)


class Casting(DefaultLoadPlanner):
    """Reads into a tensor of the stored type and converts when it is there."""

    def resolve_tensor(self, read_item):
        self.target = super().resolve_tensor(read_item)
        stored = self.metadata.state_dict_metadata[read_item.storage_index.fqn].properties.dtype
        self.buffers = getattr(self, "buffers", {}) | {read_item.dest_index: self.target}
        return torch.empty(self.target.shape, dtype=stored)

    def commit_tensor(self, read_item, tensor):
        self.buffers[read_item.dest_index].copy_(tensor)


class Doubling(DefaultSavePlanner):
    """Changes the data and leaves the plan as it is."""

    def transform_object(self, write_item, value):
        done = super().transform_object(write_item, value)
        return done * 2 if isinstance(done, torch.Tensor) else done


def test_a_planner_that_renames(file_url):
    ckpt_cloud.save({"w": torch.ones(3), "n": 5}, checkpoint_id=file_url, planner=Renaming())
    assert set(ObjectStoreReader(file_url).read_metadata().state_dict_metadata) == {"foo_w", "foo_n"}
    state = {"w": torch.zeros(3), "n": 0}
    ckpt_cloud.load(state, checkpoint_id=file_url, planner=Stripping())
    assert state["w"].eq(1).all()


def test_a_planner_that_casts(file_url):
    ckpt_cloud.save({"w": torch.full((5, 3), 1.5, dtype=torch.float64)}, checkpoint_id=file_url)
    state = {"w": torch.zeros(5, 3, dtype=torch.bfloat16)}
    ckpt_cloud.load(state, checkpoint_id=file_url, planner=Casting())
    assert state["w"].dtype is torch.bfloat16
    assert state["w"].eq(1.5).all()


def test_a_planner_that_changes_values(file_url):
    ckpt_cloud.save({"w": torch.ones(3)}, checkpoint_id=file_url, planner=Doubling())
    state = {"w": torch.zeros(3)}
    ckpt_cloud.load(state, checkpoint_id=file_url)
    assert state["w"].eq(2).all()


class Counter:
    """A `Stateful` of one's own."""

    def __init__(self, count):
        self.count = count
        self.weights = torch.full((3,), float(count))

    def state_dict(self):
        return {"count": self.count, "weights": self.weights}

    def load_state_dict(self, state):
        self.count, self.weights = state["count"], state["weights"]


def test_stateful_objects(file_url):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    ckpt_cloud.save({"model": model, "optimizer": optimizer, "counter": Counter(7)}, checkpoint_id=file_url)
    other = torch.nn.Linear(3, 2)
    others = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.5)
    other(torch.ones(1, 3)).sum().backward()
    others.step()
    counter = Counter(0)
    ckpt_cloud.load({"model": other, "optimizer": others, "counter": counter}, checkpoint_id=file_url)
    assert torch.equal(other.weight, model.weight)
    assert others.param_groups[0]["lr"] == 0.25
    moments = [o.state[o.param_groups[0]["params"][0]]["momentum_buffer"] for o in (others, optimizer)]
    assert torch.equal(*moments)
    assert counter.count == 7
    assert counter.weights.eq(7).all()


def test_names_of_before_torch_2_4(file_url, monkeypatch):
    """Lists without tensors were one item then; DCP's planner finds them again, and so does ours."""
    state = {"a": {"numbers": [1, 2, 3], "w": torch.ones(2)}}
    with monkeypatch.context() as old:
        old.setattr(_version, "_derived_version", "2_3")
        ckpt_cloud.save(state, checkpoint_id=file_url)
    assert set(ObjectStoreReader(file_url).read_metadata().state_dict_metadata) == {"a.numbers", "a.w"}
    for planner in (DefaultLoadPlanner(), None):
        loaded = {"a": {"numbers": [0, 0, 0], "w": torch.zeros(2)}}
        ckpt_cloud.load(loaded, checkpoint_id=file_url, planner=planner)
        assert loaded["a"]["numbers"] == [1, 2, 3]
        assert loaded["a"]["w"].eq(1).all()


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_the_deprecated_functions(file_url):
    dcp.save_state_dict({"w": torch.ones(3)}, ObjectStoreWriter(file_url), no_dist=True)
    state = {"w": torch.zeros(3)}
    dcp.load_state_dict(state, ObjectStoreReader(file_url), no_dist=True)
    assert state["w"].eq(1).all()


def logged(caplog, event):
    return [
        record.msg for record in caplog.records if isinstance(record.msg, dict) and record.msg.get("event") == event
    ]


def test_what_dcp_logs_of_a_call(file_url, caplog):
    """DCP's own log names our plug-ins and the URL, and carries no secret of theirs."""
    caplog.set_level(logging.DEBUG)
    writer = ObjectStoreWriter(file_url, access_key_id="AKIAMARKED", secret_access_key="MARKED")
    dcp.save(nested(), storage_writer=writer)
    dcp.load(nested(0), storage_reader=ObjectStoreReader(file_url))
    ends = {entry["func_name"]: entry for entry in logged(caplog, "end")}
    assert {"save", "local_step", "global_step", "write_data", "finish_checkpoint", "load", "read_data"} <= set(ends)
    assert ends["save"]["checkpoint_id"] == ends["write_data"]["checkpoint_id"] == file_url
    assert ends["save"]["storage_writer"] == "ObjectStoreWriter"
    assert ends["load"]["storage_reader"] == "ObjectStoreReader"
    assert "MARKED" not in caplog.text


def test_what_dcp_logs_of_a_failure(file_url, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ckpt_cloud.CkptCloudError):
        ckpt_cloud.load({"nothing": torch.zeros(1)}, checkpoint_id=file_url)
    ckpt_cloud.save(nested(), checkpoint_id=file_url)
    with pytest.raises(ckpt_cloud.CkptCloudError):
        ckpt_cloud.save(nested(), checkpoint_id=file_url)
    errors = {entry["func_name"]: entry["error"] for entry in logged(caplog, "exception")}
    assert "CheckpointExists" in errors["save"]
    assert file_url in errors["save"]
