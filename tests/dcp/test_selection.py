"""Loading a part of a checkpoint, under other names, and what is told of keys without a counterpart."""

import pickle

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

import ckpt_cloud
from ckpt_cloud import LoadResult, ObjectStoreReader, SelectiveLoadPlanner
from ckpt_cloud.errors import InvalidOption, StateMismatch


def network(seed):
    torch.manual_seed(seed)
    return torch.nn.ModuleDict({"encoder": torch.nn.Linear(5, 4), "head": torch.nn.Linear(4, 3)})


def training(seed):
    """A model and an optimizer with state, as a checkpoint holds them."""
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=seed / 10)
    model["head"](model["encoder"](torch.ones(2, 5))).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": seed}


@pytest.fixture
def saved(file_url):
    """What the checkpoint at `file_url` holds."""
    state = training(1)
    ckpt_cloud.save(state, checkpoint_id=file_url)
    return state


def same(one, other):
    """Bit for bit, however nested."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_model_without_optimizer(url):
    ckpt_cloud.save(training(1), checkpoint_id=url)
    state, before = training(2), training(2)
    reader = ObjectStoreReader(url)
    result = ckpt_cloud.load(state, storage_reader=reader, keys="model")
    assert result == LoadResult()
    assert same(state["model"], training(1)["model"])
    assert same(state["optimizer"], before["optimizer"])
    assert state["step"] == 2
    assert reader.report.bytes_needed == sum(value.nbytes for value in state["model"].values())


def test_a_state_without_the_optimizer_needs_no_keys(saved, file_url):
    state = {"model": network(2).state_dict()}
    result = ckpt_cloud.load(state, checkpoint_id=file_url)
    assert same(state["model"], saved["model"])
    assert result.missing_keys == ()
    assert "step" in result.unexpected_keys
    assert len(result.unexpected_keys) > 8


@pytest.mark.parametrize(
    "keys",
    [
        ["model.head", "step"],
        ("model.head.weight", "model.head.bias", "step"),
        {"model.head", "step"},
        lambda fqn: ".head." in fqn or fqn == "step",
    ],
    ids=["prefixes", "names", "set", "predicate"],
)
def test_chosen_keys_only(saved, file_url, keys):
    state, before = training(2), training(2)
    assert ckpt_cloud.load(state, checkpoint_id=file_url, keys=keys).missing_keys == ()
    for name, value in state["model"].items():
        assert same(value, (saved if name.startswith("head") else before)["model"][name])
    assert same(state["optimizer"], before["optimizer"])
    assert state["step"] == 1


def test_a_prefix_ends_at_a_dot(file_url):
    ckpt_cloud.save({"head": torch.ones(2), "head2": torch.ones(2)}, checkpoint_id=file_url)
    state = {"head": torch.zeros(2), "head2": torch.zeros(2)}
    ckpt_cloud.load(state, checkpoint_id=file_url, keys="head")
    assert state["head"].eq(1).all()
    assert state["head2"].eq(0).all()


@pytest.mark.parametrize(
    "rename",
    [
        {"backbone": "model.encoder", "top": "model.head"},
        lambda fqn: fqn.replace("backbone", "model.encoder").replace("top", "model.head"),
        {
            "backbone.weight": "model.encoder.weight",
            "backbone.bias": "model.encoder.bias",
            "top": "model.wrong",
            "top.weight": "model.head.weight",
            "top.bias": "model.head.bias",
        },
    ],
    ids=["prefixes", "function", "longest wins"],
)
def test_other_names(saved, file_url, rename):
    state = {"backbone": torch.nn.Linear(5, 4).state_dict(), "top": torch.nn.Linear(4, 3).state_dict()}
    ckpt_cloud.load(state, checkpoint_id=file_url, rename=rename)
    for ours, theirs in (("backbone", "encoder"), ("top", "head")):
        for part in ("weight", "bias"):
            assert torch.equal(state[ours][part], saved["model"][f"{theirs}.{part}"])


def test_everything_below_a_prefix_and_back(saved, file_url):
    bare = network(2).state_dict()
    ckpt_cloud.load(bare, checkpoint_id=file_url, rename={"": "model"})
    assert same(bare, saved["model"])
    ckpt_cloud.save(bare, checkpoint_id=f"{file_url}-bare")
    wrapped = {"module": network(3).state_dict()}
    result = ckpt_cloud.load(wrapped, checkpoint_id=f"{file_url}-bare", rename={"module": ""}, strict=True)
    assert same(wrapped["module"], bare)
    assert result == LoadResult()


def test_other_names_for_items_and_twice_the_same(file_url):
    ckpt_cloud.save({"w": torch.arange(4.0), "meta": {"lr": 0.5}}, checkpoint_id=file_url)
    state = {"a": torch.zeros(4), "b": torch.zeros(4), "settings": {"lr": 0.0}}
    ckpt_cloud.load(state, checkpoint_id=file_url, rename={"a": "w", "b": "w", "settings": "meta"}, strict=True)
    assert torch.equal(state["a"], torch.arange(4.0))
    assert torch.equal(state["b"], torch.arange(4.0))
    assert state["settings"] == {"lr": 0.5}


def test_what_is_missing_is_told_in_full(saved, file_url):
    state = {"model": network(2).state_dict(), "new": {f"layer{n:02}": torch.full((2,), 7.0) for n in range(25)}}
    before = {name: value.clone() for name, value in state["model"].items()}
    with pytest.raises(StateMismatch, match=r"new.layer00 is not in the checkpoint.* and 15 more") as refused:
        ckpt_cloud.load(state, checkpoint_id=file_url)
    assert refused.value.missing_keys == tuple(f"new.layer{n:02}" for n in range(25))
    assert "step" in refused.value.unexpected_keys
    assert refused.value.url == file_url
    assert all(f"new.layer{n:02}" in "".join(refused.value.__notes__) for n in range(25))
    assert pickle.loads(pickle.dumps(refused.value)).missing_keys == refused.value.missing_keys
    assert same(state["model"], before)


def test_not_strict_loads_what_there_is(saved, file_url):
    state = {"model": network(2).state_dict(), "new": torch.full((2,), 7.0)}
    result = ckpt_cloud.load(state, checkpoint_id=file_url, keys=["model", "new", "nothing"], strict=False)
    assert result == LoadResult(("new",), ())
    assert same(state["model"], saved["model"])
    assert state["new"].eq(7).all()


def test_strict_refuses_what_only_the_checkpoint_has(saved, file_url):
    state = {"model": network(2).state_dict(), "optimizer": training(2)["optimizer"]}
    with pytest.raises(StateMismatch, match="step is not in the state") as refused:
        ckpt_cloud.load(state, checkpoint_id=file_url, strict=True)
    assert refused.value.unexpected_keys == ("step",)
    ckpt_cloud.load(state, checkpoint_id=file_url, strict=True, keys=["model", "optimizer"])
    assert same(state["model"], saved["model"])


def test_a_missing_key_is_named_with_the_name_that_was_looked_for(saved, file_url):
    with pytest.raises(StateMismatch, match=r"top is not in the checkpoint as model\.nothing"):
        ckpt_cloud.load({"top": torch.zeros(1)}, checkpoint_id=file_url, rename={"top": "model.nothing"})


def test_keys_that_choose_nothing(saved, file_url):
    with pytest.raises(StateMismatch, match="nothing in the state is 'nowhere'"):
        ckpt_cloud.load(training(2), checkpoint_id=file_url, keys=["model", "nowhere"])


def test_shapes_and_kinds_are_told_with_the_missing_keys(saved, file_url):
    state = {"model": {"head.weight": torch.zeros(7), "head.bias": 3, "gone": torch.zeros(1)}}
    with pytest.raises(StateMismatch) as refused:
        ckpt_cloud.load(state, checkpoint_id=file_url)
    for said in (
        "model.head.weight: stored shape (3, 4), state (7,)",
        "model.head.bias: stored as a tensor of shape (3,), state has int",
        "model.gone is not in the checkpoint",
    ):
        assert said in str(refused.value)


def test_with_dcps_own_load(saved, file_url):
    state = {"net": network(2).state_dict()}
    planner = SelectiveLoadPlanner(rename={"net": "model"}, strict=False)
    dcp.load(state, storage_reader=ObjectStoreReader(file_url), planner=planner)
    assert same(state["net"], saved["model"])
    assert planner.result.missing_keys == ()
    assert "step" in planner.result.unexpected_keys
    with pytest.raises(CheckpointException) as refused:
        dcp.load(state, storage_reader=ObjectStoreReader(file_url), planner=SelectiveLoadPlanner())
    assert len(refused.value.failures[0][0].missing_keys) == 4


def test_a_planner_can_be_used_again(saved, file_url):
    planner = SelectiveLoadPlanner(strict=False)
    for state, missing in (({"x": torch.zeros(1)}, ("x",)), ({"step": 0}, ())):
        assert ckpt_cloud.load(state, checkpoint_id=file_url, planner=planner).missing_keys == missing
    assert state["step"] == 1


def test_a_stateful_object_in_part(file_url):
    """The rest of it is given back its own."""
    model = network(1)
    ckpt_cloud.save({"model": model}, checkpoint_id=file_url)
    other, before = network(2), network(2).state_dict()
    ckpt_cloud.load({"model": other}, checkpoint_id=file_url, keys="model.head")
    for name, value in other.state_dict().items():
        assert torch.equal(value, (model.state_dict() if name.startswith("head") else before)[name])


def test_without_flattening(file_url):
    saved = {"a": torch.ones(2), "b": torch.ones(2), "step": 1, "done": {1}, "other": 1}
    ckpt_cloud.save(saved, checkpoint_id=file_url, planner=DefaultSavePlanner(flatten_state_dict=False))
    state = {"x": torch.zeros(2), "b": torch.zeros(2), "step": 0, "done": set(), "other": 0}
    planner = SelectiveLoadPlanner(["x", "step", "done"], {"x": "a"}, flatten_state_dict=False)
    ckpt_cloud.load(state, checkpoint_id=file_url, planner=planner)
    assert state["x"].eq(1).all()
    assert state["b"].eq(0).all()
    assert (state["step"], state["done"], state["other"]) == (1, {1}, 0)


@pytest.mark.parametrize("as_bytes", [False, True], ids=["values", "bytes"])
def test_keys_that_are_no_strings(file_url, as_bytes):
    """DCP would put items beside the old ones, under the keys' names; optimizers number their parameters."""

    def state(step, lr):
        return {7: {0: {"step": step, "w": torch.full((3,), lr)}, 1: {(2, "a"): step}, None: lr}, 8: step}

    ckpt_cloud.save(state(5, 0.5), checkpoint_id=file_url)
    loaded = state(0, 0.0)
    ckpt_cloud.load(loaded, checkpoint_id=file_url, planner=Hearing() if as_bytes else None)
    assert same(loaded, state(5, 0.5))


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Adam, torch.optim.Rprop])
def test_the_state_of_an_optimizer_as_torch_gives_it(file_url, kind):
    def trained():
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(6, 3, sparse=kind is torch.optim.SparseAdam)
        optimizer = kind(embedding.parameters(), lr=0.01)

        def loss():
            optimizer.zero_grad()
            value = embedding(torch.arange(4)).square().sum()
            value.backward()
            return value

        for _ in range(3):
            optimizer.step(loss)
        return optimizer

    def blank(value):
        if isinstance(value, dict):
            return {key: blank(each) for key, each in value.items()}
        if isinstance(value, list):
            return [blank(each) for each in value]
        return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None

    saved = trained().state_dict()
    ckpt_cloud.save({"optimizer": saved}, checkpoint_id=file_url)
    state = blank(saved)
    assert not same(state, saved)
    ckpt_cloud.load({"optimizer": state}, checkpoint_id=file_url)
    assert same(state, saved)
    trained().load_state_dict(state)


