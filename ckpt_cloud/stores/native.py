"""The native engine: obstore (Rust `object_store`) behind our protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import obstore

from ckpt_cloud.errors import (
    BucketNotFound,
    CkptCloudError,
    Damaged,
    RangeNotSatisfiable,
    RequestRefused,
    StoreUnavailable,
    WrongRegion,
)
from ckpt_cloud.format.layout import join
from ckpt_cloud.stores.base import (
    ANY,
    CREATE,
    MAX_PART_BYTES,
    MAX_PARTS,
    AtHand,
    Buffer,
    Condition,
    ObjectInfo,
    Replace,
    Source,
    UnfinishedUpload,
    fill,
)
from ckpt_cloud.stores.capabilities import ALL, Capabilities, remembered
from ckpt_cloud.stores.foreign_errors import translate, translated
from ckpt_cloud.workers import in_thread, to_the_end

if TYPE_CHECKING:
    from obstore import GetOptions


_ABORT_TIMEOUT_S = 10.0
"""For parts under way to end and the abort to be sent when an upload is cancelled."""
_HEAD_TIMEOUT_S = 10.0
"""For the one look at an object's size after a read of it failed."""


class Clients:
    """obstore's stores for one bucket, by what they are patient with; each is made when it is first used.

    Args:
        once: makes one that sends every request once, and gives it `request_timeout_s`.
        reads: the same, and gives up on a body that has stopped coming.
        parts: retries a few times inside, for what obstore makes of many requests.
        lists: both.
    """

    def __init__(
        self, once: Callable[[], Any], reads: Callable[[], Any], parts: Callable[[], Any], lists: Callable[[], Any]
    ) -> None:
        self._once, self._reads, self._parts, self._lists = once, reads, parts, lists

    @cached_property
    def once(self) -> Any:
        return self._once()

    @cached_property
    def reads(self) -> Any:
        return self._reads()

    @cached_property
    def parts(self) -> Any:
        return self._parts()

    @cached_property
    def lists(self) -> Any:
        return self._lists()

    @classmethod
    def same(cls, store: Any) -> Clients:
        """One for all, where there is no network."""
        return cls(*(lambda: store,) * 4)


