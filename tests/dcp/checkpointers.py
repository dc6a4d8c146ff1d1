"""Plugs for DCP's experimental checkpointer, as docs/dcp-compatibility.md shows them; importable in its process."""

from torch.distributed.checkpoint._experimental.checkpoint_reader import CheckpointReader
from torch.distributed.checkpoint._experimental.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import ckpt_cloud


class CloudWriter(CheckpointWriter):
    def write(self, path, state_dict, **kwargs):
        ckpt_cloud.save(state_dict, checkpoint_id=path)
        if self._commit_hook is not None:
            self._commit_hook.post_commit(path, **kwargs)


class CloudReader(CheckpointReader):
    def read(self, path, state_dict=None, *, map_location=None, **kwargs):
        reader = ckpt_cloud.ObjectStoreReader(path)
        if state_dict is None:
            return _load_state_dict_from_keys(storage_reader=reader), []
        result = ckpt_cloud.load(state_dict, storage_reader=reader, strict=False)
        return state_dict, list(result.missing_keys)


def cloud_writer(rank_info):
    return CloudWriter(CheckpointWriterConfig(), rank_info)
