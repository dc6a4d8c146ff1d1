"""Local directories, with what obstore's local store lacks: replacing one exact version, and durability."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import obstore

from ckpt_cloud.errors import PreconditionFailed
from ckpt_cloud.format.layout import join
from ckpt_cloud.stores.base import ANY, Buffer, Condition, Replace
from ckpt_cloud.stores.native import NativeStore
from ckpt_cloud.workers import in_thread


class LocalStore(NativeStore):
    """Files under a directory; what is acknowledged has been synced to the disk."""

    def __init__(self, data: object, root: Path, url: str) -> None:
        super().__init__(data, data, str(root).lstrip("/"), url)
        self._root = root

    async def put(self, key: str, data: Buffer, condition: Condition = ANY) -> str | None:
        if isinstance(condition, Replace):
            version = await in_thread(self._replace, key, data, condition.version)
        else:
            version = await super().put(key, data, condition)
        await in_thread(_sync, self._root / key, self._root)
        return version

    async def put_multipart(
        self, key: str, buffers: AsyncIterable[Buffer], *, part_size: int, concurrency: int
    ) -> str | None:
        version = await super().put_multipart(key, buffers, part_size=part_size, concurrency=concurrency)
        await in_thread(_sync, self._root / key, self._root)
        return version

    async def list_children(self, prefix: str = "") -> Sequence[str]:
        below = self._root / prefix
        return [name for name in await super().list_children(prefix) if await in_thread(_has_files, below / name)]

    async def delete(self, keys: Sequence[str]) -> None:
        await super().delete(keys)
        await in_thread(_prune, [self._root / key for key in keys], self._root)

    def _replace(self, key: str, data: Buffer, version: str) -> str | None:
        """Compares and replaces under a lock on the directory that every writer of this library takes."""
        path = join(self._prefix, key)
        with self._translated("put", key):
            try:
                with _locked(self._root):
                    if obstore.head(self._data, path)["e_tag"] == version:
                        return obstore.put(self._data, path, data, mode="overwrite", use_multipart=False)["e_tag"]
            except FileNotFoundError:
                pass
        raise PreconditionFailed("put: the object is another version, or gone", self._at(key))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _has_files(directory: Path) -> bool:
    return any(files for _, _, files in os.walk(directory))


def _prune(paths: Sequence[Path], root: Path) -> None:
    """Removes directories below `root` that held `paths` and are empty now; an object store has none."""
    for path in paths:
        for directory in path.parents:
            if directory == root:
                break
            try:
                directory.rmdir()
            except OSError:
                break


def _sync(path: Path, root: Path) -> None:
    """Syncs a file and the directories that name it, up to `root`."""
    for target in (path, *path.parents):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if target == root:
            return
