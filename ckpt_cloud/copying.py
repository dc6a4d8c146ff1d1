"""Copies a checkpoint to another place, bucket or cloud: verified on the way, in fixed memory, committed last.

source ─► get_range ─► CRC32C per block ─► budget ─► put_multipart ─► manifest ─► COMMIT
          └ opened if encrypted             └ sealed if to be encrypted, by other keys since objects get other names
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace

from msgspec import structs

from ckpt_cloud import bridge, protocol
from ckpt_cloud.commit import admit, open_manifest, publish, rank_roots, read_register
from ckpt_cloud.encryption import EncryptionKey, Encryptions, Keyring, Seal
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
from ckpt_cloud.format.layout import manifest_key, mint_id, pack_key
from ckpt_cloud.format.manifest import Manifest, ObjectEntry
from ckpt_cloud.format.sealing import BLOCK, NONCE_BYTES, ObjectKey, blocks_of, room_within, sealed_size
from ckpt_cloud.options import CommitOptions, StoreOptions, TransferOptions
from ckpt_cloud.planning.save import part_size_for
from ckpt_cloud.progress import bar
from ckpt_cloud.session import Place
from ckpt_cloud.signing import Signer, SignWith, Trust, TrustedKey
from ckpt_cloud.stores import ObjectStore, parse_url
from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.staging import Staging, plain_memory
from ckpt_cloud.transfer.structured import all_or_cancel
from ckpt_cloud.transfer.upload import sizes_for
from ckpt_cloud.workers import in_thread, in_waiting_thread

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
    sign: SignWith | Signer | None = None,
    trusted_keys: TrustedKey | Iterable[TrustedKey] | None = None,
    require_signature: bool | None = None,
    source_encryption_key: EncryptionKey | Keyring | None = None,
    encryption_key: EncryptionKey | Keyring | None = None,
    encryption_key_id: str | None = None,
    decrypt: bool = False,
    require_encryption: bool | None = None,
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
            byte, the source must have been saved with a signature, and be held against it.
        trusted_keys, require_signature, require_encryption: what to demand of the source, as for `ObjectStoreReader`.
        source_encryption_key: of an encrypted source; `encryption_key` by default.
        encryption_key, encryption_key_id: encrypt the copy, as for `ObjectStoreWriter`. The copy of an encrypted
            checkpoint is encrypted with the same key by default.
        decrypt: leave the copy of an encrypted checkpoint in clear.
        on_event, progress: as for `ObjectStoreWriter`.

    Raises:
        EncryptionKeyMissing, WrongEncryptionKey: the source is encrypted, and the key does not open it.
        CheckpointNotFound: nothing at `source`; CheckpointExists: something at `target`.
        ChecksumMismatch, MissingObject, CorruptManifest: the source is damaged; nothing was published.
        SignatureError, NotEncrypted: it is not what was demanded.
        CommitStateUnknown: as for a save.
        KeyboardInterrupt: what was uploaded is deleted first, unless the commit was under way.
    """
    keys = Encryptions.of(source_encryption_key, encryption_key, encryption_key_id, decrypt=decrypt)
    signer = Signer.of(sign)
    # Locals may be shown beside a traceback.
    del source_encryption_key, encryption_key, sign
    demands = Trust.of(trusted_keys, require_signature, require_encryption)
    options = transfer or TransferOptions()
    recorder = Recorder(fan_out(on_event, bar("copy") if progress else None))
    seals = bool(keys.source or keys.target)
    room = sealed_size(options.range_size) if seals else options.range_size
    staging = Staging(Budget(options.memory_budget), room, plain_memory)
    origin, goal = parse_url(source), parse_url(target)

    def one(rank: str = "") -> str:
        places = (
            Place.at(origin.child(rank) if rank else origin, source_store or StoreOptions()),
            Place.at(goal.child(rank) if rank else goal, target_store or StoreOptions()),
        )
        moves = (options, commit or CommitOptions())
        return _run(_Copy(*places, overwrite, read_back, *moves, staging, signer, demands, keys, recorder))

    try:
        attempt = one()
    except CheckpointPerRank:
        bridge.run(_refuse_whole(Place.at(goal, target_store or StoreOptions())))
        for rank in bridge.run(rank_roots(Place.at(origin, source_store or StoreOptions()).control)):
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
    demands: Trust
    keys: Encryptions
    recorder: Recorder
    # What changes: keys that were begun, whether the commit was, and whether all is over.
    begun: list[str] = field(default_factory=list)
    in_doubt: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    async def run(self) -> str:
        try:
            return await self._run()
        finally:
            self.ended.set()

    async def discard(self) -> None:
        if self.begun:
            with contextlib.suppress(CkptCloudError):
                await self.target.control.delete(self.begun)

    async def _run(self) -> str:
        register, data = await open_manifest(self.source.control, self.demands.check, self.keys.source)
        reference = register.manifest
        assert reference is not None, "it is committed"
        where = f"{self.source.location.url}/{reference.key}"
        manifest = manifests.decode(data, reference, where)
        self.demands.check_covers(manifest, where)
        if self.signer:
            self.signer.ready()
        seal = await in_waiting_thread(self.keys.seal, register)
        unsealed = await self.keys.source.unsealed(self.source.data, register, manifest.objects)
        self.source = replace(self.source, data=unsealed)
        seen = await admit(self.target.control, overwrite=self.overwrite, options=self.commit)
        attempt = mint_id(time.time_ns() // 1_000_000, os.urandom(10))
        if protocol.is_fenced_off(attempt, seen):
            hint = "set this machine's clock (NTP); it is behind that of one which deleted or collected there"
            raise AttemptAborted(
                "copies that begin at the time that it is here are fenced off", self.target.location.url, hint
            )
        objects = await self._objects(manifest, attempt, seal)
        body = structs.replace(manifest, attempt=attempt, objects=objects)
        self.begun.append(manifest_key(attempt))
        self.in_doubt = True
        await publish(
            self.target.data,
            body,
            oldest=attempt,
            seen=seen,
            overwrite=self.overwrite,
            options=self.commit,
            metrics=register.metrics or None,
            seal=seal,
            sign=self.signer.signed if self.signer else None,
        )
        return attempt

    async def _objects(self, manifest: Manifest, attempt: str, seal: Seal | None) -> list[ObjectEntry]:
        total = sum(entry.size for entry in manifest.objects)
        self.recorder.expect("copy", "up", total)
        self.recorder.report.bytes_needed += total
        gate = asyncio.Semaphore(_OBJECTS_AT_ONCE)

        async def one(number: int, entry: ObjectEntry) -> ObjectEntry:
            async with gate:
                key = pack_key(attempt, number, spread=self.options.spread)
                return await self._object(entry, key, seal)

        return await all_or_cancel(one(number, entry) for number, entry in enumerate(manifest.objects))

    async def _object(self, entry: ObjectEntry, key: str, seal: Seal | None) -> ObjectEntry:
        self.begun.append(key)
        began_unix_s = time.time()
        store = self.target.data
        part_size = part_size_for(entry.size, sizes_for(store, self.options, sealed=seal is not None))
        stored = entry.size
        sealing = None
        if seal:
            sealing = seal.of_object(key)
            part_size, stored = sealed_size(blocks_of(part_size) * BLOCK), sealed_size(entry.size)

        def source() -> AsyncIterator[memoryview]:
            return self._pieces(self.source.data, entry, sealing)

        if stored <= part_size:
            version = await store.put(key, b"".join([piece async for piece in source()]))
        else:
            lanes = max(1, self.options.max_requests // _OBJECTS_AT_ONCE)
            version = await store.put_multipart(key, source, part_size=part_size, concurrency=lanes)
        self.recorder.report.objects += 1
        self.recorder.stored(key, stored, began_unix_s)
        copied = structs.replace(entry, key=key, e_tag=version)
        if self.read_back:
            async for piece in self._pieces(seal.store(store) if seal else store, copied, None):
                # Not held while the next is waited for, whose room it may be.
                del piece
        return copied

    async def _pieces(
        self, store: ObjectStore, entry: ObjectEntry, sealing: ObjectKey | None
    ) -> AsyncIterator[memoryview]:
        """The object's bytes in order, each range verified, in buffers within the budget; sealed if they are to be."""
        unit = entry.block_size if sealing is None else math.lcm(entry.block_size, BLOCK)
        step = max(unit, self.options.range_size // unit * unit)
        for start in range(0, entry.size, step):
            end = min(start + step, entry.size)
            size = end - start
            held = [await self.staging.lend(size if sealing is None else sealed_size(size))]
            await self._fetch(store, entry, start, end, room_within(held[0], size))
            if sealing is not None:
                await in_thread(_seal, sealing, held[0], size, start // BLOCK, end == entry.size)
            self.recorder.moved("up", entry.key, len(held[0]))
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


def _seal(sealing: ObjectKey, held: memoryview, size: int, first_block: int, last: bool) -> None:
    """What lies at the end of a buffer, in it."""
    nonces = os.urandom(blocks_of(size) * NONCE_BYTES)
    sealing.seal_within(held, size, nonces, first_block=first_block, last=last)
