"""Collects what crashes, failed saves and overwrites left under a root, and deletes checkpoints.

Whoever wants to delete data first wins the register: it raises the fence by a conditional write, after which no save
below the fence can ever commit, and only then deletes (docs/commit.md). A crash in between leaves data that the next
run finds, never a visible checkpoint without its data.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

from ckpt_cloud import bridge, protocol
from ckpt_cloud.catalog import CheckpointInfo, describe
from ckpt_cloud.commit import check_conditions, move_register, nothing_here, rank_roots, read_manifest, read_register
from ckpt_cloud.encryption import EncryptionKey, Keyring
from ckpt_cloud.errors import (
    CheckpointIncomplete,
    CheckpointNotFound,
    Damaged,
    DecryptionFailed,
    EncryptionKeyMissing,
    InvalidOption,
    NotFound,
    Unsupported,
    WrongEncryptionKey,
)
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.layout import (
    DATA_PREFIX,
    PROBE,
    first_id,
    id_unix_ms,
    join,
    manifest_key,
    names_a_key,
    next_id,
    place_of,
)
from ckpt_cloud.format.pages import is_manifest
from ckpt_cloud.format.register import Register
from ckpt_cloud.options import CommitOptions, StoreOptions
from ckpt_cloud.protocol import Seen
from ckpt_cloud.stores import Location, ObjectInfo, ObjectStore, UnfinishedUpload, open_store, parse_url
from ckpt_cloud.transfer.structured import all_or_cancel

T = TypeVar("T")

GRACE = timedelta(hours=24)
"""Younger data may belong to a save that is still running, or to a load of what was overwritten meanwhile."""
_BATCH = 1000
_AT_ONCE = 8
"""Names right under the root that are looked at together; the listings of so many are held in memory."""
_ABORTS_AT_ONCE = 16
_MANIFEST_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True)
class Garbage:
    """One object that no committed checkpoint needs.

    Attributes:
        key: relative to the root.
        size_bytes: of the object.
    """

    key: str
    size_bytes: int


@dataclass(slots=True)
class Collected:
    """What a run of the collector found, and deleted unless it was a dry run.

    Attributes:
        dry_run: whether nothing was touched.
        objects: data of saves that can never commit any more, and of checkpoints that were replaced or deleted.
        uploads: unfinished multipart uploads.
        skipped: URLs of checkpoints that were left alone, with the reason.
    """

    dry_run: bool
    objects: list[Garbage] = field(default_factory=list)
    uploads: list[UnfinishedUpload] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Of all objects together."""
        return sum(each.size_bytes for each in self.objects)


def gc(
    root: str | os.PathLike[str],
    *,
    older_than: timedelta = GRACE,
    dry_run: bool = False,
    store: StoreOptions | None = None,
    encryption_key: EncryptionKey | Keyring | None = None,
    allow_unsafe_commit: bool = False,
) -> Collected:
    """Deletes what no committed checkpoint at or below `root` needs and is older than `older_than`.

    Safe beside running saves, loads and other collectors; may be interrupted, and run again, at any moment. A save
    that has run for longer than `older_than` and stored nothing in that time is given up: it fails with
    `AttemptAborted`. Memory holds the listings of a few checkpoints at a time, and the names of what was found.

    Args:
        older_than: 24 hours by default.
        dry_run: only tell.
        encryption_key: as for `ObjectStoreReader`. What belongs to an encrypted checkpoint stands in its manifest, so
            that without its key all data beside it is left alone, and `skipped` says so.
        allow_unsafe_commit: collect even where the store ignores conditional writes; only while nobody saves there.

    Raises:
        Unsupported: the store ignores conditional writes.
        StoreUnavailable, PermissionDenied, ...: what was deleted until then is gone, all else is as it was.
    """
    if older_than < timedelta(0):
        raise InvalidOption(f"older_than is {older_than}; it must not be negative")
    keys = Keyring.of(encryption_key)
    # Locals may be shown beside a traceback.
    del encryption_key
    options = CommitOptions(allow_unsafe_commit=allow_unsafe_commit)
    opened = open_store(parse_url(root), store or StoreOptions())
    run = _Collector(opened, older_than, options, keys, Collected(dry_run))
    return bridge.run(run.collect())


def resolve(
    url: str | os.PathLike[str], *, store: StoreOptions | None = None, allow_unsafe_commit: bool = False
) -> CheckpointInfo:
    """Settles what became of a save that ended in `CommitStateUnknown`, and tells what is at `url` now.

    Gives up every save to `url` that began before now and has not committed: its commit can never land any more, and
    its data is garbage. So call it when nobody is saving there. Compare `attempt` with the one in the error: if the
    state is `committed` with that attempt, the save succeeded.

    Args:
        allow_unsafe_commit: as for the save.

    Raises:
        CheckpointNotFound: no save has stored anything there; of ranks that do not coordinate, each has its own URL.
        StoreUnavailable: still no clear answer; call it again.
    """
    location = parse_url(url)
    options = CommitOptions(allow_unsafe_commit=allow_unsafe_commit)
    return bridge.run(_resolve(open_store(location, store or StoreOptions()), location, options))