class Hearing(SelectiveLoadPlanner):
    """Hears of every item, as it would from DCP's own readers."""

    heard = ()

    def load_bytes(self, read_item, value):
        self.heard = (*self.heard, torch.load(value, weights_only=False))
        value.seek(0)
        super().load_bytes(read_item, value)


def test_one_derived_from_it_is_given_items_as_bytes(file_url):
    ckpt_cloud.save({"step": 7, "nested": [{"name": "x"}]}, checkpoint_id=file_url)
    state = {"step": 0, "nested": [{"name": ""}]}
    planner = Hearing()
    ckpt_cloud.load(state, checkpoint_id=file_url, planner=planner)
    assert state == {"step": 7, "nested": [{"name": "x"}]}
    assert sorted(map(str, planner.heard)) == ["7", "x"]


def test_so_is_one_whose_hook_was_set_on_itself(file_url):
    ckpt_cloud.save({"step": 7}, checkpoint_id=file_url)
    planner, heard = SelectiveLoadPlanner(), []
    planner.load_bytes = lambda item, value: heard.append(torch.load(value, weights_only=False))
    state = {"step": 0}
    ckpt_cloud.load(state, checkpoint_id=file_url, planner=planner)
    assert (state["step"], heard) == (0, [7])


@pytest.mark.parametrize("beside", [{"keys": "model"}, {"rename": {}}, {"strict": False}], ids=str)
def test_beside_another_planner_it_is_refused(saved, file_url, beside):
    with pytest.raises(InvalidOption, match="another was given"):
        ckpt_cloud.load({"step": 0}, checkpoint_id=file_url, planner=DefaultLoadPlanner(), **beside)


@pytest.mark.parametrize("wrong", [{"keys": [1]}, {"rename": {"a": 1}}], ids=str)
def test_wrong_arguments(saved, file_url, wrong):
    with pytest.raises(InvalidOption):
        ckpt_cloud.load({"step": 0}, checkpoint_id=file_url, **wrong)
