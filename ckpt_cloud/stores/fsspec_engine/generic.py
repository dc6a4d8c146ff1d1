"""Any other fsspec filesystem, by the methods that all of them have."""

from __future__ import annotations

import asyncio
import inspect
import io
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from ckpt_cloud.errors import NotFound, PreconditionFailed, Unsupported
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores.base import (
    ANY,
    CREATE,
    MAX_PART_BYTES,
    MAX_PARTS,
    Condition,
    ObjectInfo,
    Replace,
    Source,
    UnfinishedUpload,
)
from ckpt_cloud.stores.capabilities import Capabilities
from ckpt_cloud.stores.fsspec_engine.base import FsspecStore, Page, Root, Work
from ckpt_cloud.stores.fsspec_engine.errors import of_files, translated
from ckpt_cloud.stores.fsspec_engine.parts import joined
from ckpt_cloud.workers import in_thread

T = TypeVar("T")

_VERSIONS = ("ETag", "etag", "e_tag", "generation", "VersionId", "version_id")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
"""What filesystems call them."""
_create_lock = threading.Lock()
"""fsspec's own filesystems look first and write then."""


class GenericStore(FsspecStore):
    """Objects are files of the filesystem, synchronous or not.

    It writes each with `pipe_file`, so an upload of many parts is collected in memory first: nothing half written ever
    becomes visible, and an object must fit. It replaces no exact version, and creates only where the filesystem's own
    `pipe_file` has a mode for it; versions are what the filesystem tells, which may be nothing.
    """

    max_parts = MAX_PARTS
    max_part_bytes = MAX_PART_BYTES

    def __init__(self, fs: Any, root: Root, options: StoreOptions) -> None:
        super().__init__(fs, replace(root, path=root.path.strip("/")), options, of_files)
        self._slash = "/" if root.path.startswith("/") else ""
        self._creates = can_create(fs)

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        del part_size, concurrency
        collected = io.BytesIO()
        async for buffer in source():
            collected.write(buffer)
            del buffer
        return await self.put(key, collected.getvalue())

    async def capabilities(self) -> Capabilities:
        return Capabilities(conditional_create=self._creates, conditional_replace=False)

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        del prefix
        return []

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        """Nothing to do: uploads leave nothing behind."""

    async def _write(self, path: str, pieces: Sequence[memoryview], condition: Condition) -> str | None:
        self.check(condition)
        mode = {} if condition is ANY else {"mode": "create"}
        body = joined(pieces)
        try:
            await self._pipe(path, body, **mode)
        except FileNotFoundError:
            await self._call("makedirs", path.rpartition("/")[0], exist_ok=True)
            await self._pipe(path, body, **mode)
        return (await self._info(path)).version

    def check(self, condition: Condition) -> None:
        """Whether the filesystem keeps `condition`.

        Raises:
            Unsupported: it does not.
        """
        if isinstance(condition, Replace):
            raise Unsupported("the filesystem cannot replace exactly one version", self.url)
        if condition is CREATE and not self._creates:
            raise Unsupported("the filesystem cannot refuse to overwrite", self.url)

    async def _pipe(self, path: str, body: bytes, **mode: str) -> None:
        if mode and not self._fs.async_impl:
            await in_thread(self._create, path, body)
        else:
            await self._call("pipe_file", path, body, **mode)

    def _create(self, path: str, body: bytes) -> None:
        with _create_lock:
            self._fs.pipe_file(path, body, mode="create")

    async def _fetch(self, path: str, limit: int) -> tuple[bytes, ObjectInfo]:
        info = await self._info(path)
        return (b"" if info.size > limit else bytes(await self._call("cat_file", path))), info

    async def _read(self, path: str, start: int, end: int, version: str | None) -> bytes:
        data = await self._call("cat_file", path, start=start, end=end)
        # Afterwards: whatever was read while another version came is then known for what it is.
        if version is not None and (await self._info(path)).version != version:
            raise PreconditionFailed("read: the object is another version", self._url_of(path))
        return bytes(data)

    async def _size(self, path: str) -> int:
        return (await self._info(path)).size

    async def _page(self, below: str, token: Any, *, flat: bool) -> Page:
        del token
        folder = below.rstrip("/") or self._slash
        self._fs.invalidate_cache()
        try:
            if flat:
                found = (await self._call("find", folder, detail=True)).values()
                infos = [self._described(each) for each in found if each.get("type") != "directory"]
                return Page([info for info in infos if info.key.startswith(below)], [], None)
            entries = await self._call("ls", folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return Page([], [], None)
        names = [self._named(each["name"]) for each in entries if each.get("type") == "directory"]
        return Page([], [name for name in names if name.startswith(below) and await self._has_files(name)], None)

    async def _has_files(self, folder: str) -> bool:
        entries = await self._call("ls", folder, detail=True)
        folders = [each["name"] for each in entries if each.get("type") == "directory"]
        return len(folders) < len(entries) or any([await self._has_files(each) for each in folders])

    async def _delete_one(self, path: str) -> None:
        await self._call("rm_file", path)

    def _endpoint(self) -> str:
        return type(self._fs).__name__

    async def _info(self, path: str) -> ObjectInfo:
        self._fs.invalidate_cache()
        found = await self._call("info", path)
        if found.get("type") == "directory":
            raise NotFound("get: a directory is there, and no object", self._url_of(path))
        return self._described({**found, "name": path})

    def _described(self, info: Any) -> ObjectInfo:
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), None)
        modified = next((info[name] for name in _TIMES if info.get(name)), 0.0)
        return ObjectInfo(self._named(info["name"]), int(info["size"] or 0), version, _unix_s(modified))

    def _named(self, path: str) -> str:
        """With a leading slash exactly where the root has one; filesystems differ, and with themselves too."""
        return self._slash + path.lstrip("/")

    def _path(self, key: str) -> str:
        return self._slash + super()._path(key)

    def _below(self, prefix: str) -> str:
        return self._slash + super()._below(prefix)

    def _key(self, path: str) -> str:
        return super()._key(path.removeprefix(self._slash))

    async def _run(self, operation: str, key: str, work: Work[T]) -> T:
        if self._fs.async_impl:
            return await super()._run(operation, key, work)
        with translated(operation, self._at(key), self._translate):
            async with asyncio.timeout(self._options.request_timeout_s):
                return await work()

    async def _call(self, name: str, *args: Any, **given: Any) -> Any:
        if self._fs.async_impl:
            return await getattr(self._fs, f"_{name}")(*args, **given)
        return await in_thread(lambda: getattr(self._fs, name)(*args, **given))


def can_create(fs: Any) -> bool:
    """Whether the class' own `pipe_file` has a mode; those that it inherits look first and write then."""
    own = getattr(type(fs), "_pipe_file" if fs.async_impl else "pipe_file", None)
    if own in (None, AbstractFileSystem.pipe_file, AsyncFileSystem._pipe_file):  # noqa: SLF001 - to know it by
        return False
    return "mode" in inspect.signature(own).parameters


def _unix_s(modified: Any) -> float:
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified)
    if isinstance(modified, datetime):
        aware = modified if modified.tzinfo else modified.replace(tzinfo=UTC)
        return aware.timestamp()
    return float(modified)