class NativeStore:
    """Objects under `prefix` of an obstore store.

    Args:
        clients: of the bucket.
        prefix: path under the bucket, without slashes at its ends.
        url: of the prefix, for messages.
        probed_as: name under which this process remembers what the store can do; None if it is known to keep all
            conditions.
    """

    max_parts = MAX_PARTS
    max_part_bytes = MAX_PART_BYTES

    def __init__(self, clients: Clients, prefix: str, url: str, *, probed_as: str | None = None) -> None:
        self.url = url
        self._probed_as = probed_as
        self._clients = clients
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"<NativeStore {self.url}>"

    async def put(self, key: str, data: Buffer, condition: Condition = ANY) -> str | None:
        async with self._translated("put", key):
            result = await obstore.put_async(
                self._clients.once, join(self._prefix, key), data, mode=self._mode(condition), use_multipart=False
            )
        return self._version(result)

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        buffers = source()
        stream = _StoppableAtHand(buffers) if isinstance(buffers, AtHand) else _Stoppable(buffers)
        upload = asyncio.ensure_future(
            obstore.put_async(
                self._clients.parts, join(self._prefix, key), stream, chunk_size=part_size, max_concurrency=concurrency
            )
        )
        try:
            async with self._translated("upload", key):
                return self._version(await asyncio.shield(upload))
        except asyncio.CancelledError:
            # obstore aborts an upload whose stream fails, but not one that nobody waits for any more.
            stream.stop()
            await _ended(upload, timeout_s=_ABORT_TIMEOUT_S)
            raise
        except CkptCloudError:
            if stream.failure is not None:
                # The caller's own, which obstore hands on and the table above would take for the store's.
                raise stream.failure from None
            raise

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectInfo]:
        async with self._translated("get", key):
            result = await obstore.get_async(self._clients.reads, join(self._prefix, key))
            if result.meta["size"] > limit:
                raise Damaged(f"the object has {result.meta['size']} bytes, more than {limit}", self._at(key))
            data = await result.bytes_async()
        return bytes(data), self._info(key, result.meta)

    async def head(self, key: str) -> ObjectInfo:
        async with self._translated("head", key):
            return self._info(key, await obstore.head_async(self._clients.reads, join(self._prefix, key)))

    async def get_range(self, key: str, start: int, end: int, version: str | None = None) -> memoryview:
        if start == end:
            return memoryview(b"")
        options: GetOptions = {"range": (start, end)}
        if version is not None:
            options["if_match"] = self._pinned(version)
        try:
            async with self._translated("read", key):
                result = await obstore.get_async(self._clients.reads, join(self._prefix, key), options=options)
                data = memoryview(await result.bytes_async())
            if len(data) != end - start:
                raise StoreUnavailable(f"read: {len(data)} bytes came instead of {end - start}", self._at(key))
        except (StoreUnavailable, RequestRefused):
            await self._check_size(key, end)
            raise
        return data

    async def get_range_into(
        self, key: str, start: int, end: int, into: Sequence[memoryview], version: str | None = None
    ) -> None:
        data = await self.get_range(key, start, end, version)
        await to_the_end(in_thread(fill, into, data))

    async def _check_size(self, key: str, end: int) -> None:
        """Tells a range that does not exist, which stores report in many ways, from a passing fault."""
        try:
            async with asyncio.timeout(_HEAD_TIMEOUT_S):
                size = (await obstore.head_async(self._clients.reads, join(self._prefix, key)))["size"]
        except Exception:  # noqa: BLE001 - the read's own error says it
            return
        if size < end:
            raise RangeNotSatisfiable(f"read: the object has {size} bytes, {end} were asked for", self._at(key))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        root = join(self._prefix, prefix) if prefix else self._prefix
        async with self._translated("list", prefix):
            async for batch in obstore.list(self._clients.lists, root or None):
                for meta in batch:
                    yield self._info(meta["path"].removeprefix(f"{self._prefix}/" if self._prefix else ""), meta)

    async def list_children(self, prefix: str = "") -> Sequence[str]:
        root = join(self._prefix, prefix) if prefix else self._prefix
        async with self._translated("list", prefix):
            try:
                found = await obstore.list_with_delimiter_async(self._clients.reads, root or None)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    async def capabilities(self) -> Capabilities:
        return ALL if self._probed_as is None else await remembered(self, self._probed_as)

    async def delete(self, keys: Sequence[str]) -> None:
        if keys:
            async with self._translated("delete", keys[0]):
                try:
                    await obstore.delete_async(self._clients.once, [join(self._prefix, key) for key in keys])
                except FileNotFoundError as error:
                    self._check_bucket(error, keys[0])
                    await self._delete_one_by_one(keys)

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        del prefix
        return []

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        del upload

    async def _delete_one_by_one(self, keys: Sequence[str]) -> None:
        # Local files and Azure stop at the first that is missing, unlike S3.
        for key in keys:
            try:
                await obstore.delete_async(self._clients.once, join(self._prefix, key))
            except FileNotFoundError as error:
                self._check_bucket(error, key)

    def _check_bucket(self, missing: FileNotFoundError, key: str) -> None:
        """A key that is gone is not missed; a bucket is."""
        ours = translate(missing, "delete", self._at(key))
        if isinstance(ours, BucketNotFound):
            raise ours

    def _mode(self, condition: Condition) -> Any:
        if condition is CREATE:
            return "create"
        return self._replaced(condition.version) if isinstance(condition, Replace) else "overwrite"

    def _info(self, key: str, meta: Any) -> ObjectInfo:
        return ObjectInfo(key, meta["size"], self._version(meta), meta["last_modified"].timestamp())

    def _version(self, meta: Any) -> str | None:
        """Our name for the version that obstore's metadata describe."""
        version: str | None = meta["e_tag"]
        return version

    def _pinned(self, version: str) -> str:
        """The ETag of a version, for If-Match."""
        return version

    def _replaced(self, version: str) -> dict[str, str]:
        """What obstore wants to replace exactly this version."""
        return {"e_tag": version}

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    @asynccontextmanager
    async def _translated(self, operation: str, key: str) -> AsyncIterator[None]:
        try:
            with translated(operation, self._at(key)):
                yield
        except WrongRegion as error:
            raise await self._located(error) from None

    async def _located(self, error: WrongRegion) -> WrongRegion:
        """`error`, with the right region if it can be found out."""
        return error


class _Stoppable:
    """The buffers of a source, for obstore; keeps hold of none, and fails at once when it is stopped."""

    def __init__(self, source: AsyncIterable[Buffer]) -> None:
        self._source = aiter(source)
        # What changes: who waits for the next buffer, whether there will be one, and what the source raised.
        self._waiting: asyncio.Task[Any] | None = None
        self._stopped = False
        self.failure: Exception | None = None

    def __aiter__(self) -> _Stoppable:
        return self

    async def __anext__(self) -> Buffer:
        if self._stopped:
            raise RuntimeError("the upload was cancelled")
        self._waiting = asyncio.current_task()
        try:
            return await anext(self._source)
        except StopAsyncIteration:
            raise
        except Exception as error:
            self.failure = error
            raise
        finally:
            self._waiting = None

    def stop(self) -> None:
        """Only from the loop."""
        self._stopped = True
        if self._waiting is not None:
            self._waiting.cancel()


class _StoppableAtHand:
    """Buffers that are at hand, for obstore's own threads, which then need not ask ours for each."""

    failure: Exception | None = None

    def __init__(self, buffers: AtHand) -> None:
        self._buffers = iter(buffers)
        # What changes.
        self._stopped = False

    def __iter__(self) -> _StoppableAtHand:
        return self

    def __next__(self) -> Buffer:
        if self._stopped:
            raise RuntimeError("the upload was cancelled")
        return next(self._buffers)

    def stop(self) -> None:
        """From any thread."""
        self._stopped = True


async def _ended(work: asyncio.Future[Any], *, timeout_s: float) -> None:
    """Waits a while for `work` to end by itself, then cancels it; what comes of it interests nobody."""
    await asyncio.wait([work], timeout=timeout_s)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