def delete(
    url: str | os.PathLike[str], *, store: StoreOptions | None = None, allow_unsafe_commit: bool = False
) -> None:
    """Deletes the checkpoint at `url`: first its visibility, by a conditional write, then its data.

    Those of single ranks under `url` too. Call it again if it was interrupted. A load that is under way fails.

    Args:
        allow_unsafe_commit: delete even where the store ignores conditional writes; only while nobody saves there.

    Raises:
        CheckpointNotFound: no checkpoint is there; CheckpointIncomplete: only data, which `gc` collects.
        Unsupported: the store ignores conditional writes.
    """
    options = CommitOptions(allow_unsafe_commit=allow_unsafe_commit)
    bridge.run(_delete(open_store(parse_url(url), store or StoreOptions()), options))


@dataclass(frozen=True, slots=True)
class _Place:
    """One checkpoint URL below the root."""

    path: str
    data: Sequence[tuple[str, ObjectInfo]]
    """Id and object."""

    @property
    def is_ours(self) -> bool:
        """Whether some save stored this, rather than a stranger whose folders are named as ids are, by a hash say."""
        return any(names_a_key(info.key) or info.key.endswith(f"/{PROBE}") for _, info in self.data)


@dataclass(frozen=True, slots=True)
class _Collector:
    store: ObjectStore
    older_than: timedelta
    options: CommitOptions
    keys: Keyring
    result: Collected

    async def collect(self) -> Collected:
        before_s = time.time() - self.older_than.total_seconds()
        if not self.result.dry_run:
            await check_conditions(self.store, self.options)
        names = await self.store.list_children()
        await _at_once(_AT_ONCE, (self._collect_below(name, before_s) for name in names))
        await self._collect_uploads(before_s)
        self.result.objects.sort(key=lambda each: each.key)
        return self.result

    async def _collect_below(self, name: str, before_s: float) -> None:
        """One name right under the root: all objects of a checkpoint are below the same one."""
        for place in _places([info async for info in self.store.list(name)]):
            try:
                await self._collect_place(place, before_s)
            except (Damaged, Unsupported, EncryptionKeyMissing, WrongEncryptionKey) as error:
                # Nothing may be concluded from a register or a manifest that cannot be read.
                self.result.skipped.append((f"{self.store.url}/{place.path}".rstrip("/"), str(error)))

    async def _collect_place(self, place: _Place, before_s: float) -> None:
        fence = _fence(place, before_s)
        if not any(id_ < fence for id_, _ in place.data):
            return
        seen = await read_register(self.store, under=place.path)
        if seen.register is None and not place.is_ours:
            return
        garbage = await self._garbage(place, seen, fence, before_s)
        if garbage and not self.result.dry_run:
            register = await move_register(
                self.store, lambda now: protocol.fenced_off(now, fence), self.options, under=place.path
            )
            # A save may have committed between the look and the fence; none that is below it can any more.
            garbage = await self._garbage(place, register, fence, before_s)
            await _delete_all(self.store, (each.key for each in garbage))
        self.result.objects += garbage

    async def _garbage(self, place: _Place, seen: Seen, fence: str, before_s: float) -> list[Garbage]:
        needed = await self._needed(place, seen.register)
        needed |= await self._lately_replaced(place, seen.register, needed, before_s)
        return [
            Garbage(info.key, info.size)
            for id_, info in place.data
            if id_ < fence and info.modified_unix_s < before_s and info.key not in needed
        ]

    async def _needed(self, place: _Place, register: Register | None) -> set[str]:
        """Keys of the committed checkpoint."""
        if register is None or register.manifest is None:
            return set()
        reference = register.manifest
        key = join(place.path, reference.key)
        store = await self.keys.unsealed(self.store, register, under=place.path)
        data = await read_manifest(store, reference, under=place.path)
        manifest = manifests.decode(data, reference, f"{self.store.url}/{key}")
        return {key, *(join(place.path, entry.key) for entry in manifest.objects)}

    async def _lately_replaced(
        self, place: _Place, register: Register | None, needed: set[str], before_s: float
    ) -> set[str]:
        """Keys of checkpoints that were replaced within the grace age: somebody may still be loading them.

        A checkpoint is replaced by the next whose manifest was stored, right after that.
        """
        stored = sorted((id_, info) for id_, info in place.data if info.key == join(place.path, manifest_key(id_)))
        kept: set[str] = set()
        for (_, info), (successor, manifest) in pairwise(stored):
            replaced_s = max(id_unix_ms(successor) / 1000, manifest.modified_unix_s)
            if info.key not in needed and replaced_s >= before_s:
                kept |= await self._named_by(place, register, info.key)
        return kept

    async def _named_by(self, place: _Place, register: Register | None, key: str) -> set[str]:
        try:
            data, _ = await self.store.get(key, limit=_MANIFEST_LIMIT)
            if not is_manifest(data):
                store = await self.keys.unsealed_like(self.store, register, under=place.path)
                data, _ = await store.get(key, limit=_MANIFEST_LIMIT)
            reference = manifests.reference(key, data)
            manifest = manifests.decode(data, reference, f"{self.store.url}/{key}")
        except DecryptionFailed:
            # Of a key that is not this one, or damaged: it cannot be told.
            raise
        except (NotFound, Damaged):
            return set()
        return {key, *(join(place.path, entry.key) for entry in manifest.objects)}

    async def _collect_uploads(self, before_s: float) -> None:
        try:
            found = await self.store.list_uploads()
        except Unsupported as error:
            self.result.skipped.append((f"unfinished uploads below {self.store.url}", str(error)))
            return
        stale = [upload for upload in found if upload.started_unix_s < before_s and names_a_key(upload.key)]
        if not self.result.dry_run:
            await _at_once(_ABORTS_AT_ONCE, (self.store.abort_upload(upload) for upload in stale))
        self.result.uploads += stale


