"""What all filesystems share: the protocol's methods, made of the few requests that each library sends.

caller's loop: put, get, ... ─► FsspecStore._run ─► on_loop ─► fsspec's loop: _write, _fetch, ... ─► library, once
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from ckpt_cloud.errors import (
    AlreadyExists,
    CkptCloudError,
    Damaged,
    NotFound,
    PreconditionFailed,
    RangeNotSatisfiable,
    RequestRefused,
    StoreUnavailable,
)
from ckpt_cloud.format.layout import join
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores.base import (
    ANY,
    CREATE,
    Buffer,
    Condition,
    ObjectInfo,
    Replace,
    fill,
)
from ckpt_cloud.stores.fsspec_engine.errors import Translate, translated
from ckpt_cloud.stores.fsspec_engine.loops import at_once, on_loop
from ckpt_cloud.workers import in_thread, to_the_end

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, T]]
Failed = tuple[str, CkptCloudError]
"""A path, and what became of it."""

_LANES = 16
"""Requests at once where one operation needs many."""
_SIZE_S = 10.0
"""For the one look at an object's size after a read of it failed."""


@dataclass(frozen=True, slots=True)
class Root:
    """Where a store lies: its URL, and the bucket and path that the filesystem knows it by."""

    url: str
    bucket: str
    path: str


@dataclass(frozen=True, slots=True)
class Page:
    """One answer to a listing.

    Attributes:
        infos: with whole paths as keys.
        folders: whole paths that have objects below them, when asked for one level only.
        token: for the next page; None after the last.
    """

    infos: Sequence[ObjectInfo]
    folders: Sequence[str]
    token: Any


