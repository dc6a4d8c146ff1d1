"""DCP's `StorageWriter`, translated.

reset                   the URL; options stay
set_up_storage_writer   mints this rank's id; the coordinator looks whether the URL is free
prepare_local_plan      refuses what has no plain bytes, before a byte is sent
write_data              plan items ─► entries ─► packs ─► upload; places come back in the results
finish                  results of all ranks ─► manifest ─► one conditional PUT of COMMIT
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckpt_cloud import bridge, commit, garbage, gpu, protocol
from ckpt_cloud import metadata as metadata_room
from ckpt_cloud.annotations import Annotations
from ckpt_cloud.batch import sorted_out
from ckpt_cloud.encryption import EncryptionKey, Keyring, Seal
from ckpt_cloud.errors import AttemptAborted, CkptCloudError, InvalidOption, UnsupportedTensor
from ckpt_cloud.events import Listener, Recorder, Report, fan_out
from ckpt_cloud.format.layout import manifest_key, mint_id, pack_key
from ckpt_cloud.metadata import rank_here, world_size
from ckpt_cloud.options import CommitOptions, StoreOptions, TransferOptions
from ckpt_cloud.progress import bar
from ckpt_cloud.protocol import Seen
from ckpt_cloud.session import Place, Settings, location_of, prepare, rank_location
from ckpt_cloud.signing import Signer, SignWith
from ckpt_cloud.stores import supports
from ckpt_cloud.tensors import check_storable
from ckpt_cloud.transforms import Transforms
from ckpt_cloud.version import WRITER
from ckpt_cloud.writes import Writes


@dataclass(slots=True)
class _Save:
    """One save on this rank: minted anew by every `set_up_storage_writer`."""

    id: str
    place: Place
    recorder: Recorder
    ranks: int | None
    """How many ranks save beside each other without coordination; None when there is one checkpoint for all."""
    seen: Seen | None
    """The register as it was before; only where this rank may commit."""
    seal: Seal | None
    """What encrypts it."""
    keys: list[str] = field(default_factory=list)
    """What this rank has begun to write."""

    def writes(self, options: TransferOptions, extensions: Transforms | None) -> Writes:
        """What stores this rank's entries."""

        def new_key(number: int) -> str:
            self.keys.append(pack_key(self.id, number, spread=options.spread))
            return self.keys[-1]

        return Writes(self.place.data, self.id, options, extensions, self.seal, new_key, self.recorder)