async def _at_once(most: int, work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs `work`, so many at a time, and returns the results in order; the first failure ends all."""
    gate = asyncio.Semaphore(most)

    async def one(item: Coroutine[Any, Any, T]) -> T:
        try:
            async with gate:
                return await item
        finally:
            # Of what never began, when another failed.
            item.close()

    return await all_or_cancel(one(item) for item in work)


def _places(found: Iterable[ObjectInfo]) -> list[_Place]:
    data: dict[str, list[tuple[str, ObjectInfo]]] = {}
    for info in found:
        place = place_of(info.key)
        if place is not None and place[1]:
            data.setdefault(place[0], []).append((place[1], info))
    return [_Place(path, objects) for path, objects in sorted(data.items())]


def _fence(place: _Place, before_s: float) -> str:
    """Below it are saves that began before the grace age and have stored nothing since: those are given up."""
    active = [id_ for id_, info in place.data if info.modified_unix_s >= before_s]
    return min([first_id(int(before_s * 1000)), *active])


async def _resolve(store: ObjectStore, location: Location, options: CommitOptions) -> CheckpointInfo:
    data = await _data(store, "")
    if not data and (await read_register(store)).register is None:
        # A save stores its manifest before it sends COMMIT, so none was ever sent here.
        raise await nothing_here(store)
    fence = _above(data, now_ms=int(time.time() * 1000) + 1)
    await move_register(store, lambda now: protocol.fenced_off(now, fence), options)
    return await describe(store, location)


async def _delete(store: ObjectStore, options: CommitOptions) -> None:
    ranks = await rank_roots(store)
    found = await _at_once(_AT_ONCE, (_delete_place(store, path, options) for path in ("", *ranks)))
    if "checkpoint" in found:
        return
    if "data" in found:
        hint = "ckpt_cloud.gc collects it"
        raise CheckpointIncomplete("there is data but no COMMIT: no checkpoint to delete", store.url, hint)
    raise CheckpointNotFound("no checkpoint is here", store.url, "check the URL")


async def _delete_place(store: ObjectStore, path: str, options: CommitOptions) -> str:
    """Deletes the checkpoint at `path`, and says what was there."""
    seen = await read_register(store, under=path)
    data = await _data(store, path)
    if seen.register is None:
        return "data" if data else "nothing"
    fence = _above(data, now_ms=int(time.time() * 1000))
    await move_register(store, lambda now: protocol.deleted(now, fence), options, under=path)
    await _delete_all(store, (info.key for id_, info in data if id_ < fence))
    return "checkpoint"


async def _data(store: ObjectStore, path: str) -> list[tuple[str, ObjectInfo]]:
    """Id and object of all saves of the checkpoint at `path`."""
    found = [info async for info in store.list(join(path, DATA_PREFIX.rstrip("/")))]
    return [(place[1], info) for info in found if (place := place_of(info.key)) and place[0] == path]


def _above(data: Iterable[tuple[str, ObjectInfo]], *, now_ms: int) -> str:
    """A fence above every save that began until now, those of machines whose clocks are ahead of ours too."""
    return max([first_id(now_ms), *(next_id(id_) for id_, _ in data)])


async def _delete_all(store: ObjectStore, keys: Iterable[str]) -> None:
    rest = list(keys)
    while rest:
        await store.delete(rest[:_BATCH])
        rest = rest[_BATCH:]
