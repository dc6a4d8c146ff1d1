"""Uploads of many parts, for the libraries that have them; nothing becomes visible unless all of them arrive."""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ckpt_cloud.errors import CkptCloudError, NotFound
from ckpt_cloud.stores.base import ANY, MAX_PART_BYTES, MAX_PARTS, Source, UnfinishedUpload
from ckpt_cloud.stores.capabilities import Capabilities, remembered
from ckpt_cloud.stores.fsspec_engine.base import FsspecStore
from ckpt_cloud.stores.fsspec_engine.parts import Part, Parts, in_lanes
from ckpt_cloud.stores.part_retries import part_retries

T = TypeVar("T")
_ABORT_S = 10.0
"""For the abort of an upload to be sent."""


class UploadingStore(FsspecStore):
    """A store that takes an object in parts: the stream is read on the caller's loop, parts are sent on fsspec's."""

    max_parts = MAX_PARTS
    max_part_bytes = MAX_PART_BYTES

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        parts = Parts(source(), part_size)
        try:
            first = [await parts.next()]
            if first[0] is None or first[0].size < part_size:
                return await self._put_part(key, first.pop() or Part())

            async def take() -> Part | None:
                return first.pop() if first else await parts.next()

            return await self._upload(key, take, concurrency=concurrency)
        finally:
            await parts.close()

    async def capabilities(self) -> Capabilities:
        return await remembered(self, f"fsspec {self._endpoint()} {self._root.bucket}")

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        found = await self._run("list uploads", prefix, lambda: self._uploads(self._below(prefix)))
        return [UnfinishedUpload(self._key(each.key), each.id, each.started_unix_s) for each in found]

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        path = self._path(upload.key)
        with contextlib.suppress(NotFound):
            await self._run("abort upload", upload.key, lambda: self._abort((path, upload.id)))

    @abstractmethod
    async def _uploads(self, below: str) -> Sequence[UnfinishedUpload]:
        """All that are unfinished, with whole paths as keys."""

    @abstractmethod
    async def _begin(self, path: str) -> Any:
        """An upload, as the value that the next three take."""

    @abstractmethod
    async def _send(self, upload: Any, number: int, part: Part) -> Any:
        """Stores one part, counted from 0; what `_complete` needs of it."""

    @abstractmethod
    async def _complete(self, upload: Any, sent: Sequence[Any]) -> str | None:
        """Makes the object visible; its version."""

    @abstractmethod
    async def _abort(self, upload: Any) -> None:
        """Discards all that was stored. Also takes the path and id of an `UnfinishedUpload`."""

    async def _put_part(self, key: str, part: Part) -> str | None:
        try:
            return await self._run("put", key, lambda: self._write(self._path(key), part.pieces, ANY))
        finally:
            part.release()

    async def _upload(self, key: str, take: Callable[[], Awaitable[Part | None]], *, concurrency: int) -> str | None:
        # Not to be cancelled: an upload whose id is lost could not be aborted.
        begun = asyncio.ensure_future(self._unless_refused("upload", key, lambda: self._begin(self._path(key))))
        try:
            upload = await asyncio.shield(begun)

            async def send(number: int, part: Part) -> Any:
                again = part_retries(self._options.retry)
                return await again(self._run, "upload", key, lambda: self._send(upload, number, part))

            sent = await in_lanes(take, send, concurrency=concurrency)
            return await self._unless_refused("upload", key, lambda: self._complete(upload, sent))
        except BaseException:
            # A task of its own, which a second cancellation does not reach.
            discarding = asyncio.ensure_future(self._discard(key, begun))
            await asyncio.wait([discarding], timeout=_ABORT_S)
            raise

    async def _unless_refused(self, operation: str, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Sent again only where the store refused it, since what it may have done it need not do twice."""
        return await part_retries(self._options.retry, only_refused=True)(self._run, operation, key, work)

    async def _discard(self, key: str, begun: asyncio.Future[Any]) -> None:
        """Aborts an upload; one that cannot be is left for `list_uploads`."""
        with contextlib.suppress(CkptCloudError):
            upload = await begun
            await self._run("abort upload", key, lambda: self._abort(upload))