class ObjectStoreWriter(StorageWriter):
    """Saves DCP checkpoints to `s3://`, `file://` (or a bare path) and `memory://`.

    A checkpoint becomes visible by one conditional PUT after all data is stored: whole, or not at all. The options
    stay through `reset`; a pickled writer carries no keys.

    Args:
        url: of the checkpoint. May be left out and given to DCP as `checkpoint_id`.
        overwrite: replace a committed checkpoint, atomically. Without it an existing one is refused before a byte
            is sent.
        store: endpoint, region, credentials, retries; each is also a keyword argument of its own.
        transfer: part, pack and range sizes, requests in flight.
        commit: limits of the commit.
        memory_budget: bytes of staged parts in this process, 512 MiB by default.
        compression: `"zstd"` compresses tensors, and items that do not fit the manifest, in frames, so that a part of
            a tensor is still read by the frames that it needs. Needs `ckpt-cloud[zstd]`; `transfer` has its level and
            frame size.
        extensions: DCP's stream transforms, such as its `ZStandard()`, as `FileSystemWriter` takes them. Every chunk
            and every item goes through them as one stream, so that any part of it is read by reading all of it.
            Excludes `compression`.
        allow_unsafe_commit: save even where the store ignores conditional writes.
        sign: an Ed25519 private key (object, path of a PEM file, PEM as bytes), or a function from what is to be signed
            to the signature. `COMMIT` is signed, and through it every byte. Needs `ckpt-cloud[crypto]`.
        encryption_key: encrypt all data and the manifest on this side, by AES-256-GCM: 32 bytes, the same as
            hexadecimal digits or Base64, a `pathlib.Path` of a file that holds one of these, or a function from a key
            id to one. Give all ranks the same. Needs `ckpt-cloud[crypto]`.
        encryption_key_id: what `COMMIT` calls the key, for who will have to find it; a check value by default.
        on_event: is called with every event, from any thread; one that raises is logged, and called no more.
        progress: show a bar on rank 0 with bytes, rate and time left; never where there is no terminal.
        metrics: numbers to keep in `COMMIT`, such as a loss; `list_checkpoints` shows them.
        user_metadata: tags, a git commit, a configuration: JSON values to keep in the manifest.

    Raises:
        InvalidURL, InvalidOption: at once.
    """

    # A traceback with locals shows one whose options were refused, too.
    _url: str | os.PathLike[str] | None = None

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
        store: StoreOptions | None = None,
        transfer: TransferOptions | None = None,
        commit: CommitOptions | None = None,
        memory_budget: int | None = None,
        compression: Literal["zstd"] | None = None,
        extensions: Sequence[StreamTransformExtension] | None = None,
        allow_unsafe_commit: bool = False,
        sign: SignWith | Signer | None = None,
        encryption_key: EncryptionKey | Keyring | None = None,
        encryption_key_id: str | None = None,
        on_event: Listener | None = None,
        progress: bool = False,
        metrics: Mapping[str, float] | None = None,
        user_metadata: Mapping[str, Any] | None = None,
        **store_options: Any,
    ) -> None:
        super().__init__()
        self._signer = Signer.of(sign)
        self._keys = Keyring.of(encryption_key, encryption_key_id)
        # Locals may be shown beside a traceback.
        del sign, encryption_key
        if allow_unsafe_commit:
            commit = replace(commit or CommitOptions(), allow_unsafe_commit=True)
        self._settings = Settings.of(store, transfer, commit, memory_budget, store_options, compression=compression)
        self._settings.check_codec()
        if self._signer:
            self._settings = replace(self._settings, transfer=replace(self._settings.transfer, block_digests=True))
        self._extensions = Transforms(extensions) if extensions else None
        if self._extensions and self._settings.transfer.compression:
            hint = "compress by one of the extensions, such as ZStandard(), or leave them out"
            raise InvalidOption("compression and extensions exclude each other", hint=hint)
        self._overwrite = overwrite
        self._on_event = fan_out(on_event, bar("save") if progress else None)
        self._stop: bridge.Stop | None = bridge.Stop()
        self._annotations = Annotations.of(metrics, user_metadata)
        # What follows changes: the URL with every reset, the save with every set-up.
        self._url = url
        self._save: _Save | None = None
        prepare(url, self._settings.store)

    def __repr__(self) -> str:
        return f"<ObjectStoreWriter {self.checkpoint_id or 'without a URL'}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_save": None, "_on_event": None, "_stop": None}

    @property
    def checkpoint_id(self) -> str | None:
        """The URL in normal form, or None."""
        return None if self._url is None else location_of(self._url).url

    @property
    def report(self) -> Report:
        """Figures of this rank's last save."""
        return self._save.recorder.report if self._save else Report()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` is a URL, or a path, that can be opened."""
        return supports(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins a new save, at `checkpoint_id` if given; all options stay."""
        if checkpoint_id is not None:
            self._url = checkpoint_id
        self._save = None

    def storage_meta(self) -> StorageMeta | None:
        """What planners may want to record of the storage."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(
        self,
        is_coordinator: bool,
        *args: Any,
        rank: int | None = None,
        use_collectives: bool = True,
        **kwargs: Any,
    ) -> None:
        """Mints this rank's id; whoever will commit looks whether the URL is free.

        Args:
            is_coordinator: commits for all ranks.
            rank: needed when ranks do not coordinate.
            use_collectives: if False, every rank saves a checkpoint of its own under `rank-NNNNN/`.

        Raises:
            CheckpointExists: a committed checkpoint is there and `overwrite` is off.
            AttemptAborted: this machine's clock is behind that of one that deleted or collected here.
            Unsupported: the store ignores conditional writes.
            EncryptionKeyMissing: the key did not travel to this process.
            BucketNotFound, PermissionDenied, MissingCredentials, StoreUnavailable, ...: within seconds.
        """
        location = location_of(self._url)
        recorder = Recorder(self._on_event, rank=rank_here() if rank is None else rank)
        commits = is_coordinator or not use_collectives
        if self._signer:
            self._signer.ready()
        seal = self._keys.seal()
        with recorder.phase("set up"):
            if not use_collectives:
                self._admit(Place.at(location, self._settings.store), overwrite=False)
                location = rank_location(location, _known(rank))
            place = Place.at(location, self._settings.store)
            seen = self._admit(place, overwrite=self._overwrite) if commits else None
        ranks = None if use_collectives else world_size()
        id_ = mint_id(time.time_ns() // 1_000_000, os.urandom(10))
        if seen is not None and protocol.is_fenced_off(id_, seen):
            hint = "set this machine's clock (NTP); it is behind that of one which deleted or collected here"
            raise AttemptAborted("saves that begin at the time that it is here are fenced off", location.url, hint)
        self._save = _Save(id_, place, recorder, ranks, seen, seal)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is.

        Raises:
            UnsupportedTensor: a sparse, nested or quantized tensor, or of a type that DCP cannot plan.
        """
        passed: set[tuple[torch.dtype, torch.layout]] = set()
        for item in plan.items:
            if item.tensor_data is not None:
                kind = (item.tensor_data.properties.dtype, item.tensor_data.properties.layout)
                if kind not in passed:
                    check_storable(item.index.fqn, *kind)
                    _check_plannable(item)
                    passed.add(kind)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are: nothing that must be fresh may live in a plan, since DCP caches plans."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Uploads this rank's items.

        Raises:
            PlanMismatch, UnsupportedTensor: the planner resolved an item to other data than it planned.
            StoreUnavailable, PermissionDenied, ...: nothing was made visible; unfinished uploads are aborted.
        """
        save = self._current()
        with save.recorder.phase("write"):
            gpu.settle()
            with garbage.paused():
                # A transform may encrypt: then the manifest must not show an item.
                inline_limit = -1 if self._extensions else self._settings.transfer.inline_limit
                # A rank's own checkpoint fills the very same shards.
                most_chunks = self._settings.transfer.column_chunks if save.ranks is None else 1
                batch = sorted_out(plan.items, planner, inline_limit=inline_limit, most_chunks=most_chunks)
            save.recorder.report.bytes_needed += batch.total_bytes
            upload = save.writes(self._settings.transfer, self._extensions).run(batch, planner)
            places, objects = bridge.run(self._stop.over(upload) if self._stop else upload)
        done: Future[list[WriteResult]] = Future()
        with garbage.paused():
            done.set_result(batch.results(places, save.id, objects))
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the manifest and commits.

        Raises:
            IncompleteSave: a rank reported less than its plan.
            CheckpointExists, StaleWrite, AttemptAborted: another was first.
            CommitStateUnknown: no clear answer; nothing is deleted.
        """
        save = self._current()
        assert save.seen is not None, "finish is only called where the save was admitted"
        with save.recorder.phase("commit"):
            notes = self._annotations
            with garbage.paused():
                body, oldest = metadata_room.build(
                    metadata,
                    results,
                    attempt=save.id,
                    writer=WRITER,
                    ranks=save.ranks,
                    user_metadata=notes.user_metadata,
                )
            save.keys.append(manifest_key(save.id))
            if self._stop:
                self._stop.check()
            bridge.run(
                commit.publish(
                    save.place.data,
                    body,
                    oldest=oldest,
                    seen=save.seen,
                    overwrite=self._overwrite,
                    options=self._settings.commit,
                    metrics=notes.metrics,
                    sign=self._signer.signed if self._signer else None,
                    seal=save.seal,
                )
            )

    def abort(self) -> None:
        """Ends the save that is under way, from another thread: it fails with `AttemptAborted` on all ranks.

        One that is in its last step, the commit, ends as it would have. This writer then saves no more.
        """
        if self._stop:
            self._stop.set()

    def discard(self) -> None:
        """Deletes what this rank uploaded in a save that failed for certain; as far as the store lets it.

        Never call it after `CommitStateUnknown`: the save may be committed.
        """
        if self._save is not None and self._save.keys:
            with contextlib.suppress(CkptCloudError):
                bridge.run(self._save.place.control.delete(self._save.keys))
            self._save.keys.clear()

    def _admit(self, place: Place, *, overwrite: bool) -> Seen:
        return bridge.run(commit.admit(place.control, overwrite=overwrite, options=self._settings.commit))

    def _current(self) -> _Save:
        assert self._save is not None, "DCP calls set_up_storage_writer first"
        return self._save


def _check_plannable(item: WriteItem) -> None:
    """DCP sizes items by `torch.finfo` and `torch.iinfo`, which do not know the types of under 8 bits."""
    try:
        item.tensor_storage_size()
    except TypeError:
        assert item.tensor_data is not None
        message = f"{item.index.fqn!r} has elements of type {item.tensor_data.properties.dtype}, which DCP cannot plan"
        raise UnsupportedTensor(message, hint="save and load it as .view(torch.uint8)") from None


def _known(rank: int | None) -> int:
    if rank is None:
        raise InvalidOption("use_collectives=False needs the rank", hint="let DCP call the writer, or pass rank=")
    return rank
