"""Lightning's `CheckpointIO`, so that a `Trainer` saves to object stores and resumes from them.

Needs `pip install lightning`; nothing else of ckpt_cloud imports this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ckpt_cloud.api import load, save
from ckpt_cloud.collector import delete
from ckpt_cloud.errors import CheckpointNotFound, InvalidOption, UnsupportedTensor
from ckpt_cloud.options import StoreOptions, TransferOptions
from ckpt_cloud.reader import ObjectStoreReader
from ckpt_cloud.writer import ObjectStoreWriter

__all__ = ["ObjectStoreCheckpointIO"]

_REST = "rest"
_Step = str | int
_Place = tuple[_Step, ...]
"""Keys and indices that lead to a value."""


class ObjectStoreCheckpointIO(CheckpointIO):
    """Saves a Lightning `Trainer`'s checkpoints as ours: `Trainer(plugins=[ObjectStoreCheckpointIO()])`.

    For strategies in which rank 0 saves a whole state: one device, DDP, and what derives from them. A file that
    Lightning saves again, such as `last.ckpt`, is replaced atomically. Wrap it in Lightning's `AsyncCheckpointIO` to
    save in the background.

    Args:
        store: endpoint, region, credentials, retries; each is also a keyword argument of its own.
        transfer: part, pack and range sizes, requests in flight.

    Raises:
        InvalidOption: at once.
    """

    def __init__(
        self, *, store: StoreOptions | None = None, transfer: TransferOptions | None = None, **store_options: Any
    ) -> None:
        self._store = StoreOptions.merged(store, store_options)
        self._transfer = transfer

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves `checkpoint` at the URL `path`, in place of what was there.

        Raises:
            InvalidOption: `storage_options`, of which there are none: give options to the constructor.
            UnsupportedTensor: a sharded tensor, of which rank 0 has only its own part.
            CkptCloudError: nothing was published, and what was there is still there.
        """
        if storage_options is not None:
            raise InvalidOption("storage_options are not used", hint="give options to ObjectStoreCheckpointIO(...)")
        rest, tensors = _split(checkpoint)
        places = _named(tensors)
        state = {name: tensors[place] for name, place in places.items()} | {_REST: (rest, places)}
        writer = ObjectStoreWriter(path, overwrite=True, store=self._store, transfer=self._transfer)
        # Flattening would turn integer keys, which optimizers have, into strings.
        save(state, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False), no_dist=True)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """What was saved at the URL `path`.

        Args:
            map_location: where the tensors go; by default to the CPU.
            weights_only: False opens objects that could run code, too. Only for checkpoints whose writer you trust.

        Raises:
            InvalidOption: a `map_location` that is neither a device nor the name of one.
            UntrustedItem: the checkpoint holds such an object, and `weights_only` is not False.
            CkptCloudError: it is not there, cannot be read, or is damaged.
        """
        if not isinstance(map_location, torch.device | str | None):
            raise InvalidOption("map_location must be a device, or the name of one")
        reader = ObjectStoreReader(path, store=self._store, transfer=self._transfer, trust=weights_only is False)
        planner = _EverythingPlanner()
        load({}, storage_reader=reader, planner=planner, no_dist=True)
        rest, places = planner.state_dict.pop(_REST)
        for name, place in places.items():
            tensor = planner.state_dict[name]
            _put(rest, place, tensor if map_location is None else tensor.to(map_location))
        checkpoint: dict[str, Any] = rest
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Deletes the checkpoint at the URL `path`: first its visibility, then its data. None is no error."""
        try:
            delete(path, store=self._store)
        except CheckpointNotFound:
            return


class _EverythingPlanner(DefaultLoadPlanner):
    """Loads all that the checkpoint holds into a state that it makes for it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: FBT002 - DCP's signature
    ) -> None:
        assert metadata is not None, "DCP sets the planner up with the metadata"
        for name, entry in metadata.state_dict_metadata.items():
            state_dict[name] = (
                torch.empty(entry.size, dtype=entry.properties.dtype)
                if isinstance(entry, TensorStorageMetadata)
                else None
            )
        super().set_up_planner(state_dict, metadata, is_coordinator)


def _split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[_Place, torch.Tensor]]:
    """A copy of `checkpoint` with None for each tensor, and the tensors by their places."""
    tensors: dict[_Place, torch.Tensor] = {}

    def without(value: Any, place: _Place) -> Any:
        if isinstance(value, DTensor):
            hint = "for sharded models use ckpt_cloud.CheckpointManager, or ckpt_cloud.save on every rank"
            raise UnsupportedTensor(f"{_text(place)} is sharded over ranks, and Lightning saves on one", hint=hint)
        if isinstance(value, torch.Tensor):
            tensors[place] = value.detach()
            return None
        if isinstance(value, dict) and all(isinstance(key, _Step) for key in value):
            return {key: without(item, (*place, key)) for key, item in value.items()}
        if type(value) is list:
            return [without(item, (*place, index)) for index, item in enumerate(value)]
        return value

    return without(checkpoint, ()), tensors


def _text(place: _Place) -> str:
    return ".".join(map(str, place))


def _named(places: Iterable[_Place]) -> dict[str, _Place]:
    """A name of its own for each place, nearly always its dotted path."""
    named: dict[str, _Place] = {}
    for place in places:
        name = _text(place)
        while name in named or name == _REST:
            name += "_"
        named[name] = place
    return named


def _put(tree: Any, place: _Place, value: Any) -> None:
    for step in place[:-1]:
        tree = tree[step]
    tree[place[-1]] = value
