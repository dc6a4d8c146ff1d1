"""Checks a stored checkpoint from its manifest, without torch: that everything is there, and if asked every byte."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ckpt_cloud import bridge, commit
from ckpt_cloud.encryption import EncryptionKey, Keyring
from ckpt_cloud.errors import CheckpointPerRank, DecryptionFailed, NotFound, RangeNotSatisfiable
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.checksum import bad_blocks, whole_sum
from ckpt_cloud.format.layout import DATA_PREFIX
from ckpt_cloud.format.manifest import Manifest, ObjectEntry
from ckpt_cloud.format.structure import faults
from ckpt_cloud.options import StoreOptions, TransferOptions
from ckpt_cloud.signing import Trust, TrustedKey
from ckpt_cloud.stores import Location, ObjectInfo, ObjectStore, open_store, parse_url
from ckpt_cloud.transfer.structured import all_or_cancel
from ckpt_cloud.workers import in_thread

_OBJECTS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as the manifest says.

    Attributes:
        key: of the object concerned, relative to the checkpoint's URL; of the manifest if that contradicts itself.
        message: what is wrong.
        start, end: bytes of the object, `end` exclusive; both 0 when it is not about bytes.
    """

    key: str
    message: str
    start: int = 0
    end: int = 0


@dataclass(slots=True)
class Verification:
    """What a check of a checkpoint found.

    Attributes:
        url: of the checkpoint.
        attempt: id of the save that was checked; empty where ranks saved without coordination.
        deep: whether every byte was read.
        objects: data objects that were looked at.
        size_bytes: of all of them together.
        bytes_read: of data.
        checked_by_store: data objects whose CRC32C, as the store computed it, is that of what was saved: their bytes
            are right without being read. Google's store tells it, of checkpoints that are not encrypted.
        faults: what is wrong; a checkpoint without any is whole.
        rewritten: keys of objects that are not the version that was saved: copied or written again with the same size.
            Their bytes are checked by `deep` only.
    """

    url: str
    attempt: str
    deep: bool
    objects: int = 0
    size_bytes: int = 0
    bytes_read: int = 0
    checked_by_store: int = 0
    faults: list[Fault] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def add(self, other: Verification) -> None:
        """Counts another's findings as part of these."""
        self.objects += other.objects
        self.size_bytes += other.size_bytes
        self.bytes_read += other.bytes_read
        self.checked_by_store += other.checked_by_store
        below = f"{other.url.removeprefix(self.url).strip('/')}/"
        self.faults += [Fault(below + f.key, f.message, f.start, f.end) for f in other.faults]
        self.rewritten += [below + key for key in other.rewritten]


def verify(
    url: str | os.PathLike[str],
    *,
    deep: bool = False,
    store: StoreOptions | None = None,
    transfer: TransferOptions | None = None,
    trusted_keys: TrustedKey | Iterable[TrustedKey] | None = None,
    require_signature: bool | None = None,
    encryption_key: EncryptionKey | Keyring | None = None,
    require_encryption: bool | None = None,
) -> Verification:
    """Checks the checkpoint at `url` and reports all that is wrong with it.

    Always: `COMMIT`, the manifest's SHA-256, that the manifest contradicts itself nowhere, that every object is there
    with its size, and whether it is the very version that was saved; where the store tells its own CRC32C, that too.
    Costs two requests and one listing.

    Memory: at most `transfer.max_requests` × `transfer.range_size` bytes of data at a time.

    Args:
        deep: also read every byte and check it against the checksums of its blocks.
        store: as for `ObjectStoreReader`.
        transfer: its `max_requests` and `range_size` are used.
        trusted_keys, require_signature: as for `ObjectStoreReader`; with keys, `deep` reads against what was signed.
        encryption_key, require_encryption: likewise.

    Raises:
        CheckpointNotFound, CheckpointIncomplete, CheckpointDeleted: there is nothing to check.
        CorruptCommit, CorruptManifest, Unsupported: it cannot even be opened.
        SignatureError, NotEncrypted: it is not signed by one of the keys, or not encrypted.
        EncryptionKeyMissing, WrongEncryptionKey: it is encrypted, and the key does not open it.
        StoreUnavailable, PermissionDenied, ...: the check did not end, so it says nothing.
    """
    keys = Keyring.of(encryption_key)
    # Locals may be shown beside a traceback.
    del encryption_key
    location = parse_url(url)
    signers = Trust.of(trusted_keys, require_signature, require_encryption)
    how = _How(store or StoreOptions(), transfer or TransferOptions(), signers, keys, deep)
    return bridge.run(_verify(location, how, whole=True))


@dataclass(frozen=True, slots=True)
class _How:
    """What one call was given."""

    store: StoreOptions
    transfer: TransferOptions
    signers: Trust
    keys: Keyring
    deep: bool


