"""The store of an encrypted checkpoint, shown as if it were not: what is put is sealed, what is read is opened."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from ckpt_cloud.errors import DecryptionFailed, RangeNotSatisfiable
from ckpt_cloud.format.layout import DATA_PREFIX, join
from ckpt_cloud.format.sealing import (
    BLOCK,
    NONCE_BYTES,
    SEALED_BLOCK,
    MasterKey,
    ObjectKey,
    blocks_of,
    plain_size,
    plain_within,
    sealed_size,
)
from ckpt_cloud.stores.base import (
    ANY,
    Buffer,
    Condition,
    ObjectInfo,
    ObjectStore,
    Source,
    UnfinishedUpload,
)
from ckpt_cloud.stores.capabilities import Capabilities
from ckpt_cloud.workers import in_thread, to_the_end


class SealedStore:
    """Objects below `data/` of another store, sealed on their way there and opened on their way back.

    Sizes and bytes are those of the objects as they are to be; versions and times the store's own. What does not open
    is read once more: damage on the way is gone the second time. All else goes through as it is, `COMMIT` too.

    Reading needs as much memory again as is read; `put` and `put_multipart` as much as is under way.

    Args:
        inner: at a checkpoint's URL.
        key: that seals.
        sizes: of objects, where they are known; the store is asked for those of others.
        under: path of the checkpoint below the URL of `inner`.
    """

    def __init__(
        self, inner: ObjectStore, key: MasterKey, sizes: Mapping[str, int] | None = None, *, under: str = ""
    ) -> None:
        self.url = inner.url
        self.max_parts = inner.max_parts
        self.max_part_bytes = plain_within(inner.max_part_bytes)
        self._inner = inner
        self._key = key
        self._data = join(under, DATA_PREFIX)
        self._name_at = len(self._data) - len(DATA_PREFIX)
        # Both grow: sizes, and keys of objects that were read.
        self._sizes = dict(sizes or {})
        self._keys: dict[str, ObjectKey] = {}

    def __repr__(self) -> str:
        return f"<SealedStore {self._inner!r}>"

    async def put(self, key: str, data: Buffer, condition: Condition = ANY) -> str | None:
        if not self._is_sealed(key):
            return await self._inner.put(key, data, condition)
        sealed = await in_thread(partial(_sealed_part, self._of(key), memoryview(data).cast("B"), last=True))
        return await self._inner.put(key, sealed, condition)

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        if not self._is_sealed(key):
            return await self._inner.put_multipart(key, source, part_size=part_size, concurrency=concurrency)
        blocks = -(-part_size // BLOCK)
        stream = partial(self._stream, self._of(key), source, blocks)
        return await self._inner.put_multipart(key, stream, part_size=blocks * SEALED_BLOCK, concurrency=concurrency)

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectInfo]:
        if not self._is_sealed(key):
            return await self._inner.get(key, limit=limit)
        bad: list[int] = []
        for _ in range(2):
            stored, info = await self._inner.get(key, limit=sealed_size(limit))
            size = plain_size(len(stored))
            if size is None:
                bad = [blocks_of(len(stored))]
                continue
            whole = bytearray(size)
            views = [memoryview(whole)]
            bad = await in_thread(partial(self._of(key).open, memoryview(stored), views, first_block=0, last=True))
            if not bad:
                return bytes(whole), _shown(info)
        raise self._failed(key, bad, None)

    async def head(self, key: str) -> ObjectInfo:
        info = await self._inner.head(key)
        return _shown(info) if self._is_sealed(key) else info

    async def get_range(self, key: str, start: int, end: int, version: str | None = None) -> memoryview:
        if not self._is_sealed(key) or start == end:
            return await self._inner.get_range(key, start, end, version)
        found: list[memoryview] = []

        def room() -> Sequence[memoryview]:
            found[:] = [memoryview(bytearray(end - start))]
            return found

        await self._read(key, start, end, room, version)
        return found[0]

    async def get_range_into(
        self, key: str, start: int, end: int, into: Sequence[memoryview], version: str | None = None
    ) -> None:
        if not self._is_sealed(key) or start == end:
            await self._inner.get_range_into(key, start, end, into, version)
        else:
            await self._read(key, start, end, lambda: into, version)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        async for info in self._inner.list(prefix):
            yield _shown(info) if self._is_sealed(info.key) else info

    async def list_children(self, prefix: str = "") -> Sequence[str]:
        return await self._inner.list_children(prefix)

    async def capabilities(self) -> Capabilities:
        return await self._inner.capabilities()

    async def delete(self, keys: Sequence[str]) -> None:
        await self._inner.delete(keys)

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        return await self._inner.list_uploads(prefix)

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        await self._inner.abort_upload(upload)

    async def _read(
        self, key: str, start: int, end: int, room: Callable[[], Sequence[memoryview]], version: str | None
    ) -> None:
        """Fills what `room` gives with the object's bytes; it is asked once there are any."""
        size = await self._size(key)
        if end > size:
            raise RangeNotSatisfiable(f"read: the object has {size} bytes, {end} were asked for", f"{self.url}/{key}")
        first, stop = start // BLOCK, -(-end // BLOCK)
        last = stop == blocks_of(size)
        high = sealed_size(size) if last else stop * SEALED_BLOCK
        bad: list[int] = []
        for _ in range(2):
            sealed = await self._inner.get_range(key, first * SEALED_BLOCK, high, version)
            opening = partial(
                self._of(key).open, sealed, room(), first_block=first, last=last, skip=start - first * BLOCK
            )
            bad = await to_the_end(in_thread(opening))
            if not bad:
                return
        raise self._failed(key, bad, size)

    async def _stream(self, sealing: ObjectKey, source: Source, blocks: int) -> AsyncIterator[memoryview]:
        """Sealed parts of so many blocks; each waits for the next, since only then it is not the last."""
        first = 0
        waiting = bytearray()
        async for buffer in source():
            rest = memoryview(buffer).cast("B")
            del buffer
            while len(rest):
                if len(waiting) == blocks * BLOCK:
                    yield await in_thread(partial(_sealed_part, sealing, waiting, first, last=False))
                    waiting = bytearray()
                    first += blocks
                take = min(blocks * BLOCK - len(waiting), len(rest))
                waiting += rest[:take]
                rest = rest[take:]
            # Not held while the next is waited for.
            del rest
        yield await in_thread(partial(_sealed_part, sealing, waiting, first, last=True))

    async def _size(self, key: str) -> int:
        if key not in self._sizes:
            stored = (await self._inner.head(key)).size
            size = plain_size(stored)
            if size is None:
                raise self._failed(key, [blocks_of(stored)], None)
            self._sizes[key] = size
        return self._sizes[key]

    def _of(self, key: str) -> ObjectKey:
        if key not in self._keys:
            self._keys[key] = self._key.of_object(key[self._name_at :])
        return self._keys[key]

    def _is_sealed(self, key: str) -> bool:
        return key.startswith(self._data)

    def _failed(self, key: str, bad: Sequence[int], size: int | None) -> DecryptionFailed:
        runs = _runs(bad)
        ranges = [(low * BLOCK, high * BLOCK if size is None else min(high * BLOCK, size)) for low, high in runs]
        said = ", ".join(f"{low} to {high}" for low, high in ranges[:3]) + (", ..." if len(ranges) > 3 else "")
        hint = "the stored object was changed or cut short, or another was put in its place; load an earlier checkpoint"
        where = f"{self.url}/{key}"
        error = DecryptionFailed(f"bytes {said} of the object are not what was encrypted there", where, hint)
        error.ranges = tuple(ranges)
        return error


def _sealed_part(sealing: ObjectKey, data: Buffer, first_block: int = 0, *, last: bool) -> memoryview:
    """Blocks of `data`, sealed, in memory of their own."""
    size = len(data)
    into = memoryview(bytearray(sealed_size(size)))
    sealing.seal([data], into, os.urandom(blocks_of(size) * NONCE_BYTES), first_block=first_block, last=last)
    return into


def _shown(info: ObjectInfo) -> ObjectInfo:
    """With the object's own size; 0 if it is none that was sealed, as no object of a checkpoint has."""
    return replace(info, size=plain_size(info.size) or 0, crc32c=None)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs: the first, and that after the last."""
    begins = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a + 1 for a, b in pairwise(numbers) if b != a + 1), numbers[-1] + 1]
    return list(zip(begins, ends, strict=True))
