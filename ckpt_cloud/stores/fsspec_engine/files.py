"""Local files, through fsspec: a file gets its name once it has all its bytes."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ckpt_cloud.errors import CkptCloudError
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores.base import ANY, CREATE, Buffer, Condition, Source
from ckpt_cloud.stores.fsspec_engine.base import Page, Root
from ckpt_cloud.stores.fsspec_engine.errors import of_files, translated
from ckpt_cloud.stores.fsspec_engine.generic import GenericStore
from ckpt_cloud.workers import in_thread, to_the_end

_DRAFT = re.compile(r".*#draft-[0-9a-f]{12}")


def is_local(fs: Any) -> bool:
    """Whether its files are this machine's."""
    return isinstance(fs, LocalFileSystem)


class FileStore(GenericStore):
    """Files, written under another name that listings leave out, then renamed, or linked where nothing may be.

    They are not synced to the disk, as the native engine's are.
    """

    def __init__(self, fs: Any, root: Root, options: StoreOptions) -> None:
        super().__init__(fs, root, options)
        self._creates = True

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        del part_size, concurrency
        await self._publish(self._path(key), source(), ANY)
        return None

    async def _write(self, path: str, pieces: Sequence[memoryview], condition: Condition) -> str | None:
        self.check(condition)

        async def given() -> AsyncIterator[Buffer]:
            for piece in pieces:
                yield piece

        await self._publish(path, given(), condition)
        return None

    async def _publish(self, path: str, buffers: AsyncIterable[Buffer], condition: Condition) -> None:
        draft = f"{path}#draft-{secrets.token_hex(6)}"
        try:
            file = await self._file("open", path, self._begun, draft)
            try:
                async for buffer in buffers:
                    await self._file("write", path, file.write, buffer)
                    del buffer
            finally:
                await self._file("close", path, file.close)
            if condition is CREATE:
                await self._file("put", path, self._fs.link, draft, path)
            else:
                await self._file("put", path, self._fs.mv, draft, path)
        finally:
            with contextlib.suppress(CkptCloudError):
                await self._delete_one(draft)

    def _begun(self, draft: str) -> Any:
        self._fs.makedirs(self._parent(draft), exist_ok=True)
        return self._fs.open(draft, "wb")

    async def _page(self, below: str, token: Any, *, flat: bool) -> Page:
        page = await super()._page(below, token, flat=flat)
        return Page([info for info in page.infos if not _DRAFT.fullmatch(info.key)], page.folders, page.token)

    async def _delete_one(self, path: str) -> None:
        await self._file("delete", path, self._fs.rm_file, path)

    async def delete(self, keys: Sequence[str]) -> None:
        await super().delete(keys)
        await in_thread(self._prune, [self._path(key) for key in keys])

    def _prune(self, paths: Sequence[str]) -> None:
        """Removes directories below the root that held `paths` and are empty now; an object store has none."""
        for path in paths:
            folder = self._parent(path)
            while folder != self._path("").rstrip("/"):
                try:
                    self._fs.rmdir(folder)
                except OSError:
                    break
                folder = self._parent(folder)

    async def _file(self, operation: str, path: str, call: Any, *args: Any) -> Any:
        with translated(operation, self._url_of(path), of_files):
            return await to_the_end(in_thread(call, *args))

    @staticmethod
    def _parent(path: str) -> str:
        return path.rpartition("/")[0]