async def _verify(location: Location, how: _How, *, whole: bool) -> Verification:
    control = open_store(location, how.store, first_contact=True)
    try:
        register, data = await commit.open_manifest(control, how.signers.check, how.keys)
    except CheckpointPerRank:
        return await _verify_ranks(control, location, how)
    reference = register.manifest
    assert reference is not None, "it is committed"
    where = f"{location.url}/{reference.key}"
    manifest = manifests.decode(data, reference, where)
    how.signers.check_covers(manifest, where)
    found = Verification(location.url, manifest.attempt, how.deep, objects=len(manifest.objects))
    found.size_bytes = sum(entry.size for entry in manifest.objects)
    found.faults += [Fault(reference.key, message) for message in faults(manifest, whole=whole)]
    stored = await how.keys.unsealed(open_store(location, how.store), register, manifest.objects)
    there = await _look(stored, manifest, found)
    if how.deep:
        await _Reading(stored, found, how.transfer).all(there)
    return found


async def _verify_ranks(control: ObjectStore, location: Location, how: _How) -> Verification:
    found = Verification(location.url, "", how.deep)
    for name in await commit.rank_roots(control):
        found.add(await _verify(location.child(name), how, whole=False))
    return found


async def _look(store: ObjectStore, manifest: Manifest, found: Verification) -> list[ObjectEntry]:
    """The objects that are there with their sizes, by one listing; the others are noted as faults."""
    listed: dict[str, ObjectInfo] = {}
    if manifest.objects:
        listed = {info.key: info async for info in store.list(DATA_PREFIX.rstrip("/"))}
    whole = []
    for entry in manifest.objects:
        info = listed.get(entry.key)
        if info is None:
            found.faults.append(Fault(entry.key, "the object is gone"))
        elif info.size != entry.size:
            found.faults.append(Fault(entry.key, f"the object has {info.size} bytes and should have {entry.size}"))
        else:
            whole.append(entry)
            if info.crc32c is not None:
                await _compare(entry, info.crc32c, found)
            if entry.e_tag is not None and info.version is not None and info.version != entry.e_tag:
                found.rewritten.append(entry.key)
    return whole


async def _compare(entry: ObjectEntry, stored: int, found: Verification) -> None:
    """With the store's own checksum."""
    if await in_thread(whole_sum, entry.sums, entry.block_size, entry.size) == stored:
        found.checked_by_store += 1
    else:
        message = "its CRC32C, as the store has it, is not that of what was saved"
        found.faults.append(Fault(entry.key, message, 0, entry.size))


class _Reading:
    """Reads objects whole: several at once, each in order, all of them together within `max_requests`."""

    def __init__(self, store: ObjectStore, found: Verification, transfer: TransferOptions) -> None:
        self._store = store
        self._found = found
        self._transfer = transfer
        self._gate = asyncio.Semaphore(transfer.max_requests)

    async def all(self, entries: Sequence[ObjectEntry]) -> None:
        """Reads and checks every byte of `entries`."""
        queue = iter(entries)
        await all_or_cancel(self._drain(queue) for _ in range(min(_OBJECTS_AT_ONCE, len(entries))))

    async def _drain(self, queue: Iterator[ObjectEntry]) -> None:
        for entry in queue:
            step = max(1, self._transfer.range_size // entry.block_size) * entry.block_size
            # A lane for each request that may be under way, all taking from one row of ranges.
            ranges = iter(range(0, entry.size, step))
            lanes = min(self._transfer.max_requests, -(-entry.size // step))
            await all_or_cancel(self._lane(entry, ranges, step) for _ in range(lanes))

    async def _lane(self, entry: ObjectEntry, ranges: Iterator[int], step: int) -> None:
        for start in ranges:
            async with self._gate:
                await self._check(entry, start, min(entry.size, start + step))

    async def _check(self, entry: ObjectEntry, start: int, end: int) -> None:
        """Reads a range, once more if it is damaged: damage on the way is gone the second time."""
        bad: list[tuple[int, int]] = []
        for _ in range(2):
            try:
                data = await self._store.get_range(entry.key, start, end)
            except (NotFound, RangeNotSatisfiable) as error:
                self._found.faults.append(Fault(entry.key, f"it went while it was read: {error.message}", start, end))
                return
            except DecryptionFailed as error:
                # All else of the range is what was encrypted.
                message = "bytes are not what was encrypted there"
                self._found.faults += [Fault(entry.key, message, low, high) for low, high in error.ranges]
                return
            self._found.bytes_read += len(data)
            first = start // entry.block_size
            bad = await in_thread(bad_blocks, [data], first, entry.sums, entry.block_size, entry.digests)
            if not bad:
                return
        for low, high in bad:
            message = "bytes differ from what was saved"
            self._found.faults.append(
                Fault(entry.key, message, low * entry.block_size, min(entry.size, high * entry.block_size))
            )
