"""DCP's `_Checkpointer`, and its experimental checkpointers with the plugs that our page on compatibility shows."""

import calls
import pytest
import ranks
import torch
from checkpointers import CloudReader, CloudWriter, cloud_writer
from torch.distributed.checkpoint._checkpointer import _Checkpointer
from torch.distributed.checkpoint._experimental.builder import make_async_checkpointer, make_sync_checkpointer
from torch.distributed.checkpoint._experimental.checkpoint_writer import CheckpointWriterConfig, WriterHook
from torch.distributed.checkpoint._experimental.checkpointer import SyncCheckpointer
from torch.distributed.checkpoint._experimental.config import CheckpointerConfig
from torch.distributed.checkpoint._experimental.staging import CheckpointStagerConfig
from torch.distributed.checkpoint._experimental.types import RankInfo

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter
from ckpt_cloud.errors import CheckpointNotFound

ALONE = RankInfo(global_rank=0, global_world_size=1)


def state(value):
    return {"model": {"w": torch.full((20, 3), float(value))}, "step": value}


def right(loaded, value):
    return bool(loaded["model"]["w"].eq(value).all()) and loaded["step"] == value


def test_dcps_checkpointer(url):
    own = _Checkpointer(ObjectStoreWriter(url), ObjectStoreReader(url))
    own.async_save(state(1)).result()
    loaded = state(0)
    own.load(loaded)
    assert right(loaded, 1)


@pytest.mark.filterwarnings("ignore:The argument order of save has been changed:UserWarning")
def test_dcps_checkpointer_cannot_save_otherwise_in_this_torch(file_url):
    """With any writer: it passes an argument that `save` no longer has."""
    own = _Checkpointer(ObjectStoreWriter(file_url), ObjectStoreReader(file_url))
    with pytest.raises(TypeError, match="coordinator_rank"):
        own.save(state(1))


def test_dcps_checkpointer_on_ranks(tmp_path):
    assert ranks.run(2, calls.checkpointer, tmp_path, f"file://{tmp_path}/run") == [[]] * 2


class Hook(WriterHook):
    def __init__(self):
        self.seen = []

    def pre_commit(self, path, **kwargs):
        self.seen.append(("pre", path))

    def post_commit(self, path, **kwargs):
        self.seen.append(("post", path, ckpt_cloud.latest(path.rpartition("/")[0])))


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning")
def test_the_synchronous_one(url):
    hook = Hook()
    own = SyncCheckpointer(CloudWriter(CheckpointWriterConfig(), ALONE, commit_hook=hook), CloudReader(ALONE))
    assert own.save(url, state(1)) is None
    # It is committed when the hook is called.
    assert hook.seen == [("post", url, url)]
    assert right(own.load(url), 1)
    assert right(own.load(url, state(0)), 1)
    part = own.load(url, {"step": 0, "new": torch.zeros(1)})
    assert part == {"step": 1, "new": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"missing keys: .'new'"):
        own.load(url, {"new": torch.zeros(1)}, strict=True)
    with pytest.raises(CheckpointNotFound):
        own.load(f"{url}-not", {"step": 0})
    own.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning")
def test_the_asynchronous_one_in_its_process(file_url):
    """The builder takes a writer; its reader is replaced afterwards."""
    staging = CheckpointStagerConfig(False, True, True, False)
    config = CheckpointerConfig(staging_config=staging)
    config.process_config.subprocess_init_timeout_secs = 120
    own = make_async_checkpointer(config, ALONE, checkpoint_writer_init_fn=cloud_writer)
    own._reader = CloudReader(ALONE)
    try:
        for step in (1, 2):
            value = state(step)
            staged, written = own.save(f"{file_url}-{step}", value)
            staged.result()
            value["model"]["w"].fill_(-1)
            written.result()
            assert right(own.load(f"{file_url}-{step}"), step)
    finally:
        own.close()


def test_what_the_builder_of_the_synchronous_one_makes_is_its_own(tmp_path):
    """It takes neither a writer nor a reader: files of torch.save, which no URL names."""
    own = make_sync_checkpointer(rank_info=ALONE)
    own.save(str(tmp_path), {"w": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_0.pt"]
