"""What Lightning gives to `ObjectStoreCheckpointIO` comes back. A Trainer with it: tests/docs/test_howto_pages.py."""

import warnings
from datetime import timedelta
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

import ckpt_cloud
from ckpt_cloud.errors import CheckpointNotFound, InvalidOption, UnsupportedTensor, UntrustedItem

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="pip install --group docs")
    from ckpt_cloud.lightning import ObjectStoreCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def url(tmp_path):
    return f"{tmp_path}/run/epoch=1-step=20.ckpt"


@pytest.fixture
def io():
    return ObjectStoreCheckpointIO()


def test_everything_comes_back(io, url):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = {
        "epoch": 1,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": torch.tensor(0.5), "kth": "", "none": None}},
        "loops": {"empty": {}, "list": [], "pair": (1, 2.5)},
        "hparams": {"width": 3},
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
    }

    io.save_checkpoint(saved, url)
    got = io.load_checkpoint(url)

    for name in ("epoch", "loops", "hparams"):
        assert got[name] == saved[name]
    assert got["half"].dtype == torch.bfloat16
    assert torch.equal(got["half"], saved["half"])
    assert got["callbacks"]["ModelCheckpoint{'monitor': None}"]["best"] == 0.5
    # Integer keys are integers still, or the moments would be lost without a word.
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(got["optimizer_states"][0])
    assert len(fresh.state) == 2
    for parameter, moments in optimizer.state.items():
        assert torch.equal(fresh.state[parameter]["exp_avg"], moments["exp_avg"])


def test_keys_with_dots_are_told_apart(io, url):
    saved = {
        "a": {"b": torch.tensor(1)},
        "a.b": torch.tensor(2),
        "rest": torch.tensor(3),
        "l": [{"0": torch.tensor(4)}],
    }
    io.save_checkpoint(saved, url)
    assert io.load_checkpoint(url) == saved


def test_what_is_saved_again_is_replaced(io, url):
    io.save_checkpoint({"step": 1}, url)
    io.save_checkpoint({"step": 2}, url)
    assert io.load_checkpoint(url) == {"step": 2}


def test_removing(io, url):
    io.save_checkpoint({"step": 1}, url)
    io.remove_checkpoint(url)
    io.remove_checkpoint(url)
    with pytest.raises(CheckpointNotFound):
        io.load_checkpoint(url)


def test_objects_that_could_run_code_need_trust(io, url):
    saved = {"hparams": {"ratio": Fraction(1, 3), "every": timedelta(hours=1)}}
    io.save_checkpoint(saved, url)
    with pytest.raises(UntrustedItem):
        io.load_checkpoint(url)
    assert io.load_checkpoint(url, weights_only=False) == saved


def test_where_tensors_go(io, url):
    io.save_checkpoint({"w": torch.ones(2)}, url)
    assert io.load_checkpoint(url, map_location="meta")["w"].device.type == "meta"
    with pytest.raises(InvalidOption):
        io.load_checkpoint(url, map_location={"cuda:0": "cpu"})


def test_options_are_for_the_constructor(io, url):
    with pytest.raises(InvalidOption, match="storage_options"):
        io.save_checkpoint({}, url, storage_options={"anon": True})
    with pytest.raises(InvalidOption, match="no_such"):
        ObjectStoreCheckpointIO(no_such=1)


def test_sharded_tensors_are_refused(io, url, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
        with pytest.raises(UnsupportedTensor, match=r"state_dict\.w"):
            io.save_checkpoint({"state_dict": {"w": sharded}}, url)
    finally:
        dist.destroy_process_group()
    assert ckpt_cloud.latest(tmp_path / "run") is None