class FsspecStore(ABC):
    """Objects under `root` of a filesystem; uploads of many parts are the subclasses'.

    Args:
        fs: an `AsyncFileSystem` that has its own loop, which all requests run on.
        root: what is below it is ours.
        options: of which the timeouts count.
        translate: the table of the library's errors.
    """

    delete_batch = 1000
    """Keys that one `_delete` takes."""

    def __init__(self, fs: Any, root: Root, options: StoreOptions, translate: Translate) -> None:
        self.url = root.url
        self._fs = fs
        self._root = root
        self._options = options
        self._translate = translate

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    async def put(self, key: str, data: Buffer, condition: Condition = ANY) -> str | None:
        body = data if isinstance(data, bytes) else bytes(data)
        with judged(condition):
            return await self._run("put", key, lambda: self._write(self._path(key), [memoryview(body)], condition))

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectInfo]:
        data, info = await self._run("get", key, lambda: self._fetch(self._path(key), limit))
        if info.size > limit:
            raise Damaged(f"the object has {info.size} bytes, more than {limit}", self._at(key))
        if len(data) != info.size:
            raise StoreUnavailable(f"get: {len(data)} bytes came instead of {info.size}", self._at(key))
        return data, replace(info, key=key)

    async def head(self, key: str) -> ObjectInfo:
        # Of the whole object no byte is read: none has fewer than none.
        _, info = await self._run("head", key, lambda: self._fetch(self._path(key), -1))
        return replace(info, key=key)

    async def get_range(self, key: str, start: int, end: int, version: str | None = None) -> memoryview:
        if start == end:
            return memoryview(b"")
        path = self._path(key)
        try:
            data = await self._run("read", key, lambda: self._read(path, start, end, version))
            if len(data) != end - start:
                raise StoreUnavailable(f"read: {len(data)} bytes came instead of {end - start}", self._at(key))
        except (StoreUnavailable, RequestRefused):
            await self._check_size(key, end)
            raise
        return memoryview(data)

    async def get_range_into(
        self, key: str, start: int, end: int, into: Sequence[memoryview], version: str | None = None
    ) -> None:
        data = await self.get_range(key, start, end, version)
        await to_the_end(in_thread(fill, into, data))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        async for page in self._pages(prefix, flat=True):
            for info in page.infos:
                yield replace(info, key=self._key(info.key))

    async def list_children(self, prefix: str = "") -> Sequence[str]:
        names = [folder.rstrip("/") async for page in self._pages(prefix, flat=False) for folder in page.folders]
        return sorted({name.rpartition("/")[2] for name in names})

    async def delete(self, keys: Sequence[str]) -> None:
        for at in range(0, len(keys), self.delete_batch):
            batch = keys[at : at + self.delete_batch]
            failed = await self._run("delete", batch[0], lambda: self._delete([self._path(key) for key in batch]))  # noqa: B023 - awaited here
            self._report(failed)

    # What each library does, on its loop and under the timeout of one request. Paths are whole, below the bucket.

    @abstractmethod
    async def _write(self, path: str, pieces: Sequence[memoryview], condition: Condition) -> str | None:
        """One request; its answer is the store's own."""

    @abstractmethod
    async def _fetch(self, path: str, limit: int) -> tuple[bytes, ObjectInfo]:
        """The whole object; of one larger than `limit`, any bytes."""

    @abstractmethod
    async def _read(self, path: str, start: int, end: int, version: str | None) -> Buffer:
        """The range, or as much of it as came."""

    @abstractmethod
    async def _size(self, path: str) -> int: ...

    @abstractmethod
    async def _page(self, below: str, token: Any, *, flat: bool) -> Page:
        """The page after `token` of what lies below `below`, which ends with a slash or is empty."""

    @abstractmethod
    async def _delete_one(self, path: str) -> None:
        """Deletes an object; one that is not there may be missed."""

    @abstractmethod
    def _endpoint(self) -> str:
        """Name of the server, without secrets."""

    async def _run(self, operation: str, key: str, work: Work[T]) -> T:
        """Runs `work()` on the filesystem's loop, within the time of one request."""

        async def limited() -> T:
            async with asyncio.timeout(self._options.request_timeout_s):
                return await work()

        with translated(operation, self._at(key), self._translate):
            return await on_loop(self._fs.loop, limited)

    async def _delete(self, paths: Sequence[str]) -> Sequence[Failed]:
        """Deletes objects; those that could not be, and why."""

        async def one(path: str) -> Failed | None:
            try:
                with translated("delete", self._url_of(path), self._translate):
                    await self._delete_one(path)
            except NotFound:
                return None
            except CkptCloudError as error:
                return path, error
            return None

        failed = await at_once([partial(one, path) for path in paths], limit=_LANES)
        return [each for each in failed if each is not None]

    async def _check_size(self, key: str, end: int) -> None:
        """Tells a range that does not exist, which stores report in many ways, from a passing fault."""
        try:
            async with asyncio.timeout(_SIZE_S):
                size = await self._run("read", key, lambda: self._size(self._path(key)))
        except (CkptCloudError, TimeoutError):
            # The read's own error says it.
            return
        if size < end:
            raise RangeNotSatisfiable(f"read: the object has {size} bytes, {end} were asked for", self._at(key))

    async def _pages(self, prefix: str, *, flat: bool) -> AsyncIterator[Page]:
        token: Any = None
        while True:
            page = await self._run("list", prefix, lambda: self._page(self._below(prefix), token, flat=flat))  # noqa: B023 - awaited here
            yield page
            token = page.token
            if token is None:
                return

    def _report(self, failed: Sequence[Failed]) -> None:
        if failed:
            _, error = failed[0]
            for path, other in failed[1:10]:
                error.add_note(f"{self._key(path)}: {other.message}")
            error.add_note(f"{len(failed)} of the keys could not be deleted")
            raise error

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _url_of(self, path: str) -> str:
        return self._at(self._key(path))

    def _path(self, key: str) -> str:
        return join(self._root.path, key)

    def _below(self, prefix: str) -> str:
        path = join(self._root.path, prefix) if prefix else self._root.path
        return f"{path}/" if path else ""

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._root.path}/" if self._root.path else "")


@contextmanager
def judged(condition: Condition) -> Iterator[None]:
    """Gives a refusal the name that belongs to the condition; libraries use one for several."""
    try:
        yield
    except PreconditionFailed as error:
        if condition is CREATE:
            raise AlreadyExists("put: an object is already there", error.url) from None
        raise
    except (NotFound, AlreadyExists) as error:
        if isinstance(condition, Replace):
            raise PreconditionFailed("put: the object is another version, or gone", error.url) from None
        raise
