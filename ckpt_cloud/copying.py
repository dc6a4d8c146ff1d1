"""Copies a checkpoint to another place, bucket or cloud: verified on the way, in fixed memory, committed last.

source ─► get_range ─► CRC32C per block ─► budget ─► put_multipart ─► manifest ─► COMMIT
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from msgspec import structs

from ckpt_cloud import bridge, protocol
from ckpt_cloud.commit import admit, open_manifest, publish, read_register
from ckpt_cloud.errors import (
    AttemptAborted,
    CheckpointExists,
    CheckpointPerRank,
    ChecksumMismatch,
    CkptCloudError,
    CommitStateUnknown,
    MissingObject,
    NotFound,
    RangeNotSatisfiable,
)
from ckpt_cloud.events import Listener, Recorder, Report, fan_out
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.checksum import first_bad_block
from ckpt_cloud.format.layout import RANK_PREFIX, manifest_key, mint_id, pack_key
from ckpt_cloud.format.manifest import Manifest, ObjectEntry
from ckpt_cloud.options import CommitOptions, StoreOptions, TransferOptions
from ckpt_cloud.planning.save import Sizes, part_size_for
from ckpt_cloud.progress import bar
from ckpt_cloud.session import Place
from ckpt_cloud.signing import Signer, SignWith
from ckpt_cloud.stores import ObjectStore, parse_url
from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.staging import Staging, plain_memory
from ckpt_cloud.transfer.structured import all_or_cancel
from ckpt_cloud.workers import in_thread

_OBJECTS_AT_ONCE = 4
_END_S = 30.0


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy that was committed.

    Attributes:
        url: of the copy.
        attempt: its own id; that of the source stays with the source. Empty where ranks saved without coordination.
        report: bytes, requests and seconds.
    """

    url: str
    attempt: str
    report: Report


def copy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    read_back: bool = False,
    source_store: StoreOptions | None = None,
    target_store: StoreOptions | None = None,
    transfer: TransferOptions | None = None,
    commit: CommitOptions | None = None,
    sign: SignWith | None = None,
    on_event: Listener | None = None,
    progress: bool = False,
) -> Copied:
    """Copies the checkpoint at `source` to `target`, where it becomes visible by one conditional write at the end.

    What ranks saved without coordination is copied rank by rank, each visible by a conditional write of its own.

    Every block is checked against its checksum before it is sent on. Memory stays within
    `transfer.memory_budget` and one range for each object under way, whatever the size of the checkpoint.

    Args:
        overwrite: replace a committed checkpoint at `target`.
        read_back: read all of the copy and check it once more before it is committed.
        source_store, target_store: options of either store.
        sign: as for `ObjectStoreWriter`; a copy without it is not signed, whatever its source is. To vouch for every
            byte, the source must have been saved with a signature.
        on_event, progress: as for `ObjectStoreWriter`.

    Raises:
        CheckpointNotFound: nothing at `source`; CheckpointExists: something at `target`.
        ChecksumMismatch, MissingObject, CorruptManifest: the source is damaged; nothing was published.
        CommitStateUnknown: as for a save.
        KeyboardInterrupt: what was uploaded is deleted first, unless the commit was under way.
    """
    options = transfer or TransferOptions()
    recorder = Recorder(fan_out(on_event, bar("copy") if progress else None))
    staging = Staging(Budget(options.memory_budget), options.range_size, plain_memory)
    signer = None if sign is None else Signer(sign)
    origin, goal = parse_url(source), parse_url(target)

    def one(rank: str = "") -> str:
        places = (
            Place.at(origin.child(rank) if rank else origin, source_store or StoreOptions()),
            Place.at(goal.child(rank) if rank else goal, target_store or StoreOptions()),
        )
        work = _Copy(*places, overwrite, read_back, options, commit or CommitOptions(), staging, signer, recorder)
        return _run(work)

    try:
        attempt = one()
    except CheckpointPerRank:
        bridge.run(_refuse_whole(Place.at(goal, target_store or StoreOptions())))
        for rank in bridge.run(_ranks_at(Place.at(origin, source_store or StoreOptions()))):
            one(rank)
        attempt = ""
    return Copied(goal.url, attempt, recorder.report)


def _run(work: _Copy) -> str:
    """Copies, or cleans up."""
    try:
        with work.recorder.phase("copy"):
            return bridge.run(work.run())
    except (KeyboardInterrupt, CkptCloudError) as failure:
        # What is cancelled is still cleaning up.
        work.ended.wait(_END_S)
        if not (isinstance(failure, CommitStateUnknown) or (isinstance(failure, KeyboardInterrupt) and work.in_doubt)):
            bridge.run(work.discard())
        raise


async def _ranks_at(place: Place) -> list[str]:
    return [name for name in await place.control.list_children() if name.startswith(RANK_PREFIX)]


