"""DCP's `StorageReader` for checkpoints of other formats.

read_metadata   detect ─► Contents ─► DCP's metadata
read_data       read items ─► boxes ─► located in their records ─► ranged reads ─► straight into the tensors
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckpt_cloud import bridge
from ckpt_cloud.errors import CheckpointChanged, CheckpointNotFound, CkptCloudError, CorruptFile
from ckpt_cloud.events import Listener, Recorder, Report
from ckpt_cloud.interop.contents import Box, Contents
from ckpt_cloud.interop.detect import find
from ckpt_cloud.interop.fetch import Fetcher
from ckpt_cloud.interop.quantized import Dequantizer
from ckpt_cloud.interop.reads import Reads
from ckpt_cloud.metadata import Unavailable
from ckpt_cloud.options import StoreOptions, TransferOptions
from ckpt_cloud.session import Settings, location_of
from ckpt_cloud.stores import open_store, parse_url, supports
from ckpt_cloud.transforms import Undo


class ForeignReader(StorageReader):
    """Loads checkpoints of other formats in place, into any number of ranks and any sharding, by exact ranges.

    It reads what DCP's own writers made (`FileSystemWriter`, `FsspecWriter`, s3torchconnector), safetensors files and
    Hugging Face model repositories, and files of `torch.save`; it finds out by itself which it is. Nothing read from
    them runs code.

    Args:
        url: of the directory, or of a single file. May be left out and given to DCP as `checkpoint_id`.
        dequantize: an element type; weights of fp8 with a `weight_scale_inv` beside them are then multiplied out
            while they are loaded, block by block, and look as if they were stored so.
        block_size: rows and columns of a block with one scale, 128 by default.
        extensions: DCP's registry of stream transforms, where others than its own were used.
        store, transfer, memory_budget, cast, trust, on_event: as for `ObjectStoreReader`.

    Raises:
        InvalidURL, InvalidOption: at once.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        dequantize: torch.dtype | None = None,
        block_size: int = 128,
        extensions: ExtensionRegistry | None = None,
        store: StoreOptions | None = None,
        transfer: TransferOptions | None = None,
        memory_budget: int | None = None,
        cast: bool = False,
        trust: bool = False,
        on_event: Listener | None = None,
        **store_options: Any,
    ) -> None:
        super().__init__()
        self._settings = Settings.of(store, transfer, None, memory_budget, store_options)
        self._dequantizer = None if dequantize is None else Dequantizer(dequantize, block_size)
        self._undo = Undo(extensions, reader="ForeignReader", damaged=CorruptFile)
        self._cast = cast
        self._trust = trust
        self._on_event = on_event
        # What follows changes: the URL with every reset, the rest with every load.
        self._url = url
        self._contents: Contents | None = None
        self._located: dict[Box, Box] = {}
        self._error: CkptCloudError | None = None
        self._recorder = Recorder(on_event)
        if url is not None:
            location_of(url)

    def __repr__(self) -> str:
        return f"<ForeignReader {self.checkpoint_id or 'without a URL'}>"

    def __getstate__(self) -> dict[str, Any]:
        recorder = Recorder()
        return {
            **self.__dict__,
            "_contents": None,
            "_located": {},
            "_error": None,
            "_on_event": None,
            "_recorder": recorder,
        }

    @property
    def checkpoint_id(self) -> str | None:
        """The URL in normal form, or None."""
        return None if self._url is None else location_of(self._url).url

    @property
    def report(self) -> Report:
        """Figures of this rank's last load."""
        return self._recorder.report

    @property
    def format(self) -> str:
        """`dcp`, `safetensors` or `torch`, once it was opened."""
        return self._contents.format if self._contents else ""

    @property
    def shards(self) -> Contents | None:
        """What was opened, if its files hold the bytes of its tensors one after another, as they are loaded."""
        plain = self.format == "safetensors" and self._dequantizer is None
        return self._contents if plain else None

    @property
    def files(self) -> list[str]:
        """URLs of the files that hold what was opened."""
        return [self._contents.where(number) for number in range(len(self._contents.files))] if self._contents else []

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` is a URL, or a path, that can be opened."""
        return supports(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins a new load, from `checkpoint_id` if given; all options stay."""
        if checkpoint_id is not None:
            self._url = checkpoint_id
        self._contents = self._error = None

    def open(self) -> Contents:
        """Finds out what is there; what it returns may be given to other ranks' `adopt`.

        Raises:
            CheckpointNotFound: nothing of a format that is known.
            UntrustedItem: what describes it would run code.
            CorruptFile, MissingObject, Unsupported, UnsupportedTensor: it cannot be read.
        """
        return self._find(None)

    def adopt(self, contents: Contents) -> None:
        """Has the next load use what another rank opened, so that one rank alone asks the store."""
        self._contents = contents

    def read_metadata(self, *args: Any, rank: int | None = None, **kwargs: Any) -> Metadata:
        """DCP's metadata of the checkpoint; with `rank`, of the rank's own (`use_collectives=False`).

        DCP calls it with `rank` when it failed without; then any failure is raised when the result is used.

        Raises:
            As `open`, without `rank`.
        """
        if rank is not None and self._error is not None and not isinstance(self._error, CheckpointNotFound):
            return Unavailable(self._error)
        try:
            return self._begin(rank)
        except CkptCloudError as error:
            if rank is not None:
                return Unavailable(self._error or error)
            self._error = error
            raise

    def _begin(self, rank: int | None) -> Metadata:
        self._recorder = Recorder(self._on_event)
        with self._recorder.phase("open"):
            contents = self._contents if self._contents is not None and rank is None else self._find(rank)
            self._contents = contents
            self._located = {}
            metadata = contents.to_dcp()
            if self._dequantizer is not None:
                self._dequantizer.adapt(contents, metadata)
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do, unless opening failed: then its error is raised here."""
        if isinstance(metadata, Unavailable):
            raise metadata.error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Notes what this rank found."""
        contents = self._current()
        return plan if contents.own else dataclasses.replace(plan, storage_data=contents.identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are.

        Raises:
            CheckpointChanged: ranks found different files.
        """
        if len({plan.storage_data for plan in plans if plan.storage_data is not None}) > 1:
            url = self.checkpoint_id or ""
            raise CheckpointChanged("the checkpoint was replaced while the ranks opened it", url, "load again")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills the tensors and items of the plan.

        Raises:
            StateMismatch: a dtype differs (and `cast` is off); nothing was changed.
            UntrustedItem: an item that could run code (and `trust` is off).
            CorruptFile, MissingObject, Unsupported: it cannot be read.
            CheckpointChanged: a file was replaced since it was opened.
        """
        contents = self._current()
        with self._recorder.phase("read"):
            reads = Reads(contents, planner, self._dequantizer, self._undo, self._located)
            reads.add(plan.items)
            reads.check_dtypes(cast=self._cast)
            self._recorder.report.bytes_needed += reads.total_bytes
            store = open_store(parse_url(contents.under), self._settings.store)
            bridge.run(reads.run(Fetcher(store, contents.files, self._settings.transfer, self._recorder)))
        with self._recorder.phase("apply"):
            reads.hand_over(trust=self._trust)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _find(self, rank: int | None) -> Contents:
        location = location_of(self._url)
        found = bridge.run(find(location, self._settings.store, rank=rank))
        if found is None:
            raise nothing_at(location.url)
        return found

    def _current(self) -> Contents:
        assert self._contents is not None, "DCP calls read_metadata first"
        return self._contents


def nothing_at(url: str) -> CkptCloudError:
    """The error for a place where no format was found."""
    hint = "it should hold .metadata, *.safetensors or model.safetensors.index.json, or be a file of torch.save"
    return CheckpointNotFound("no checkpoint of another format is here", url, hint)
