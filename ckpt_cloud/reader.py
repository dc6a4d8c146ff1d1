"""DCP's `StorageReader`, translated.

read_metadata           COMMIT ─► manifest, checked against its digest ─► DCP's metadata
prepare_local_plan      notes which save was opened
prepare_global_plan     refuses when ranks opened different saves
read_data               read items ─► wants ─► ranged reads ─► verified ─► straight into the tensors
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckpt_cloud import bridge, commit, garbage, gpu, lookup
from ckpt_cloud.encryption import EncryptionKey, Keyring
from ckpt_cloud.errors import (
    CheckpointChanged,
    CheckpointNotFound,
    CkptCloudError,
    Damaged,
)
from ckpt_cloud.events import Listener, Recorder, Report, fan_out
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format import structure
from ckpt_cloud.format.layout import is_rank_path
from ckpt_cloud.format.manifest import Manifest
from ckpt_cloud.format.register import Register
from ckpt_cloud.lookup import Opened
from ckpt_cloud.metadata import Unavailable, check_own_shards, rank_here, to_dcp
from ckpt_cloud.options import StoreOptions, TransferOptions
from ckpt_cloud.planning.load import Fetch, plan_fetches
from ckpt_cloud.progress import bar
from ckpt_cloud.reads import Reads
from ckpt_cloud.session import Place, Settings, location_of, prepare, rank_location
from ckpt_cloud.signing import Trust, TrustedKey
from ckpt_cloud.stores import supports
from ckpt_cloud.tensors import TensorSink
from ckpt_cloud.transfer.decode import Decoding
from ckpt_cloud.transfer.download import download
from ckpt_cloud.transforms import Undo


@dataclass(slots=True)
class _Load:
    """One load on this rank: made anew by every `read_metadata`."""

    place: Place
    manifest: Manifest
    register: Register
    recorder: Recorder


class ObjectStoreReader(StorageReader):
    """Loads checkpoints that `ObjectStoreWriter` saved, into any number of ranks and any sharding.

    Every byte is checked against a checksum that was taken before it was uploaded, unless `verify` is off, and opening
    a checkpoint runs no code from it.

    Args:
        url: of the checkpoint. May be left out and given to DCP as `checkpoint_id`.
        store, transfer: as for `ObjectStoreWriter`.
        memory_budget: bytes of fetched ranges in this process, 512 MiB by default.
        extensions: DCP's registry of stream transforms, where others than its own were used in the save.
        verify: check what comes. If off, bytes of tensors are taken as they come, and not read to the ends of their
            blocks; the manifest is checked all the same. `report.verified` says it.
        cast: convert elements when a tensor of the state has another dtype than the stored one; an error otherwise.
        trust: open non-tensor items that could run code. Only for checkpoints whose writer you trust.
        trusted_keys: Ed25519 public keys (objects, paths of PEM files, PEM as bytes) of those whose checkpoints may be
            loaded; every byte is then held against what they signed. Needs `ckpt-cloud[crypto]`.
        require_signature: refuse what is not signed; by default whenever there are `trusted_keys`.
        encryption_key: of encrypted checkpoints, as for `ObjectStoreWriter`; others load with it too.
        require_encryption: refuse what is not encrypted, so that nobody without the key can have put it there.
        on_event: is called with every event, from any thread.
        progress: show a bar on rank 0 with bytes, rate and time left; never where there is no terminal.

    Raises:
        InvalidURL, InvalidOption: at once.
    """

    # A traceback with locals shows one whose options were refused, too.
    _url: str | os.PathLike[str] | None = None

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        store: StoreOptions | None = None,
        transfer: TransferOptions | None = None,
        memory_budget: int | None = None,
        extensions: ExtensionRegistry | None = None,
        verify: bool = True,
        cast: bool = False,
        trust: bool = False,
        trusted_keys: TrustedKey | Iterable[TrustedKey] | None = None,
        require_signature: bool | None = None,
        encryption_key: EncryptionKey | Keyring | None = None,
        require_encryption: bool | None = None,
        on_event: Listener | None = None,
        progress: bool = False,
        **store_options: Any,
    ) -> None:
        super().__init__()
        self._keys = Keyring.of(encryption_key)
        # Locals may be shown beside a traceback.
        del encryption_key
        self._settings = Settings.of(store, transfer, None, memory_budget, store_options)
        self._undo = Undo(extensions)
        self._cast = cast
        self._trust = trust
        self._signers = Trust.of(trusted_keys, require_signature, require_encryption, verify=verify)
        self._verify = verify
        self._on_event = fan_out(on_event, bar("load") if progress else None)
        # What follows changes: the URL with every reset, the rest with every load.
        self._url = url
        self._place: Place | None = None
        self._given: Opened | None = None
        self._load: _Load | None = None
        self._error: CkptCloudError | None = None
        prepare(url, self._settings.store)

    def __repr__(self) -> str:
        return f"<ObjectStoreReader {self.checkpoint_id or 'without a URL'}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(("_load", "_place", "_given", "_error", "_on_event"))}

    @property
    def checkpoint_id(self) -> str | None:
        """The URL in normal form, or None."""
        return None if self._url is None else location_of(self._url).url

    @property
    def report(self) -> Report:
        """Figures of this rank's last load."""
        return self._load.recorder.report if self._load else Report()

    @property
    def user_metadata(self) -> dict[str, Any]:
        """What the saver added to the checkpoint that was opened last: tags, a git commit, a configuration."""
        return dict(self._load.manifest.user_metadata or {}) if self._load else {}

    @property
    def register(self) -> Register | None:
        """`COMMIT` of the checkpoint that was opened last."""
        return self._load.register if self._load else None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` is a URL, or a path, that can be opened."""
        return supports(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins a new load, from `checkpoint_id` if given; all options stay."""
        if checkpoint_id is not None:
            self._url = checkpoint_id
        self._place = self._given = self._load = self._error = None

    def open(self, keys: Collection[str] | None = None) -> Opened:
        """Finds out what the checkpoint holds; what it returns may be given to other ranks' `adopt`.

        Args:
            keys: of all that will be asked for; then only what concerns them is fetched of a large manifest.

        Raises:
            CheckpointNotFound, CheckpointIncomplete, CheckpointDeleted: nothing to load here.
            CorruptCommit, CorruptManifest, Unsupported: it cannot be understood.
            EncryptionKeyMissing, WrongEncryptionKey: it is encrypted, and the `encryption_key` does not open it.
            BucketNotFound, PermissionDenied, MissingCredentials, StoreUnavailable, ...: within seconds.
        """
        place = Place.at(location_of(self._url), self._settings.store)
        opened = self._open(place, keys)
        self._place = place
        return opened

    def adopt(self, opened: Opened) -> None:
        """Has the next load use what another rank opened, so that one rank alone asks the store."""
        self._given = opened

    def read_metadata(self, *args: Any, rank: int | None = None, **kwargs: Any) -> Metadata:
        """DCP's metadata of the checkpoint.

        DCP calls it once more with `rank` when it failed, for checkpoints that were saved without coordination
        (`use_collectives=False`). Then any failure, the first one included, is raised when the result is used.

        Raises:
            As `open`, without `rank`.
        """
        if rank is None:
            # Stores are dear to open; those that `open` used serve this load too.
            place, self._place = self._place, None
            try:
                return self._begin(place or Place.at(location_of(self._url), self._settings.store))
            except CkptCloudError as error:
                self._error = error
                raise
        first = self._error
        if first is not None and not isinstance(first, CheckpointNotFound):
            return Unavailable(first)
        try:
            return self._begin(Place.at(rank_location(location_of(self._url), rank), self._settings.store))
        except CkptCloudError as error:
            if first is None:
                raise
            return Unavailable(first if isinstance(error, CheckpointNotFound) else error)

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,
        *args: Any,
        rank: int | None = None,
        use_collectives: bool = True,
        **kwargs: Any,
    ) -> None:
        """Nothing to do, unless opening failed: then its error is raised here."""
        if isinstance(metadata, Unavailable):
            raise metadata.error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Notes which save this rank opened, unless each has one of its own.

        Raises:
            StateMismatch: ranks' own checkpoints do not fit the ranks, or the shards, that there are now.
        """
        manifest = self._current().manifest
        if manifest.ranks is None:
            return dataclasses.replace(plan, storage_data=manifest.attempt)
        check_own_shards(manifest, plan.items)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are.

        Raises:
            CheckpointChanged: ranks opened different saves, since the checkpoint was replaced between their looks.
        """
        attempts = {plan.storage_data for plan in plans}
        if len(attempts) > 1:
            url = self.checkpoint_id or ""
            raise CheckpointChanged("the checkpoint was replaced while the ranks opened it", url, "load again")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills the tensors and items of the plan.

        Raises:
            StateMismatch: a dtype differs (and `cast` is off); nothing was changed.
            Unsupported: something went through a transform that is not known here; nothing was changed.
            UntrustedItem: an item that could run code (and `trust` is off).
            ChecksumMismatch, DecryptionFailed, MissingObject, CorruptManifest: what is stored is not what was saved.
            CheckpointChanged, CheckpointDeleted: replaced or deleted meanwhile, and its data collected.
        """
        load = self._current()
        with load.recorder.phase("read"):
            gpu.settle()
            with garbage.paused():
                reads = Reads.of(plan.items, planner, load.manifest)
                reads.check_dtypes(load.place.location.url, cast=self._cast)
                reads.check_codecs(self._undo, load.place.location.url)
                fetches = plan_fetches(
                    reads.wants,
                    load.manifest.objects if self._verify else manifests.in_bytes(load.manifest.objects),
                    range_size=self._settings.transfer.range_size,
                    gap_size=self._settings.transfer.gap_size,
                )
            load.recorder.report.bytes_needed += reads.total_bytes
            load.recorder.expect("read", "down", sum(fetch.end - fetch.start for fetch in fetches))
            bridge.run(self._download(load, reads, fetches))
        with load.recorder.phase("apply"):
            reads.hand_over(planner, trust=self._trust)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    async def _download(self, load: _Load, reads: Reads, fetches: list[Fetch]) -> None:
        try:
            await download(
                load.place.data,
                Decoding(TensorSink(reads.destinations), self._undo, load.place.location.url),
                fetches,
                load.manifest.objects,
                options=self._settings.transfer,
                recorder=load.recorder,
                verify=self._verify,
            )
        except Damaged as damage:
            raise await commit.explained(load.place.control, load.manifest.attempt, damage) from None

    def _open(self, place: Place, keys: Collection[str] | None = None) -> Opened:
        if keys is None:
            return bridge.run(lookup.open_whole(place.control, self._signers.check, self._keys))
        return bridge.run(lookup.open_part(place.control, frozenset(keys), self._signers.check, self._keys))

    def _begin(self, place: Place) -> Metadata:
        recorder = Recorder(self._on_event, rank=rank_here())
        with recorder.phase("open"):
            given, self._given = self._given, None
            opened = given or self._open(place)
            if given:
                self._signers.check(given.register, place.location.url)
            with garbage.paused():
                manifest, metadata = self._understood(opened, place)
            unsealed = bridge.run(self._keys.unsealed(place.data, opened.register, manifest.objects))
            place = dataclasses.replace(place, data=unsealed)
        recorder.report.verified = self._verify
        self._load = _Load(place, manifest, opened.register, recorder)
        self._error = None
        meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta = dataclasses.replace(meta, checkpoint_id=place.location.url, load_id=manifest.attempt)
        return metadata

    def _understood(self, opened: Opened, place: Place) -> tuple[Manifest, Metadata]:
        where = f"{place.location.url}/{opened.reference.key}"
        manifest = manifests.decode(opened.data, opened.reference, where)
        # A rank's own checkpoint does not cover its tensors; of version 1 it does not say that it is one.
        own = not opened.reference.root and is_rank_path(place.location.path.rpartition("/")[2])
        structure.check(manifest, where, whole=not own)
        self._signers.check_covers(manifest, where)
        if not self._signers.keys:
            manifest = manifests.without_digests(manifest)
        return manifest, to_dcp(manifest)

    def _current(self) -> _Load:
        assert self._load is not None, "DCP calls read_metadata first"
        return self._load