async def _refuse_whole(place: Place) -> None:
    """A checkpoint of all ranks would hide those of single ones."""
    register = (await read_register(place.control)).register
    if register is not None and register.state == "committed":
        hint = "choose another URL: a checkpoint of single ranks cannot replace it"
        raise CheckpointExists("a committed checkpoint of all ranks is already here", place.location.url, hint)


@dataclass(slots=True)
class _Copy:
    """One copy."""

    source: Place
    target: Place
    overwrite: bool
    read_back: bool
    options: TransferOptions
    commit: CommitOptions
    staging: Staging
    signer: Signer | None
    recorder: Recorder
    # What changes: keys that were begun, whether the commit was, and whether all is over.
    keys: list[str] = field(default_factory=list)
    in_doubt: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    async def run(self) -> str:
        try:
            return await self._run()
        finally:
            self.ended.set()

    async def discard(self) -> None:
        if self.keys:
            with contextlib.suppress(CkptCloudError):
                await self.target.control.delete(self.keys)

    async def _run(self) -> str:
        reference, data = await open_manifest(self.source.control)
        manifest = manifests.decode(data, reference, f"{self.source.location.url}/{reference.key}")
        register = (await read_register(self.source.control)).register
        metrics = (register.metrics or None) if register is not None else None
        if self.signer:
            self.signer.ready()
        seen = await admit(self.target.control, overwrite=self.overwrite, options=self.commit)
        attempt = mint_id(time.time_ns() // 1_000_000, os.urandom(10))
        if protocol.is_fenced_off(attempt, seen):
            hint = "set this machine's clock (NTP); it is behind that of one which deleted or collected there"
            raise AttemptAborted(
                "copies that begin at the time that it is here are fenced off", self.target.location.url, hint
            )
        objects = await self._objects(manifest, attempt)
        body = structs.replace(manifest, attempt=attempt, objects=objects)
        self.keys.append(manifest_key(attempt))
        self.in_doubt = True
        await publish(
            self.target.data,
            body,
            oldest=attempt,
            seen=seen,
            overwrite=self.overwrite,
            options=self.commit,
            metrics=metrics,
            sign=self.signer.signed if self.signer else None,
        )
        return attempt

    async def _objects(self, manifest: Manifest, attempt: str) -> list[ObjectEntry]:
        total = sum(entry.size for entry in manifest.objects)
        self.recorder.expect("copy", "up", total)
        self.recorder.report.bytes_needed += total
        gate = asyncio.Semaphore(_OBJECTS_AT_ONCE)

        async def one(number: int, entry: ObjectEntry) -> ObjectEntry:
            async with gate:
                key = pack_key(attempt, number, spread=self.options.spread)
                return await self._object(entry, key)

        return await all_or_cancel(one(number, entry) for number, entry in enumerate(manifest.objects))

    async def _object(self, entry: ObjectEntry, key: str) -> ObjectEntry:
        self.keys.append(key)
        began_unix_s = time.time()
        store = self.target.data
        sizes = Sizes(self.options.pack_size, self.options.part_size, store.max_parts, store.max_part_bytes)
        part_size = part_size_for(entry.size, sizes)
        if entry.size <= part_size:
            version = await store.put(key, b"".join([piece async for piece in self._pieces(self.source, entry)]))
        else:
            lanes = max(1, self.options.max_requests // _OBJECTS_AT_ONCE)
            version = await store.put_multipart(
                key, lambda: self._pieces(self.source, entry), part_size=part_size, concurrency=lanes
            )
        self.recorder.report.objects += 1
        self.recorder.stored(key, entry.size, began_unix_s)
        copied = structs.replace(entry, key=key, e_tag=version)
        if self.read_back:
            async for _ in self._pieces(self.target, copied):
                pass
        return copied

    async def _pieces(self, place: Place, entry: ObjectEntry) -> AsyncIterator[memoryview]:
        """The object's bytes in order, each range verified, in buffers within the budget."""
        step = max(entry.block_size, self.options.range_size // entry.block_size * entry.block_size)
        for start in range(0, entry.size, step):
            end = min(start + step, entry.size)
            held = [await self.staging.lend(end - start)]
            await self._fetch(place.data, entry, start, end, held[0])
            self.recorder.moved("up", entry.key, end - start)
            # Nothing here holds on to it while the next is waited for.
            yield held.pop()

    async def _fetch(self, store: ObjectStore, entry: ObjectEntry, start: int, end: int, into: memoryview) -> None:
        """Fills `into` with verified bytes."""
        where = f"{store.url}/{entry.key}"
        bad: int | None = None
        for _ in range(2):
            try:
                await store.get_range_into(entry.key, start, end, [into])
            except (NotFound, RangeNotSatisfiable) as error:
                raise MissingObject(f"a data object is gone or cut short: {error.message}", where) from None
            first = start // entry.block_size
            bad = await in_thread(first_bad_block, [into], first, entry.sums, entry.block_size, entry.digests)
            if bad is None:
                return
        message = f"block {bad} of the object differs from what was saved"
        raise ChecksumMismatch(message, where, "copy an earlier checkpoint")
